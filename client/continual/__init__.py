"""Continual learning at the site: what readers said goes into the manifest, and two models are compared on its own patients."""
