"""Answers as DICOM objects for the hospital's archive: a Structured Report and a secondary capture."""
