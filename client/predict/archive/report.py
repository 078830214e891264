"""A judgement as a DICOM Structured Report: TID 1500, Measurement Report (PS3.16, annex A)."""

from __future__ import annotations

from highdicom import sr
from highdicom.sr.coding import CodedConcept
from highdicom.uid import UID
from pydicom.dataset import Dataset

from client.predict.archive.identity import (
    MANUFACTURER,
    SERIES_DESCRIPTION,
    SERIES_NUMBERS,
    model_uid,
    series_uid,
    software_versions,
)
from common.model_bundle.judgement import Judgement
from common.model_bundle.predictor import Predictor

PNEUMONIA = CodedConcept("233604007", "SCT", "Pneumonia")
PRESENCE = CodedConcept("705057003", "SCT", "Presence")
PRESENT = CodedConcept("52101004", "SCT", "Present")
ABSENT = CodedConcept("272519000", "SCT", "Absent")
UNDETERMINED = CodedConcept("373068000", "SCT", "Undetermined")
"""The last three are of CID 240, Present-Absent."""
PROBABILITY = CodedConcept("122157", "DCM", "Probability")
LOWER = CodedConcept("probability-low", "99PNEUMOFED", "Lower limit of the 95 % interval of the probability")
UPPER = CodedConcept("probability-high", "99PNEUMOFED", "Upper limit of the 95 % interval of the probability")
THRESHOLD = CodedConcept("122411", "DCM", "Threshold Value")
PERCENT = CodedConcept("%", "UCUM", "Percent")
LUNG = CodedConcept("39607008", "SCT", "Lung")
_CHEST_RADIOGRAPHY = CodedConcept("399208008", "SCT", "Plain X-ray of chest")
_DEVICE = CodedConcept("121007", "DCM", "Device")
_COMMENT = CodedConcept("121106", "DCM", "Comment")
_NOT_A_DIAGNOSIS = (
    "Result of a computer program as a second look, not a diagnosis and not for primary diagnosis. "
    "It was not verified by a physician."
)


def make_report(source: Dataset, judgement: Judgement, predictor: Predictor) -> Dataset:
    """An Enhanced SR about `source`, in its study and of its patient, in a series of its own; incomplete to all and unverified.

    One measurement group with the finding pneumonia: its presence (present, absent, or undetermined where the image cannot be
    judged), and if it can the calibrated probability with its interval and the threshold, each in percent. The algorithm is named by
    the bundle's name and digest, the image by its SOP Instance UID.

    Args:
        source: of `read_source_header`.
        judgement: of the same image.
        predictor: that judged it.

    Raises:
        ValueError, TypeError, AttributeError: the source's header does not allow it.
    """
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_observer(predictor)),
        procedure_reported=_CHEST_RADIOGRAPHY,
        imaging_measurements=[_measurements(source, judgement, predictor)],
        title=CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    for text in _comments(judgement, predictor):
        content[0].ContentSequence.append(
            sr.TextContentItem(name=_COMMENT, value=text, relationship_type=sr.RelationshipTypeValues.CONTAINS)
        )
    return sr.EnhancedSR(
        evidence=[source],
        content=content[0],
        series_instance_uid=series_uid(source, predictor, "SR"),
        series_number=SERIES_NUMBERS["SR"],
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,  # preliminary: no person has read it
        is_verified=False,
        series_description=SERIES_DESCRIPTION,
        manufacturer_model_name=predictor.manifest.name,
        software_versions=software_versions(predictor),
    )


def _observer(predictor: Predictor) -> sr.ObserverContext:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=model_uid(predictor), name="pneumofed", manufacturer_name=MANUFACTURER, model_name=predictor.manifest.name
    )
    return sr.ObserverContext(observer_type=_DEVICE, observer_identifying_attributes=device)


def _measurements(source: Dataset, judgement: Judgement, predictor: Predictor) -> sr.MeasurementsAndQualitativeEvaluations:
    presence = {"pneumonia": PRESENT, "normal": ABSENT}.get(judgement.verdict, UNDETERMINED)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=UID(), identifier="Image as a whole"),
        finding_type=PNEUMONIA,
        algorithm_id=_algorithm(predictor),
        finding_sites=[sr.FindingSite(anatomic_location=LUNG)],
        measurements=_numbers(judgement),
        qualitative_evaluations=[sr.QualitativeEvaluation(name=PRESENCE, value=presence)],
        source_images=[sr.SourceImageForMeasurementGroup.from_source_image(source)],
    )


def _algorithm(predictor: Predictor) -> sr.AlgorithmIdentification:
    """TID 4019: name, version, and what else decides the numbers."""
    manifest = predictor.manifest
    return sr.AlgorithmIdentification(
        name=manifest.name,
        version=predictor.bundle.digest,
        manufacturer=MANUFACTURER,
        parameters=[
            f"threshold policy: {manifest.threshold.policy}",
            f"calibration: {manifest.calibration.method}",
            f"network: {manifest.model.name}, {manifest.preprocessing.size_px} pixels",
        ],
    )


def _numbers(judgement: Judgement) -> list[sr.Measurement]:
    found = judgement.prediction
    if found is None:
        return []
    values = ((PROBABILITY, found.probability), (LOWER, found.low), (UPPER, found.high), (THRESHOLD, judgement.threshold))
    return [sr.Measurement(name=name, value=round(100 * value, 4), unit=PERCENT) for name, value in values]


def _comments(judgement: Judgement, predictor: Predictor) -> list[str]:
    texts = [_NOT_A_DIAGNOSIS]
    if judgement.reasons:
        texts.append(f"The image cannot be judged: {judgement.explanation}.")
    if predictor.manifest.card.phantom:
        texts.append("The model was trained on PHANTOMS: it says nothing about patients.")
    return texts
