"""A judged image as a DICOM Secondary Capture: the heat map burnt over the image (PS3.3, A.8.1)."""

from __future__ import annotations

import numpy as np
from highdicom.sc import SCImage
from highdicom.uid import UID
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from client.predict.archive.identity import (
    MANUFACTURER,
    SERIES_DESCRIPTION,
    SERIES_NUMBERS,
    series_uid,
    software_versions,
)
from client.predict.heat import STATEMENT
from common.model_bundle.predictor import Predictor


def make_capture(source: Dataset, picture: np.ndarray, predictor: Predictor) -> Dataset:
    """A Secondary Capture of `picture` uint8 [H, W, 3], in the study and of the patient of `source`, in a series of its own.

    Args:
        source: of `read_source_header`.
        picture: of `draw_heat`.
        predictor: that judged it.

    Raises:
        ValueError, TypeError, AttributeError: the source's header does not allow it.
    """
    capture = SCImage.from_ref_dataset(
        ref_dataset=source,
        pixel_array=np.ascontiguousarray(picture),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        series_instance_uid=series_uid(source, predictor, "SC"),
        series_number=SERIES_NUMBERS["SC"],
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=SERIES_DESCRIPTION,
        manufacturer_model_name=predictor.manifest.name,
        software_versions=software_versions(predictor),
    )
    # Type 2C (PS3.3, C.7.6.1.1.1): highdicom asks for one, but only the source can tell.
    capture.PatientOrientation = source.get("PatientOrientation")
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ImageComments = STATEMENT
    capture.DerivationDescription = f"heat map of {predictor.manifest.name}, bundle {predictor.bundle.digest}"
    capture.SourceImageSequence = [_reference(source)]
    if (
        source.get("BurnedInAnnotation") == "NO"
    ):  # (0028,0301): our words name no patient, but what the source shows is still there
        capture.BurnedInAnnotation = "NO"
    capture.LossyImageCompression = source.get("LossyImageCompression") or "00"
    return capture


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    return item
