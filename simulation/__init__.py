"""N virtual hospitals on one machine: their data and folders, the runner, baselines, and attacks on what they train."""
