"""`pneumofed predict`: files in, one answer for each out, whatever the files are."""
