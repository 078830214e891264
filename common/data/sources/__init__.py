"""Readers of the layouts that chest X-ray collections come in; each gives a manifest and a report of what was left out."""
