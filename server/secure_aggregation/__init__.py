"""The coordinator's side of secure aggregation."""
