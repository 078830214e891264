"""`pneumofed predict`: files in, one result for each out, whatever the files are."""
