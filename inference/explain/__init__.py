"""Why the model says what it says: maps of evidence over a radiograph, and whether they can be believed."""
