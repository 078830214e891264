"""The command `pneumofed`: its root and the commands that need more than one house."""
