"""Phantoms: drawn patients, their radiographs and scanners, and drawn images that are no radiographs."""
