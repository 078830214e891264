"""`bundle.json`: what a model bundle says of itself. Everything that a prediction needs besides the network stands here."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.config.classes import LabelTask
from pneumofed.common.config.experiment import (
    Count,
    Fraction,
    ImageConfig,
    ModelConfig,
    NonNegative,
    Positive,
    Section,
    Slices,
    without_unset,
)
from pneumofed.common.imaging.patient_groups import AGE, SEX, VIEW, PatientGroups
from pneumofed.common.model_bundle.calibration import Calibration
from pneumofed.common.model_bundle.population import IntervalEstimate, JudgedPopulation, PopulationFinding, not_known
from pneumofed.common.model_bundle.suitability import Suitability

MIN_REFERENCE_IMAGES = 60
"""Of patients, one each: with fewer in the reference, drift is not watched (see `inference.monitor.reference`)."""
FORMAT = 1
"""Raised when an older version could no longer read a bundle rightly."""

MANIFEST, SIGNATURE_FILE = "bundle.json", "signature.json"
WEIGHTS, NETWORK, QUANTIZED, REFERENCE, CARD, MONAI = (
    "weights.pt",
    "model.onnx",
    "model_int8.onnx",
    "reference.npz",
    "card.md",
    "metadata.json",
)

REFERENCE_GROUPS = {AGE: "age_group", SEX: "sex", VIEW: "view"}
"""Names of the arrays of `reference.npz` with the groups of its patients, as words, empty where one is not known."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$", max_length=200)]


class DisplayWindow(Section):
    """A window that replaces each DICOM file's own (see `common.imaging.types.Window`)."""

    center: float
    width: Positive


class Preprocessing(Section):
    """From a file to the graph's input; all but the first step and the square lies in the ONNX graph.

    `common.imaging.images.read_image` -> `fit_square` -> rounded to 256 grey levels, as in training -> float32 [N, 1, S, S] in [0, 1] ->
    (in the graph) repeated to `in_channels` -> (x - mean) / std.

    Of CT volumes: `common.imaging.volumes.read_volume` -> `fit_volume` -> float32 [N, 1, slices, S, S] in [0, 1] -> (in the graph)
    (x - mean) / std.
    """

    size_px: Count
    fit: Literal["pad", "crop"]
    in_channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    window: DisplayWindow | None = None
    """None: each DICOM file's own window or VOI LUT is applied; a CT volume is always shown in the lung window."""
    slices: Slices = 0
    """Of a CT volume; 0 is a radiograph, and then it is not written."""

    @model_serializer(mode="wrap")
    def _leave_out_slices(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(write(self), slices=0)

    @property
    def image(self) -> ImageConfig:
        return ImageConfig(size_px=self.size_px, fit=self.fit, slices=self.slices)


class OperatingPoint(Section):
    """The decision: pneumonia if the calibrated probability is at least `value`."""

    value: Annotated[float, Field(ge=0.0, le=1.0 + 1e-9)]
    policy: ThresholdPolicyName
    target: Fraction
    """The sensitivity or specificity that the policies of these names hold."""
    raw_value: Annotated[float, Field(ge=0.0, le=1.0 + 1e-9)]
    """The same threshold on the network's own probability, as it was chosen."""
    site: str | None = None
    """The hospital on whose own patients it was chosen (`common.release.SitePoint`); None, and then it is not written: the validation
    patients of all hospitals of the run."""

    @model_serializer(mode="wrap")
    def _leave_out_site(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(write(self), site=None)


class ReferenceSet(Section):
    """What `reference.npz` was computed from."""

    sets: tuple[str, ...]
    """Names of the sets, e.g. `test`."""
    images: Count
    statistics: tuple[str, ...]
    """Names of the columns of its pixel statistics."""


class Measured(Section):
    """How the model did on one set, probabilities calibrated, at the operating point."""

    name: str
    """`validation` (internal: the hospitals' own held-out patients), `test` or `external`; `test, sex F` for a subgroup."""
    images: Annotated[int, Field(ge=0)]
    positives: Annotated[int, Field(ge=0)]
    patients: int | None = None
    metrics: dict[str, IntervalEstimate]
    """Metrics as in `common.evaluation.metrics`."""


class Quantization(Section):
    """What int8 costs against float32 on the same images."""

    name: str
    """The set, as in `Measured`."""
    images: Count
    calibration_images: Count
    auroc_float32: IntervalEstimate
    auroc_int8: IntervalEstimate
    mean_difference: NonNegative
    """Mean of |probability of int8 - probability of float32|, calibrated."""
    max_difference: NonNegative
    changed_decisions: Annotated[int, Field(ge=0)]


class GraphCheck(Section):
    """How far the ONNX graph is from PyTorch on real images."""

    images: Count
    logits: NonNegative
    """Largest difference of a logit, over the largest one of the images where that is above 1."""
    probability: NonNegative
    """Largest absolute difference of P(pneumonia)."""
    features: NonNegative
    """Largest difference of a feature or activation, over the largest one of the images."""


class PrivacySpent(Section):
    """Privacy of the training in sentences, and the largest epsilon that a hospital reported."""

    mechanism: Literal["none", "dp_sgd"]
    largest_epsilon: float | None = None
    secure_aggregation: bool = False
    protected: tuple[str, ...] = ()
    unprotected: tuple[str, ...] = ()


class Provenance(Section):
    """Where the model comes from, in hashes."""

    pneumofed: str
    run: str
    """The run's own random name, which stands in every site's audit log."""
    round: Count
    checkpoint: Sha256
    config: Sha256
    split_seed: int | None = None
    """Of the run's draw of validation patients (`ExperimentConfig.split_seed`). With the fraction it shows a hospital which of its
    patients the model was not trained on; None where that is not known."""
    validation_fraction: float | None = None
    parent: Sha256 | None = None
    """Digest of the bundle that the run started from."""
    git_commit: str | None = None
    git_dirty: bool | None = None
    app_bundle: str | None = None
    """SHA-256 of the Flower app that the hospitals approved; None where the run was simulated."""


class CardFacts(Section):
    """The model card's numbers, for pages that show them; `card.md` says the same to people."""

    sites: Annotated[int, Field(ge=0)]
    training_images: Annotated[int, Field(ge=0)] | None = None
    """None where the hospitals added up under masks and reported no counts."""
    training_patients: Annotated[int, Field(ge=0)] | None = None
    """Of training and validation together, as the hospitals count them."""
    training_classes: dict[str, int] = Field(default_factory=dict)
    phantom: bool = False
    """Trained on drawn images: the numbers say nothing about patients."""
    virtual: bool = False
    """The hospitals were simulated on one machine."""
    measured: tuple[Measured, ...] = ()
    uncalibrated: tuple[Measured, ...] = ()
    """The same sets before calibration."""
    quantization: tuple[Quantization, ...] = ()
    onnx: GraphCheck | None = None
    privacy: PrivacySpent | None = None
    provenance: Provenance | None = None


class BundleManifest(Section):
    """The whole of `bundle.json`. `files` holds every file of the bundle but itself and the signature."""

    format: Count = FORMAT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    created: datetime
    task: LabelTask
    classes: tuple[str, ...]
    """In the order of the logits; class 0 is normal, all others are what `positive_word` says."""
    preprocessing: Preprocessing
    model: ModelConfig
    threshold: OperatingPoint
    calibration: Calibration
    suitability: Suitability | None = None
    """How images are recognised that the model must not judge; None: every image is judged."""
    reference: ReferenceSet | None = None
    population: JudgedPopulation | None = None
    """For whom the model was judged; None in bundles of versions that did not say it."""
    card: CardFacts
    files: dict[FileName, Sha256] = Field(default_factory=dict)

    def check_population(self, groups: PatientGroups) -> PopulationFinding:
        """Finds whether the model was judged for a patient of `groups`."""
        return self.population.check(groups) if self.population else not_known(groups)
