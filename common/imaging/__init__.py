"""Radiographs as greyscale arrays: reading of DICOM, JPEG and PNG, scaling, and augmentation."""
