"""Start-up kits: one folder and one archive for the coordinator, each hospital and each auditor of a federation."""
