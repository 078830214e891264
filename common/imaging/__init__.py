"""Radiographs as greyscale arrays: the one door to pydicom, its decoders and Pillow."""
