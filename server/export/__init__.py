"""From a run folder to a model bundle."""
