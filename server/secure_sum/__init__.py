"""The coordinator's side of a secure sum."""
