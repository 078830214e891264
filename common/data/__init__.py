"""The data path: manifests, sources, splits by patient, the decoded cache and the data report."""
