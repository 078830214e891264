"""The attack bench: what an attacker learns from trained models and from updates, with and without protection."""
