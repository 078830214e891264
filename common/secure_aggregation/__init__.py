"""Sums over sites of which the coordinator learns nothing but the sum: what both sides must agree on."""
