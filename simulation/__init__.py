"""N virtual hospitals on one machine: partitions, phantom data and the runner."""
