"""A finished model: `open_bundle(...).predict(...)` needs ONNX Runtime and no torch; `explain` needs torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import numpy.typing as npt

from pneumofed.common.config.classes import positive_word
from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.errors import ArgumentError, DataError, ImageError, SkipReason
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.bundle import Bundle, open_trusted
from pneumofed.common.model_bundle.manifest import CARD, BundleManifest
from pneumofed.common.model_bundle.population import PopulationFinding
from pneumofed.common.model_bundle.predictor import BATCH, Predictor, model_input
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.release import use_site_point
from pneumofed.images import ImageLike, to_image
from pneumofed.inference.explain.methods import Detail, Method, choose_detail, choose_methods, choose_target
from pneumofed.inference.predict.clinical_table import values_of
from pneumofed.inference.predict.predict import NOT_OF_THE_KIND, map_ahead

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from pneumofed.inference.explain.clinical import JointEvidence
    from pneumofed.inference.explain.files import ExplainedMap, ExplanationRequest
    from pneumofed.inference.explain.volumes import ExplainedVolume


Status = Literal["judged", "cannot judge", "unreadable"]
PatientValues = Mapping[str, Any]
"""Clinical values of one patient by the names of the model's columns: numbers in its units, yes or no as bool or word, codes as words."""


@dataclass(frozen=True)
class ImageAnswer:
    """What the model says of one image. What is not judged has no finding and no number that anyone might read as one.

    Attributes:
        status: whether the image was judged, must not be judged by this model, or could not be read.
        finding: the decision at the bundle's threshold; None unless judged, as the next four.
            `finding` stands for any class but normal where they are not only pneumonias.
        probability: calibrated P(pneumonia), or of all classes but normal together.
        low, high: its 95 % interval.
        classes: calibrated probability of each class; empty unless judged.
        likeliest: `normal`, or the most probable of the other classes, as the finding is; None unless judged.
        threshold: the finding is pneumonia if the probability is at least this.
        reasons: fixed words that say why it is not judged, as in docs/predict.md; empty if judged.
        explanation: the same in plain English.
        scores: p-values of the suitability tests, by name.
        population: whether the model was judged for such a patient; None where the image could not be read. Show its `sentence`.
        image_only: calibrated P(pneumonia) of the image without the clinical values that were given; None where none were.
    """

    status: Status
    threshold: float
    finding: Literal["pneumonia", "finding", "normal"] | None = None
    probability: float | None = None
    low: float | None = None
    high: float | None = None
    classes: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    explanation: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    population: PopulationFinding | None = None
    image_only: float | None = None
    likeliest: str | None = None


class ModelBundle:
    """An opened bundle, ready to judge images; `open_bundle` makes it. May be used by several threads at once."""

    def __init__(self, bundle: Bundle, predictor: Predictor, run_code: bool = False) -> None:
        self.bundle = bundle
        self.predictor = predictor
        self.run_code = run_code

    def __repr__(self) -> str:
        return f"ModelBundle({self.name!r}, classes={self.classes}, image_size={self.image_size}, digest={self.digest[:12]!r})"

    @property
    def manifest(self) -> BundleManifest:
        """All that stands in `bundle.json`."""
        return self.bundle.manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the network's outputs; the first is normal."""
        return self.manifest.classes

    @property
    def threshold(self) -> float:
        """The finding is pneumonia if the calibrated probability is at least this."""
        return self.manifest.threshold.value

    @property
    def image_size(self) -> int:
        """Side of the square that the network sees, in pixels."""
        return self.manifest.preprocessing.size_px

    @property
    def takes_volumes(self) -> bool:
        """Whether it judges CT volumes in place of radiographs."""
        return self.predictor.takes_volumes

    @property
    def digest(self) -> str:
        """SHA-256 that names the model in audit logs and reports."""
        return self.bundle.digest

    @property
    def signer(self) -> str:
        """Fingerprint of the key that signed it."""
        return self.bundle.signer

    @property
    def card(self) -> str:
        """The model card, Markdown. `manifest.card` has its facts as a record."""
        return self.bundle.read(CARD).decode("utf-8")

    @property
    def clinical(self) -> ClinicalConfig | None:
        """The clinical values that the model takes beside an image, with their units and ranges; None where it takes none."""
        return self.predictor.clinical

    @overload
    def predict(  # type: ignore[overload-overlap]  # str is a sequence too
        self, images: ImageLike, clinical: PatientValues | None = None
    ) -> ImageAnswer: ...
    @overload
    def predict(
        self, images: Sequence[ImageLike], clinical: Sequence[PatientValues | None] | None = None
    ) -> list[ImageAnswer]: ...
    def predict(self, images: Any, clinical: Any = None) -> ImageAnswer | list[ImageAnswer]:
        """Judges one image, or each of a list of images, which may be of different kinds.

        Args:
            images: path, array, Pillow picture, pydicom data set (see `pneumofed.images.to_image`), or a sequence of them. Of a model for
                CT (`takes_volumes`) the path of a series' folder, a multi-frame DICOM or a NIfTI file, or a
                `pneumofed.common.imaging.volumes.Volume`.
            clinical: values of the patient by name, such as `{"temperature": 38.6, "cough": True}`, or one such for each of the images;
                what is not named, or None, is not known. Without any the image is judged by itself.

        Returns:
            One answer, or a list of them in the order of `images`. A file that cannot be read gets an answer too, with the
            status `unreadable`, so that one bad file does not end a long list.

        Raises:
            ArgumentError: a value is no image; the text says which one of the list. Or a clinical value does not fit, is no column of the
                model, or the model takes none.
        """
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            given = [None] * len(images) if clinical is None else list(clinical)
            if len(given) != len(images) or isinstance(clinical, Mapping):
                raise ArgumentError(f"clinical: expected values for each of {len(images)} images, in their order")
            return list(self._predict_all(images, [self.read_values(one) for one in given]))
        return self._answer([self._load(images)], [self.read_values(clinical)])[0]

    def read_values(self, given: PatientValues | None) -> npt.NDArray[np.float32] | None:
        """Reads the clinical values of one patient as the network takes them, float32 [K]; None where none is known.

        Raises:
            ArgumentError: as `predict`.
        """
        if not given:
            return None
        if self.clinical is None:
            raise ArgumentError("clinical: this model takes no clinical values")
        try:
            return values_of(given, self.clinical)
        except DataError as error:
            raise ArgumentError(str(error)) from None

    def _predict_all(
        self, images: Sequence[ImageLike], values: Sequence[npt.NDArray[np.float32] | None]
    ) -> Iterator[ImageAnswer]:
        threads = os.cpu_count() or 1
        loaded, known = map_ahead(self._load_numbered, enumerate(images), threads, ahead=BATCH + 2 * threads), iter(values)
        while batch := list(islice(loaded, BATCH)):
            yield from self._answer(batch, list(islice(known, len(batch))))

    def _load_numbered(self, item: tuple[int, ImageLike]) -> Image | SkipReason:
        number, image = item
        try:
            return self._load(image)
        except ArgumentError as error:
            raise ArgumentError(f"images[{number}]: {error}") from None

    def _load(self, image: ImageLike) -> Image | SkipReason:
        """The image, made small at once so that a long list takes little memory; or why it cannot be read."""
        try:
            if self.predictor.takes_volumes:
                return to_volume(image, self.predictor)
            found = to_image(image, self.predictor.window)
        except ImageError as error:
            return error.reason
        return replace(found, pixels=model_input(found.pixels, self.manifest.preprocessing))

    def _answer(self, batch: Sequence[Image | SkipReason], values: Sequence[npt.NDArray[np.float32] | None]) -> list[ImageAnswer]:
        pairs = [(image, known) for image, known in zip(batch, values, strict=True) if isinstance(image, Image)]
        judged = iter(self.predictor.judge([image for image, _ in pairs], values=[known for _, known in pairs]))
        return [describe(next(judged) if isinstance(image, Image) else image, self.threshold) for image in batch]

    @cached_property
    def network(self) -> nn.Module:
        """The PyTorch network in evaluation mode. One of a study's own needs `open_bundle(..., run_code=True)`."""
        return self.bundle.load_network(run_code=self.run_code)


def open_bundle(
    path: str | PathLike[str],
    *,
    trusted: Sequence[str | PathLike[str]] = (),
    precision: Literal["float32", "int8"] = "float32",
    threads: int = 0,
    run_code: bool = False,
    operating_point: str | PathLike[str] | None = None,
) -> ModelBundle:
    """Opens the bundle at `path`, once its signature and every file of it were checked.

    Args:
        path: folder or archive that `pneumofed export` wrote.
        trusted: public keys whose signature is taken; empty takes any (`ModelBundle.signer` says whose it is).
        precision: which of the bundle's two networks judges.
        threads: of the network; 0 leaves the choice to ONNX Runtime.
        run_code: consent to run the bundle's own code, which `explain` and `network` need where the network is a study's own; `predict`
            never runs any.
        operating_point: file of a hospital's own threshold (`pneumofed site operating-point`); None decides at the bundle's.

    Raises:
        BundleError: it is missing, damaged, changed, of a newer format, or signed by a stranger.
        ReleaseError: the operating point is missing, damaged, or of another bundle.
        ConfigError: a key cannot be read.
    """
    if precision not in ("float32", "int8"):
        raise ArgumentError(f"precision: expected 'float32' or 'int8', got {precision!r}")
    bundle = open_trusted(Path(path), [Path(key) for key in trusted])
    if operating_point is not None:
        bundle = use_site_point(bundle, Path(operating_point))
    return ModelBundle(bundle, Predictor(bundle, precision, threads), run_code)


def describe(found: Judgement | SkipReason, threshold: float) -> ImageAnswer:
    """Returns the answer for an image that was judged or refused, or that cannot be read.

    Args:
        found: what the predictor gave, or why there was nothing to give it.
        threshold: of the bundle.
    """
    if isinstance(found, SkipReason):
        status: Status = "cannot judge" if found in NOT_OF_THE_KIND else "unreadable"
        return ImageAnswer(status, threshold, reasons=(found.name.lower(),), explanation=found.value)
    answer = found.prediction
    if answer is None:
        reasons = tuple(reason.value for reason in found.reasons)
        return ImageAnswer(
            "cannot judge",
            threshold,
            reasons=reasons,
            explanation=found.explanation,
            scores=found.suitability,
            population=found.population,
        )
    return ImageAnswer(
        "judged",
        threshold,
        finding=answer.decision,
        probability=answer.probability,
        low=answer.low,
        high=answer.high,
        classes=answer.classes,
        scores=found.suitability,
        population=found.population,
        image_only=answer.image_only,
        likeliest=answer.likeliest,
    )


def to_volume(value: Any, predictor: Predictor) -> Image:
    """Reads a CT volume as the model takes it.

    Args:
        value: path of a series' folder, a multi-frame DICOM or a NIfTI file; or a `Volume`.
        predictor: of the bundle.

    Raises:
        ArgumentError: it is neither.
        ImageError: it cannot be used, or is no CT.
    """
    if isinstance(value, str | PathLike):
        return predictor.read(Path(value)).image
    from pneumofed.common.imaging.volumes import Volume
    from pneumofed.common.model_bundle.series import as_input

    if not isinstance(value, Volume):
        raise ArgumentError(
            f"image: this model judges CT volumes: expected the path of a series' folder or a NIfTI file, got {type(value).__name__}"
        )
    return as_input(value, predictor.manifest.preprocessing.image)


_OF_A_RADIOGRAPH = "this explanation is of a radiograph: its map is `map`, and its picture is saved as .png or .svg"
_TRUSTED = {"depends on the weights": True, "does not depend on the weights": False, "open": None}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where in one image the model finds its evidence, and whether the map can be believed; a picture in a notebook.

    Attributes:
        map: float32 [S, S] over the square that the network saw, of a CT volume [slices, S, S] over its grid; above zero speaks for the
            target.
        method: that made it.
        target: what the evidence is for.
        judgement: of the image.
        trusted: True if the map depends on what the network has learnt and nothing is wrong with where it lies, False if either
            fails, None if that was not checked or is open.
        warnings: what is wrong with where the map lies.
        lines: all that must be shown to a reader with the map.
        evidence: what the image and each clinical value add to the log-odds of the target, and the answer without the values; None where
            none were given.
    """

    map: npt.NDArray[np.float32] = field(repr=False)
    method: Method
    target: str
    judgement: ImageAnswer
    trusted: bool | None
    warnings: tuple[str, ...]
    lines: tuple[str, ...] = field(repr=False)
    _found: ExplainedMap | ExplainedVolume = field(repr=False)
    _headline: str = field(repr=False)
    evidence: JointEvidence | None = None
    _save_map: Callable[[Path], None] | None = field(default=None, repr=False)

    def picture(self) -> Figure:
        """Draws the map over the image, of a volume over its slices with most of the map's weight, with its scale and the lines: a
        Matplotlib figure."""
        return self._found.draw(self._headline)

    def on_slices(self) -> npt.NDArray[np.float32]:
        """Returns the map of a CT volume over all of its own slices, float32 [slices, rows, columns] as `Volume.hounsfield`.

        Raises:
            ArgumentError: it is of a radiograph.
        """
        if self._save_map is None:
            raise ArgumentError(_OF_A_RADIOGRAPH)
        return cast("ExplainedVolume", self._found).on_slices()

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the picture as a PNG, or an SVG where the name ends in `.svg`; of a CT volume also the map over the volume's own slices,
        as NIfTI (`.nii`, `.nii.gz`) or as a DICOM Parametric Map of the series (`.dcm`). All show the patient: keep them in the hospital.

        Raises:
            ArgumentError: a map over slices is asked of a radiograph, or the header of a series does not allow one.
            ConfigError: NIfTI without nibabel, or a DICOM map of what is no DICOM series.
        """
        target = Path(path)
        if not target.name.lower().endswith((".nii", ".nii.gz", ".dcm")):
            from pneumofed.common.evaluation.plots import write

            write(self.picture(), target)
            return target
        if self._save_map is None:
            raise ArgumentError(_OF_A_RADIOGRAPH)
        try:
            self._save_map(target)
        except (ImageError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ArgumentError(
                f"{target.name}: the header of the series does not allow a map ({type(error).__name__})"
            ) from None
        return target

    def _repr_png_(self) -> bytes:
        from pneumofed.common.evaluation.plots import render_figure

        return render_figure(self.picture())


def explain(
    bundle: ModelBundle | str | PathLike[str],
    image: ImageLike,
    method: Method = "grad-cam",
    target: str | None = None,
    *,
    check: bool = True,
    seed: int = 0,
    detail: Detail = "last-layer",
    clinical: PatientValues | None = None,
) -> Explanation:
    """Explains one image, or CT volume, as `pneumofed explain` does, with the same checks and words.

    Args:
        bundle: opened, or where it lies; one with a study's own network must be opened with `run_code=True`.
        image: as for `ModelBundle.predict`.
        method: `grad-cam`, `grad-cam++`, `integrated-gradients`, `gradient-shap`, `occlusion`, `kernel-shap` or `lime`; of a CT volume one
            of the first two.
        target: what the evidence is for: one of the bundle's classes; None for all but normal together.
        check: whether to find out if the map can be believed; takes several times as long.
        seed: of what SHAP and LIME draw.
        detail: of Grad-CAM and Grad-CAM++: `last-layer`, `finer-layer`, `larger-input` or `several-sizes`; see docs/explanations.md. Of a
            CT volume one of the first two.
        clinical: values of the patient by name, for a model that takes some; the map is then of the image beside them.

    Raises:
        ArgumentError: `image` is no image, or none that the model can judge; the text says why.
        ImageError: it cannot be read.
        ConfigError: there is no such method, target or detail, or not of a CT volume.
        BundleError: `bundle` cannot be opened, or its network is a study's own and there is no consent to run its code.
    """
    opened = bundle if isinstance(bundle, ModelBundle) else open_bundle(bundle)
    methods = choose_methods([method], "method")
    chosen, found_detail = choose_target(target, opened.classes, "target"), choose_detail(detail, methods, "detail")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of Captum's tqdm, in a notebook without ipywidgets
        from pneumofed.inference.explain.files import ExplanationRequest
    request, values = ExplanationRequest(methods, chosen, seed, check, found_detail), opened.read_values(clinical)
    if opened.takes_volumes:
        return _explain_volume(opened, image, request, target, values)
    return _explain_radiograph(opened, image, request, target, values)


def _explain_radiograph(
    opened: ModelBundle, value: Any, request: ExplanationRequest, target: str | None, values: npt.NDArray[np.float32] | None
) -> Explanation:
    from pneumofed.inference.explain.files import ExplanationSetup, check_methods, explain_with_values, headline

    image = to_image(value, opened.predictor.window)
    judgement = _judge_one(opened, image, values)
    sanity = check_methods(opened.network, [image], opened.predictor, request) if request.checked else {}
    setup = ExplanationSetup(opened.predictor, opened.network, request, sanity)
    (explained,), evidence = explain_with_values(setup, image, judgement, values)
    attribution = explained.panel.attribution
    misplaced = tuple(warning.value for warning in explained.focus.warnings)
    return Explanation(
        map=attribution.values,
        method=attribution.method,
        target=target or positive_word(opened.classes),
        judgement=describe(judgement, opened.threshold),
        trusted=False if misplaced else _TRUSTED[sanity[attribution.method].verdict if sanity else "open"],
        warnings=misplaced,
        lines=explained.panel.lines,
        _found=explained,
        _headline=headline(judgement),
        evidence=evidence,
    )


def _judge_one(opened: ModelBundle, image: Image, values: npt.NDArray[np.float32] | None) -> Judgement:
    """Refuses what the model cannot judge: of that there is no evidence."""
    (judgement,) = opened.predictor.judge([image], values=[values])
    if judgement.prediction is None:
        raise ArgumentError(f"image: the model cannot judge it ({judgement.explanation}), so there is no evidence to show")
    return judgement


def _explain_volume(
    opened: ModelBundle, value: Any, request: ExplanationRequest, target: str | None, values: npt.NDArray[np.float32] | None
) -> Explanation:
    from pneumofed.inference.explain.files import ExplanationSetup, explain_beside, headline
    from pneumofed.inference.explain.volumes import ReadVolume, check_volume_maps, explain_volume, read_explainable, save_map

    source = Path(value) if isinstance(value, str | PathLike) else None
    if source is not None:
        read = read_explainable(source, opened.predictor)
    else:
        read = ReadVolume(image=to_volume(value, opened.predictor), volume=value)
    judgement = _judge_one(opened, read.image, values)
    sanity = check_volume_maps(opened.network, [read.image], opened.predictor, request)
    setup = ExplanationSetup(opened.predictor, opened.network, request, sanity)
    explain_it = partial(explain_volume, volume=read.volume, numbers=read.numbers)
    (explained,), evidence = explain_beside(explain_it, setup, read.image, judgement, values)
    return Explanation(
        map=explained.found.values,
        method=explained.method,
        target=target or positive_word(opened.classes),
        judgement=describe(judgement, opened.threshold),
        trusted=_TRUSTED[sanity[explained.method].verdict if sanity else "open"],
        warnings=(),
        lines=explained.lines,
        _found=explained,
        _headline=headline(judgement),
        evidence=evidence,
        _save_map=partial(save_map, explained, source=source, predictor=opened.predictor),
    )
