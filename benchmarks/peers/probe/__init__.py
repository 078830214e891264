"""On PYTHONPATH of every system that is measured."""
