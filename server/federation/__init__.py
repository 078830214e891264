"""A run: rounds, messages, enrolment, update checks, strategies, central evaluation."""
