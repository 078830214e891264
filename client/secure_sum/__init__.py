"""The site's side of a secure sum."""
