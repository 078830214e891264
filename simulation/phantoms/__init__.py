"""Drawn patients and their radiographs, and images that are none."""
