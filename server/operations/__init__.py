"""The coordinator's machine: processes, the gateway (nginx), the SuperLink."""
