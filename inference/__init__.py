"""What a hospital does with a finished model: predict, explain, monitor, read. Never part of the code that a federation ships."""
