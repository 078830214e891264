"""The site's side of secure aggregation."""
