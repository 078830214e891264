"""The commands of a hospital: `pneumofed site` and `pneumofed privacy`."""
