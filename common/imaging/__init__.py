"""Radiographs as greyscale arrays: reading of DICOM, JPEG, PNG, TIFF, BMP and WebP, scaling, and augmentation."""
