"""What of a run is written to TensorBoard and MLflow, beside the run folder and never in its way."""
