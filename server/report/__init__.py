"""The report of a run, for clinicians and engineers."""
