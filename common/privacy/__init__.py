"""Differential privacy that both sides need: its account, and noise from a secret."""
