"""What the coordinator and every hospital must agree on; imports nothing else of ours."""
