"""Whether the images that arrive are still like those that a model was made for."""
