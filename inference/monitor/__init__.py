"""Drift: whether the images that arrive are still like those that the model was made for, watched from day to day."""
