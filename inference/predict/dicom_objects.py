"""DICOM objects for the archive, written beside the table of results: reports, and heat maps.

`ArchiveWriter` writes what the user asked for. `make_report` builds a Structured Report by TID 1500, Measurement Report (PS3.16, annex A);
`make_capture` a Secondary Capture with the heat map burnt over the image (PS3.3, A.8.1); a file that is not DICOM gets its map as PNG.
`make_parametric_map` builds the map of a CT series, on the planes of its slices (PS3.3, A.75). `read_source_header` reads the judged
image's header, complete enough to derive objects from, `read_source_headers` those of a series. `series_uid`, `model_uid` and
`software_versions` identify who made the objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence, VOILUTTransformation, sr
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.sc import SCImage
from highdicom.sr.coding import CodedConcept
from highdicom.uid import UID
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from pneumofed.common.config.classes import positive_word
from pneumofed.common.errors import ConfigError, ImageError
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.ct_series import order_ct_slices
from pneumofed.common.imaging.dicom_header import read_header
from pneumofed.common.imaging.dicom_tags import quiet_warnings
from pneumofed.common.imaging.volumes import make_affine, read_volume, turn_back
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.ops.study_code import describe_name
from pneumofed.inference.predict.dicom_contents import STATEMENT, UTF8, copy_as_utf8, list_axial_slices, slice_numbers
from pneumofed.inference.predict.predict import FileResult

NOTE_NOT_DICOM = "no report: the image is no DICOM file"
NOTE_NO_MAP = "no heat map: this network has none"
_NOTE_HEADER = "not written: the image's header does not allow it"

PNEUMONIA = CodedConcept("233604007", "SCT", "Pneumonia")
FINDING = CodedConcept("118247008", "SCT", "Radiologic finding")
"""Where the model's classes are not only pneumonias: any of them but normal."""
PRESENCE = CodedConcept("705057003", "SCT", "Presence")
PRESENT = CodedConcept("52101004", "SCT", "Present")
ABSENT = CodedConcept("272519000", "SCT", "Absent")
UNDETERMINED = CodedConcept("373068000", "SCT", "Undetermined")
"""The last three are of CID 240, Present-Absent."""
PROBABILITY = CodedConcept("122157", "DCM", "Probability")
PROBABILITY_LOW = CodedConcept("probability-low", "99PNEUMOFED", "Lower limit of the 95 % interval of the probability")
PROBABILITY_HIGH = CodedConcept("probability-high", "99PNEUMOFED", "Upper limit of the 95 % interval of the probability")
THRESHOLD = CodedConcept("122411", "DCM", "Threshold Value")
PERCENT = CodedConcept("%", "UCUM", "Percent")
LUNG = CodedConcept("39607008", "SCT", "Lung")
_CHEST_RADIOGRAPHY = CodedConcept("399208008", "SCT", "Plain X-ray of chest")
_CHEST_CT = CodedConcept("169069000", "SCT", "CT of chest")
EVIDENCE = CodedConcept("map-of-evidence", "99PNEUMOFED", "Map of evidence for a finding by a neural network")
_NO_UNIT = CodedConcept("1", "UCUM", "no units")
_DEVICE = CodedConcept("121007", "DCM", "Device")
_COMMENT = CodedConcept("121106", "DCM", "Comment")
_NOT_A_DIAGNOSIS = (
    "Result of a computer program as a second look, not a diagnosis and not for primary diagnosis. "
    "It was not verified by a physician."
)

_REQUIRED_TAGS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
"""Type 1 of the Study, Series and SOP Common modules (PS3.3, C.7.2.1, C.7.3.1, C.12.1): nothing can refer to an image without them."""
_EMPTY_IF_MISSING = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
"""Type 2 of the Patient and General Study modules (PS3.3, C.7.1.1 and C.7.2.1): empty where the source lacks them."""

MANUFACTURER = "pneumofed"
SERIES_DESCRIPTION = "AI result, not for primary diagnosis"
SERIES_NUMBERS = {"SR": 9401, "SC": 9402, "OT": 9403}
"""Series Number (0020,0011) separates series of a study for people; scanners count from 1."""


class ArchiveWriter:
    """Writes the objects of one result after the other; one that cannot be made is noted in its result and stops nothing.

    DICOM objects are named by their SOP Instance UID, pictures by the source's name and a hash of its path; mode 0600.
    """

    def __init__(self, predictor: Predictor, reports: Path | None, overlays: Path | None) -> None:
        """
        Args:
            predictor: whose judgements they are.
            reports: folder for Structured Reports, made if missing; None for none.
            overlays: folder for heat maps, likewise.

        Raises:
            ConfigError: a folder cannot be made.
        """
        self._predictor, self._reports, self._overlays = predictor, reports, overlays
        for folder in filter(None, (reports, overlays)):
            _make_folder(folder)

    def write(self, result: FileResult) -> FileResult:
        """Writes the objects of `result` and returns it with the names of the files, or a note why one was not written.

        Raises:
            ConfigError: a file cannot be written: the disk is full, or the folder is gone.
        """
        if result.judgement is None:
            return result
        try:
            return self._write_overlay(self._write_report(result, result.judgement), result.judgement)
        except OSError as error:
            raise ConfigError(f"results cannot be written ({error.strerror}); free some space, or give another folder") from None

    def _write_report(self, result: FileResult, judgement: Judgement) -> FileResult:
        if self._reports is None:
            return result
        if not result.loaded.instance:
            return replace(result, note=_join(result.note, NOTE_NOT_DICOM))

        try:
            report = make_report(read_source_headers(result.loaded.path), judgement, self._predictor)
        except (ImageError, ValueError, TypeError, AttributeError, KeyError) as error:
            return replace(result, note=_join(result.note, f"report {_NOTE_HEADER}", type(error).__name__))
        return replace(result, report=str(_save(report, self._reports)))

    def _write_overlay(self, result: FileResult, judgement: Judgement) -> FileResult:
        if self._overlays is None or judgement.prediction is None:
            return result
        if judgement.prediction.activation_map is None:
            return replace(result, note=_join(result.note, NOTE_NO_MAP))
        try:
            return replace(result, overlay=str(self._draw(result, judgement, self._overlays)))
        except (ImageError, ValueError, TypeError, AttributeError, KeyError) as error:
            return replace(result, note=_join(result.note, f"heat map {_NOTE_HEADER}", type(error).__name__))

    def _draw(self, result: FileResult, judgement: Judgement, folder: Path) -> Path:
        from pneumofed.inference.predict.dicom_contents import draw_heat

        path = result.loaded.path
        if self._predictor.takes_volumes:
            picture, sources = self._draw_slices(result, judgement)
        else:
            picture = draw_heat(self._predictor.read(path).image.pixels, judgement, self._predictor)
            sources = [read_source_header(path)] if result.loaded.instance else []
        if sources:
            return _save(make_capture(sources, picture, self._predictor), folder)
        import PIL.Image

        target = folder / f"{path.stem}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}.png"
        with atomic_write(target) as file:
            PIL.Image.fromarray(picture).save(file, "PNG")
        return target

    def _draw_slices(self, result: FileResult, judgement: Judgement) -> tuple[np.ndarray, list[Dataset]]:
        """The picture, and the headers of the slices in it; where they are not axial that of the series' first slice, of NIfTI none."""
        from pneumofed.inference.predict.dicom_contents import draw_slice_heat

        path = result.loaded.path
        slices = list_axial_slices(path) if result.loaded.instance else []
        picture, shown = draw_slice_heat(read_volume(path), slice_numbers(slices), judgement, self._predictor)
        if not slices:
            return picture, read_source_headers(path)[:1] if result.loaded.instance else []
        return picture, [read_source_header(one) for one in dict.fromkeys(slices[place].path for place in shown)]


def _save(dataset: Dataset, folder: Path) -> Path:
    target = folder / f"{dataset.SOPInstanceUID}.dcm"
    with atomic_write(target) as file:
        dataset.save_as(file, enforce_file_format=True)
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); give a folder that can be written") from None


def _join(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def make_report(sources: Sequence[Dataset], judgement: Judgement, predictor: Predictor) -> Dataset:
    """Builds an Enhanced SR about `sources`, in their study and of their patient, in a series of its own; preliminary and unverified.

    One measurement group with the finding pneumonia (of own classes: radiologic finding, with the probability of each class): its
    presence (present, absent, or undetermined where the image cannot be judged), and if it can the calibrated probability with its
    interval and the threshold, each in percent. The algorithm is named by the bundle's name and digest, the image, or each slice of a CT
    series, by its SOP Instance UID.

    Args:
        sources: of `read_source_headers`.
        judgement: of the same image.
        predictor: that judged it.

    Raises:
        ValueError, TypeError, AttributeError: the source's header does not allow it.
    """
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_observer(predictor)),
        procedure_reported=_CHEST_CT if predictor.takes_volumes else _CHEST_RADIOGRAPHY,
        imaging_measurements=[_measurements(sources, judgement, predictor)],
        title=CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    for text in _comments(judgement, predictor):
        content[0].ContentSequence.append(
            sr.TextContentItem(name=_COMMENT, value=text, relationship_type=sr.RelationshipTypeValues.CONTAINS)
        )
    return sr.EnhancedSR(
        evidence=list(sources),
        content=content[0],
        series_instance_uid=series_uid(sources[0], predictor, "SR"),
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
        specific_character_set=UTF8,
    )


def _observer(predictor: Predictor) -> sr.ObserverContext:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=model_uid(predictor), name="pneumofed", manufacturer_name=MANUFACTURER, model_name=predictor.manifest.name
    )
    return sr.ObserverContext(observer_type=_DEVICE, observer_identifying_attributes=device)


def _measurements(
    sources: Sequence[Dataset], judgement: Judgement, predictor: Predictor
) -> sr.MeasurementsAndQualitativeEvaluations:
    presence = {"pneumonia": PRESENT, "finding": PRESENT, "normal": ABSENT}.get(judgement.verdict, UNDETERMINED)
    positive = positive_word(predictor.manifest.classes)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=UID(), identifier=f"{'Series' if predictor.takes_volumes else 'Image'} as a whole"
        ),
        finding_type=PNEUMONIA if positive == "pneumonia" else FINDING,
        algorithm_id=_algorithm(predictor),
        finding_sites=[sr.FindingSite(anatomic_location=LUNG)],
        measurements=_numbers(judgement),
        qualitative_evaluations=[sr.QualitativeEvaluation(name=PRESENCE, value=presence)],
        source_images=[sr.SourceImageForMeasurementGroup.from_source_image(source) for source in sources],
    )


def _algorithm(predictor: Predictor) -> sr.AlgorithmIdentification:
    """TID 4019: name, version, and what else decides the numbers."""
    manifest = predictor.manifest
    slices = f"{manifest.preprocessing.slices} slices of " * predictor.takes_volumes
    whose = f", on patients of {manifest.threshold.site}" if manifest.threshold.site else ""
    return sr.AlgorithmIdentification(
        name=manifest.name,
        version=predictor.bundle.digest,
        manufacturer=MANUFACTURER,
        parameters=[
            f"threshold policy: {manifest.threshold.policy}{whose}",
            f"calibration: {manifest.calibration.method}",
            f"network: {describe_name(manifest.model.name)}, {slices}{manifest.preprocessing.size_px} pixels",
        ],
    )


def _numbers(judgement: Judgement) -> list[sr.Measurement]:
    found = judgement.prediction
    if found is None:
        return []
    values = (
        (PROBABILITY, found.probability),
        (PROBABILITY_LOW, found.low),
        (PROBABILITY_HIGH, found.high),
        (THRESHOLD, judgement.threshold),
    )
    measured = [sr.Measurement(name=name, value=round(100 * value, 4), unit=PERCENT) for name, value in values]
    if positive_word(tuple(found.classes)) == "finding":
        measured += [
            sr.Measurement(name=_class_concept(k, name), value=round(100 * value, 4), unit=PERCENT)
            for k, (name, value) in enumerate(found.classes.items())
        ]
    return measured


def _class_concept(k: int, name: str) -> CodedConcept:
    """A class has a code of the bundle's own: which disease a study means by its word, no code of a standard says."""
    return CodedConcept(f"class-{k}", "99PNEUMOFED", f"Probability of the class {name}")


def _comments(judgement: Judgement, predictor: Predictor) -> list[str]:
    texts = [_NOT_A_DIAGNOSIS, f"Population: {judgement.population.sentence}."]
    if judgement.reasons:
        texts.append(f"The image cannot be judged: {judgement.explanation}.")
    if predictor.manifest.card.phantom:
        texts.append("The model was trained on PHANTOMS: it says nothing about patients.")
    return texts


def make_capture(sources: Sequence[Dataset], picture: np.ndarray, predictor: Predictor) -> Dataset:
    """Builds a Secondary Capture of `picture` uint8 [H, W, 3], in the study and of the patient of `sources`, in a series of its own.

    Args:
        sources: of `read_source_header`, the images in the picture.
        picture: of `draw_heat`, or of slices of a CT series of `draw_slice_heat`.
        predictor: that judged it.

    Raises:
        ValueError, TypeError, AttributeError: the source's header does not allow it.
    """
    source = sources[0]
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
        specific_character_set=UTF8,
    )
    # Type 2C (PS3.3, C.7.6.1.1.1): highdicom asks for one, but only the source knows it.
    capture.PatientOrientation = ["L", "P"] if predictor.takes_volumes else source.get("PatientOrientation")
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ImageComments = STATEMENT
    capture.DerivationDescription = f"heat map of {predictor.manifest.name}, bundle {predictor.bundle.digest}"
    capture.SourceImageSequence = [_reference(one) for one in sources]
    # (0028,0301): our words name no patient, but what the source shows is still there.
    if all(one.get("BurnedInAnnotation") == "NO" for one in sources):
        capture.BurnedInAnnotation = "NO"
    capture.LossyImageCompression = source.get("LossyImageCompression") or "00"
    return capture


@dataclass(frozen=True)
class MapScale:
    """What the stored numbers of a map mean.

    Attributes:
        step: value of one stored step.
        title: of the method that made the map.
    """

    step: float
    title: str


def make_parametric_map(path: Path, stored: np.ndarray, affine: np.ndarray, scale: MapScale, predictor: Predictor) -> Dataset:
    """Builds a Parametric Map on the planes of the CT series at `path`, a frame a slice, each with a reference to its own; in the study and
    of the patient of the series, in a series of its own, for research only.

    Args:
        path: of the series.
        stored: uint8 [slices, rows, columns], on the axes of its `Volume`.
        affine: of that volume.
        scale: what `stored` means; the real-world value is its step times the stored one.
        predictor: that judged it.

    Raises:
        ImageError: the series cannot be used any more.
        ValueError, TypeError, AttributeError: its headers do not allow it.
    """
    slices, step, _ = order_ct_slices(path)
    sources, first = read_source_headers(path), slices[0]
    down, across = (float(value) for value in first.spacing)
    if "NumberOfFrames" not in sources[0]:  # SliceThickness (0018,0050) is of type 2, and highdicom reads it of the first
        sources[0].SliceThickness = sources[0].get("SliceThickness") or step
    made = ParametricMap(
        source_images=sources,
        pixel_array=np.ascontiguousarray(
            turn_back(stored, affine, make_affine(first.directions, (step, down, across), first.position))
        ),
        series_instance_uid=series_uid(sources[0], predictor, "OT"),
        series_number=SERIES_NUMBERS["OT"],
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=predictor.manifest.name,
        software_versions=f"pneumofed {version('pneumofed')}",
        device_serial_number=predictor.bundle.digest,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[_mapping(scale)],
        voi_lut_transformations=[VOILUTTransformation(window_center=127.5, window_width=255.0)],
        pixel_measures=PixelMeasuresSequence((down, across), step, step),
        plane_orientation=PlaneOrientationSequence("PATIENT", first.orientation.tolist()),
        plane_positions=[PlanePositionSequence("PATIENT", one.position.tolist()) for one in slices],
        content_label="EVIDENCE",
        content_description=f"{scale.title}; {STATEMENT}",
        series_description=SERIES_DESCRIPTION,
        specific_character_set=UTF8,
    )
    made.DerivationDescription = f"{scale.title} of {predictor.manifest.name}, bundle {predictor.bundle.digest}"
    return made


def _mapping(scale: MapScale) -> RealWorldValueMapping:
    return RealWorldValueMapping(
        lut_label="EVIDENCE",
        lut_explanation=scale.title,
        unit=_NO_UNIT,
        value_range=(0, 255),
        slope=scale.step,
        intercept=0.0,
        quantity_definition=EVIDENCE,
    )


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    return item


def read_source_header(path: Path) -> Dataset:
    """Reads the header of the DICOM file `path` without its pixels, in UTF-8; tags of type 2 that it lacks or that cannot be read are
    there and empty.

    Raises:
        ImageError: the file is no DICOM file any more.
        ValueError: it lacks a UID that a derived object must name; the text holds only the tag's keyword.
    """
    read_header(path)  # checks the size of a deflated header first
    with quiet_warnings():
        dataset = dcmread(path, stop_before_pixels=True, force=True)
    for keyword in _REQUIRED_TAGS:
        if not uid.UID(str(dataset.get(keyword) or "")).is_valid:
            raise ValueError(f"the image has no valid {keyword}")
    with quiet_warnings():
        copy_as_utf8(dataset, _EMPTY_IF_MISSING)
    return dataset


def read_source_headers(path: Path) -> list[Dataset]:
    """Reads, as `read_source_header`, the header of the DICOM file `path`, or of each file that has a part in the CT series in the folder
    `path`, in the order of `order_ct_slices`.

    Raises:
        ImageError: the file is no DICOM file, or the series cannot be used.
        ValueError: one lacks a UID that a derived object must name.
    """
    files = dict.fromkeys(one.path for one in order_ct_slices(path)[0]) if path.is_dir() else [path]
    return [read_source_header(file) for file in files]


def series_uid(source: Dataset, predictor: Predictor, kind: str) -> UID:
    """Computes the Series Instance UID of all objects of one kind by one model in one study: a repeated run adds to the same series.

    Args:
        source: header of the judged image; only its Study Instance UID counts.
        predictor: whose bundle's digest counts.
        kind: key of `SERIES_NUMBERS`.
    """
    return _hashed_uid("series", source.StudyInstanceUID, predictor.bundle.digest, kind)


def model_uid(predictor: Predictor) -> UID:
    """Computes the device's UID (121012, DCM): the same for the same bundle."""
    return _hashed_uid("model", predictor.bundle.digest)


def software_versions(predictor: Predictor) -> list[str]:
    """Lists Software Versions (0018,1020): of this program, and the bundle's digest as one Long String."""
    return [f"pneumofed {version('pneumofed')}", f"bundle {predictor.bundle.digest[:48]}"]


def _hashed_uid(*parts: str) -> UID:
    """A UID below 2.25, made of a UUID (PS3.5, B.2) of version 8 (RFC 9562, 5.8); the same for the same parts."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    bits = int.from_bytes(digest[:16], "big") & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
    return UID(f"2.25.{bits}")
