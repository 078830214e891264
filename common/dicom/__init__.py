"""DICOM radiographs as greyscale arrays: the one door to pydicom and its decoders."""
