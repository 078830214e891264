"""The commands of a finished model: `predict`, `explain`, `monitor`, `reading-room`."""
