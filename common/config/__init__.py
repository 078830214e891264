"""What an experiment, a site and a coordinator may be set to, each key with its meaning."""
