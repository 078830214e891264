"""Files in, one answer for each out, whatever the files are; as table, CSV, JSON and DICOM objects."""
