"""Runs inside a hospital: the ClientApp, local training and what the site keeps to itself."""
