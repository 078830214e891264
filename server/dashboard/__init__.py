"""The live page: what the coordinator and the auditors see of sites and runs in a browser."""
