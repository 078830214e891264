"""The coordinator's commands: `pneumofed server`, `provision`, `export`."""
