"""The configuration of a run, `ExperimentConfig`: typed, public, and sent to every site with each message.

It is made of sections (image, model, training, strategy, privacy, ...), each a `Section`: immutable, with unknown keys refused. What
contradicts across sections is refused by `common.config.contradictions`, names to choose among stand in `common.config.choices`. What
each party keeps to itself is in `common.config.parties`. YAML files in `configs/` hold only what differs from the defaults;
`common.config.reader` reads them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from pneumofed.common.config.choices import NetworkName, PrivacyUnit, StrategyName, ThresholdPolicyName, UpdatePrecision
from pneumofed.common.config.classes import LabelTask
from pneumofed.common.config.contradictions import (
    check_asynchronous,
    check_central_privacy,
    check_cross_site,
    check_dp_sgd,
    check_judging_in_training,
    check_local_sgd,
    check_micro_batches,
    check_secure_aggregation,
    check_volume_settings,
    check_weights,
)

STUDY_CODE = re.compile(r"study:[0-9a-f]{64}:[A-Za-z_][A-Za-z0-9_]{0,63}")
"""Name of a study's own network or loss: SHA-256 of its file, and the function in it (`common.ops.study_code`)."""


def _listed_or_study(value: Any, listed: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and STUDY_CODE.fullmatch(value) else listed(value)


OrStudyCode = (WrapValidator(_listed_or_study), PlainSerializer(str, return_type=str))
"""Beside a list of names: a study's own code is taken too."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
NoiseMultiplier = Annotated[float, Field(ge=0.01, le=1e6)]
"""Below it the Gaussian mechanism hides nothing (epsilon of one full step is above 5,000 at delta 1e-5; Balle & Wang 2018, theorem 8), and
no accountant computes a number for it."""


class Section(BaseModel):
    """A part of a configuration: immutable, with unknown keys and numbers that are infinite or NaN refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def without_unset(values: dict[str, Any], **unset: object) -> dict[str, Any]:
    """Leaves out keys that are unset, so that what was written before there were such keys keeps its bytes and digest.

    Args:
        values: of a section, as it is written.
        unset: by newer key, the value that says that it is not used.
    """
    return {name: value for name, value in values.items() if name not in unset or value != unset[name]}


class PrivacyConfig(Section):
    """Differential privacy of each site's own training: DP-SGD (Abadi et al. 2016, algorithm 1) with Poisson sampling.

    Neighbouring data sets differ by one unit, added or removed. Sampling rate, noise, number of steps and accounting all come from
    these numbers and the site's own number of units (`client.privacy.plan`).
    """

    mechanism: Literal["none", "dp_sgd"] = "none"
    unit: PrivacyUnit = "patient"
    """What is protected: one `image`, or one `patient` with all images. Under `patient` each drawn patient gives one image, drawn anew."""
    target_epsilon: Positive = 6.0
    """Spent by each site over all planned rounds; becomes the noise multiplier before the first step."""
    noise_multiplier: NoiseMultiplier | None = None
    """Standard deviation of the noise over `max_grad_norm`. Set, it takes the place of `target_epsilon`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Unset it is patients^-1.1 of the site, 0.001 at most. A hospital refuses a larger one than its own, see `SitePolicy.max_delta`."""
    max_grad_norm: Annotated[float, Field(ge=1e-12, le=1e12)] = 1.0
    """Each unit's gradient is clipped to this length. Beyond these limits float32 does not hold the clipped sum well."""
    expected_batch_size: Count = 256
    """Units drawn a step on average: the sampling rate is this over the site's units, 1 at most."""
    physical_batch_size: Count = 32
    """Images that are in memory at once; changes memory, speed, and which random views are drawn."""
    augmentation_multiplicity: Count = 1
    """Augmented views of an image whose gradients are averaged before they are clipped (De et al. 2022, section 3.4)."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the moving average of the weights over the steps of a round, which travels in place of the last ones; 0 is off."""
    accountant: Literal["prv", "rdp"] = "prv"
    secure_noise: bool = False
    """Noise and sampling come from a ChaCha20 key that the operating system draws for each round and nobody keeps, and each noise value
    is a sum of four, against the attack on floating point numbers (Holohan and Braghin 2021). Off, the key comes from the site's own
    secret and everything that the update depends on: the coordinator, who knows `seed`, cannot compute it, but the site repeats the
    round bit for bit, and who gets the secret and an update can subtract the noise. Publish what was trained with it on."""
    open_metrics: bool = False
    """Sends training loss, accuracy and images per second of private rounds too. They come from the raw data without any noise, so
    that the accounted epsilon does not hold for who sees them."""


class CentralPrivacyConfig(Section):
    """Differential privacy of whole sites, by a coordinator whom they trust with their updates: DP-FedAvg (McMahan et al. 2018).

    Neighbouring federations differ by one site, whose updates become zero. Every update weighs the same, whatever its site's size.
    """

    enabled: bool = False
    clip_norm: Positive = 1.0
    """Updates longer than this (L2 norm of the change of all parameters) are scaled down to it. About their median is a good choice."""
    target_epsilon: Positive = 8.0
    """Of all planned rounds together; becomes the noise multiplier before the first round."""
    noise_multiplier: NoiseMultiplier | None = None
    """Standard deviation of the noise on the sum of updates over `clip_norm`. Set, it takes the place of `target_epsilon`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1.0e-5


class SecureAggregationConfig(Section):
    """Secure aggregation (SecAgg+, Bell et al. 2020): the coordinator learns sums of the sites' updates and counts, and no single one."""

    enabled: bool = False
    threshold: Annotated[float, Field(gt=0.5, le=1.0)] = 0.67
    """Share of the sites (of each site's neighbours, where not all are) that must stay to the end, rounded up, at least three. So many
    sites together with the coordinator could read another's update; more than two thirds also withstands a coordinator that lies about
    who dropped out, with up to a third of the sites on its side where all share masks with all (Bonawitz et al. 2017, section 6.2), and
    with a fifth where each has the `neighbours` that are needed."""
    clip_norm: Positive = 100.0
    """Longest update (L2 norm of the difference from the global weights) that a site sends; longer ones are scaled down and counted.
    Quantisation steps are proportional to it."""
    bits: Literal[32, 64] = 32
    """Of each masked parameter on the wire."""
    max_examples: Annotated[int, Field(ge=1, le=2**20)] = 2048
    """Training images as which one site counts in the weighted mean at most. One that has more counts as so many, one that has few as
    many as `largest_weight` asks for: no site is refused for its number, which a refusal would tell. Set it near the largest hospital."""
    largest_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Largest share of one site in the weighted mean, whoever drops out: no site counts as less than the part of `max_examples` that
    this takes (`common.secure_aggregation.quantization.least_weight`). 1 sets no bound."""
    neighbours: Annotated[int, Field(ge=4, multiple_of=2)] | None = None
    """With how many others each site shares masks. Unset: with all up to 100 sites, beyond as many as
    `common.secure_aggregation.masking` needs."""
    stage_timeout_sec: Positive = 60.0
    """Deadline of each step besides training and evaluation, in which sites exchange keys and shares, and find out whether they have
    validation statistics to add. Each starts a process at a site; a simulation of hundreds of hospitals on one machine needs more, since
    they answer one after the other."""
    grace_sec: NonNegative = 5.0
    """Once enough sites have answered the last two steps, so long is waited for the others."""


def _check_slices(slices: int) -> int:
    if slices and not 8 <= slices <= 128:
        raise ValueError(f"expected 0, a radiograph, or 8 to 128 slices of a CT volume, got {slices}")
    return slices


Slices = Annotated[int, AfterValidator(_check_slices)]
"""Of a CT volume, 8 to 128; 0 is a radiograph."""


class ImageConfig(Section):
    """How a radiograph, or a CT volume, becomes the model's input."""

    size_px: Annotated[int, Field(ge=32, le=1024)] = 128
    fit: Literal["pad", "crop"] = "pad"
    """`pad` keeps the whole image and adds black bars; `crop` fills the square and cuts the longer side. Of radiographs only."""
    slices: Slices = 0
    """0: radiographs. 8 to 128: CT volumes, resampled to so many axial slices of `size_px` x `size_px` (docs/ct.md). At 0 it is in no
    configuration that is written."""

    @model_serializer(mode="wrap")
    def _leave_out_slices(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(write(self), slices=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's pixels: (S, S), or (slices, S, S) of a volume."""
        square = (self.size_px, self.size_px)
        return (self.slices, *square) if self.slices else square


class AugmentationConfig(Section):
    """Ranges and probabilities of the random training transforms, each drawn uniformly. Zero switches one off. Prediction has none."""

    rotation_deg: Annotated[float, Field(ge=0.0, le=45.0)] = 10.0
    shift_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.06
    scale_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.10
    brightness: Annotated[float, Field(ge=0.0, le=0.5)] = 0.10
    contrast: Annotated[float, Field(ge=0.0, le=0.9)] = 0.20
    noise_std: Annotated[float, Field(ge=0.0, le=0.5)] = 0.02
    horizontal_flip_probability: Fraction = 0.0
    """Zero by default: a mirrored chest has its heart on the wrong side. There is no vertical flip."""
    style: Fraction = 0.0
    """Of another device: gamma and the amplitudes of the lowest spatial frequencies are multiplied by factors between 2^-style and
    2^style, against habits of a site that the network would learn in place of the disease (`common.imaging.augment`)."""
    erase_borders: Fraction = 0.0
    """Probability that an image's border, up to an eighth of the side, is blackened."""
    erase_markers: Fraction = 0.0
    """Probability that side markers and burnt-in letters near the edges are replaced by what they stand on."""

    @property
    def is_on(self) -> bool:
        """Whether any transform is on."""
        return any(self.model_dump().values())


Tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Before a tuple: YAML knows lists only."""


class ClinicalColumn(Section):
    """One clinical value of a patient at the examination: its name, unit, kind and range, the same for all sites.

    There is no free text: a report or a note names people and says the diagnosis (docs/clinical.md).
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
    """Of the manifest's column, before a unit in brackets. `age`, `sex` and `view` are those that every manifest has."""
    kind: Literal["number", "binary", "codes"] = "number"
    unit: Annotated[str, Field(min_length=1, max_length=20)] | None = None
    low: float | None = None
    high: float | None = None
    """Of a number: what any living patient may have, in `unit`. A value outside is refused, since its unit is another."""
    codes: Annotated[tuple[Annotated[str, Field(pattern=r"^[^\s;|,][^;|,]{0,39}$")], ...], Tuple] = ()
    """Of kind `codes`: the words that may stand in a cell, one or several with `;` between them."""
    mean: float | None = None
    deviation: Positive | None = None
    """Of a number, in `unit`: by which it is standardised. Stated here, the column's data are not asked for it; a model bundle has both."""

    @property
    def slots(self) -> int:
        """Numbers that the column is for the network: one a code, one of the other kinds."""
        return len(self.codes) if self.kind == "codes" else 1

    @property
    def unit_words(self) -> str:
        """` °C`, to be put behind a number; empty without a unit."""
        return f" {self.unit}" if self.unit else ""

    @model_validator(mode="after")
    def _check_kind(self) -> ClinicalColumn:
        number = self.kind == "number"
        if number and (self.low is None or self.high is None or not self.low < self.high):
            raise ValueError(f"column '{self.name}' is a number and needs its range, low below high")
        if not number and any(one is not None for one in (self.unit, self.low, self.high, self.mean, self.deviation)):
            raise ValueError(f"column '{self.name}' is no number: unit, low, high, mean and deviation are of numbers")
        if (self.kind == "codes") != bool(self.codes):
            raise ValueError(f"column '{self.name}': codes are listed where the kind is 'codes', and only there")
        if len({code.casefold() for code in self.codes}) < len(self.codes):
            raise ValueError(f"column '{self.name}' lists a code twice")
        if (self.mean is None) != (self.deviation is None):
            raise ValueError(f"column '{self.name}': mean and deviation are stated together")
        return self


class ClinicalConfig(Section):
    """Clinical values beside the image (`clinical:` of an experiment): which columns a run uses and how they meet the image."""

    columns: Annotated[tuple[ClinicalColumn, ...], Tuple, Field(min_length=1, max_length=64)]
    fusion: Literal["concatenate", "film"] = "concatenate"
    """Both late, before the classifier. `concatenate`: features of both side by side. `film`: the values scale and shift the image's
    features (Perez et al. 2018, eq. 1)."""
    width: Annotated[int, Field(ge=1, le=1024)] = 32
    """Of the hidden layer that reads the values."""
    drop_value: Fraction = 0.15
    """In training each known value is taken away with this probability, so that any part of them serves at prediction."""
    drop_all: Fraction = 0.25
    """In training all values of an image are taken away with this probability: the image by itself is a case that was trained."""
    standardize: Literal["data", "range"] = "data"
    """`data`: numbers are standardised by mean and deviation over the sites, asked once before the first round. `range`: by the middle and
    half the width of the stated range, which asks no data; so it is in private runs and under secure aggregation whatever stands here."""

    @property
    def slots(self) -> int:
        """Numbers of one patient that the network takes."""
        return sum(column.slots for column in self.columns)

    @model_validator(mode="after")
    def _check_names(self) -> ClinicalConfig:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError("clinical.columns: a name stands twice")
        return self

    def stated(self) -> ClinicalConfig:
        """Copies the section without means and deviations, for comparison: a bundle states those that a run found."""
        bare = (column.model_copy(update={"mean": None, "deviation": None}) for column in self.columns)
        return self.model_copy(update={"columns": tuple(bare)})


class ModelConfig(Section):
    """The network, its input and where its first weights come from."""

    name: Annotated[NetworkName, *OrStudyCode] = "resnet18"
    """Of the list, or `study:SHA256:FUNCTION`, a study's own network, which `--model FILE.py:FUNCTION` makes of a file."""
    in_channels: Literal[1, 3] = 1
    norm: Literal["batch", "group"] = "batch"
    weight_standardization: bool = False
    """Convolutions use their filters with mean 0 and length 1 (Qiao et al. 2019); helps GroupNorm and private training."""
    scattering_scale: Annotated[int, Field(ge=1, le=6)] = 2
    """Of `scattering` and `imagenet_wavelets` only: octaves of wavelets. 2 gives 81 channels, 3 gives 217, no better under noise."""
    weights: Annotated[str, Field(min_length=1)] = "none"
    """`none` (random), `imagenet`, or the path of a local weights file or model bundle. ImageNet's weights are read by the coordinator: for
    `efficientnet_lite0` and `imagenet_wavelets` from the package of the extra `imagenet`, for the others torchvision downloads them."""
    freeze: Literal["none", "head_only", "last_block"] = "none"
    """What is trained: everything, only the classifier, or the classifier and the last block."""
    head_first_rounds: Annotated[int, Field(ge=0)] = 0
    """Two-phase schedule: so many rounds with `head_only`, then `freeze` with `fine_tune_factor` times the learning rate."""
    fine_tune_factor: Positive = 0.1
    clinical: ClinicalConfig | None = None
    """The network's second input; `clinical:` at the top of an experiment is put here. Unset it is in no configuration that is written."""

    @model_serializer(mode="wrap")
    def _leave_out_clinical(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if self.clinical is None:  # what was written without it keeps its digest
            values.pop("clinical", None)
        return values

    @property
    def trains_batch_norm(self) -> bool:
        """Whether a layer normalises with the statistics of the batch in training; `scattering` has no BatchNorm."""
        return self.norm == "batch" and self.name != "scattering" and self.freeze != "head_only"

    def without_weights(self) -> ModelConfig:
        """Copies the section with random first weights, for callers who load all weights afterwards."""
        return self.model_copy(update={"weights": "none"})

    def differences(self, other: ModelConfig) -> list[str]:
        """Lists the settings that shape the network and differ from `other`: `name is 'resnet18', not 'resnet34'`."""
        shaping = ("name", "in_channels", "norm", "weight_standardization", "scattering_scale")
        pairs = ((key, getattr(self, key), getattr(other, key)) for key in shaping)
        found = [f"{key} is {own!r}, not {others!r}" for key, own, others in pairs if own != others]
        mine, theirs = (
            one and one.model_copy(update={"standardize": "data"}).stated() for one in (self.clinical, other.clinical)
        )
        return found if mine == theirs else [*found, "clinical differs: its columns and fusion are part of the network"]


class LossConfig(Section):
    """Training loss. Class weights come from each site's own counts."""

    name: Annotated[Literal["cross_entropy", "focal"], *OrStudyCode] = "cross_entropy"
    """Of the list, or `study:SHA256:FUNCTION`, a study's own loss, which brings its own weights and smoothing."""
    class_weights: Literal["none", "balanced", "effective"] = "none"
    """`balanced`: n / (classes * n_class); `effective`: Cui et al. 2019 with beta = 0.999. Classes that a site lacks weigh nothing."""
    max_class_weight: Positive = 4.0
    """A ceiling on class weights, since a hospital with three normals must not let each count a hundredfold."""
    logit_adjustment: bool = True
    """Adds the log of the site's own class shares to the logits in training (see `common.models.recipe`), against label skew between sites.
    Takes the place of class weights: switch it off to use them."""
    focal_gamma: NonNegative = 2.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.05


class PlateauConfig(Section):
    """Of `training.schedule: plateau`: when the learning rate falls, as torch's `ReduceLROnPlateau` decides on the same numbers."""

    monitor: Literal["loss", "auroc"] = "loss"
    """Of the hospitals' pooled validation images after each round: the mean cross-entropy, or the AUROC."""
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """By which the rate is multiplied; it ends at `training.final_factor`."""
    patience_rounds: Annotated[int, Field(ge=0)] = 2
    """So many rounds in a row may bring no improvement; the next one that brings none lowers the rate."""
    min_delta: NonNegative = 0.001
    """What is smaller is no improvement."""


class TrainingConfig(Section):
    """Local training at each site in each round."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Positive = 1.0e-3
    weight_decay: NonNegative = 0.05
    momentum: Fraction = 0.9
    """Of SGD only."""
    adam_epsilon: Positive = 1.0e-8
    """Of AdamW only: what is added to the root of the mean square gradient that a step is divided by. AdamW takes steps of full length
    whatever the gradient's size, also at a site with one class, whose gradients are next to nothing; an epsilon between the two sizes
    (1e-4 for ResNet18, docs/results.md) keeps such a site nearly still."""
    batch_size: Count = 32
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    """Above 0 a batch goes through the network in lots of so many images at most, whose gradients are added up before the step: the
    memory is that of a lot, and the step that of the whole batch; which random views are drawn changes with it. BatchNorm would normalise
    each lot by itself, so it needs model.norm 'group' or statistics that stand still. Of private runs it is
    privacy.physical_batch_size. At 0 it is in no configuration that is written."""
    local_epochs: Count = 2
    """Passes over a site's images between two averages. On the Kaggle set two reached a higher test AUROC than one in as many rounds, and
    four in half as many rounds a lower one."""
    local_steps: Count | None = None
    """Steps between two averages, as many at every site: one with few images passes over them more often than one with many. With
    `strategy.weight_by: hospitals` each then moves the model as far as any other. Unset it is `local_epochs` passes."""
    schedule: Literal["constant", "cosine", "one_cycle", "plateau"] = "one_cycle"
    """Of the learning rate over all steps of the run: the site continues it from round to round. Under `plateau` it falls when the pooled
    validation result no longer improves, which the coordinator sees and sends to the sites as a factor."""
    plateau: PlateauConfig = PlateauConfig()
    warmup_fraction: Fraction = 0.15
    final_factor: Fraction = 0.01
    proximal_mu: NonNegative | None = None
    """FedProx: strength of the pull toward the global weights (Li et al. 2020, eq. 2), and FedDyn's alpha (Acar et al. 2021), which is
    the same pull. Unset it is 0.01 under the strategies `fedprox` and `feddyn` and 0, which is FedAvg, under the others."""
    max_grad_norm: NonNegative = 0.0
    """Gradient clipping by global norm; 0 is off."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    """Share of each site's patients kept for validation."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Of the draw of these patients; unset it is the run's seed. A run that goes on from an earlier one's model keeps that one's, so that
    no site evaluates on patients that the earlier model was trained on."""
    early_fraction: Fraction = 0.0
    """Progressive resizing: this share of the rounds, rounded up, trains on images of half the side (32 px at least), which costs a
    quarter; the last round always sees `image.size_px`. 0 trains at full size throughout, which is the default since early small rounds
    cost AUROC on the Kaggle set. All rounds are evaluated at full size, so that such ones look worse than they are."""
    batch_statistics_fraction: Fraction = 1.0
    """In this share of the rounds, rounded up, BatchNorm normalises with each batch's own statistics. In the rest the averaged running
    statistics stand still and normalise in training too, so that sites with other mixes of classes train one and the same function
    (FixBN, Zhong et al. 2024, section 5)."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(write(self), micro_batch_size=0, local_steps=None)

    def fixes_statistics(self, round_number: int, rounds: int) -> bool:
        """Decides whether BatchNorm's running statistics stand still in a round (`batch_statistics_fraction`).

        Args:
            round_number: the round, counted from 1.
            rounds: all rounds of the run.
        """
        return round_number > math.ceil(round(self.batch_statistics_fraction * rounds, 9))

    def size_in_round(self, round_number: int, rounds: int, size_px: int) -> int:
        """Computes the side in pixels of the training images in a round (`early_fraction`).

        Args:
            round_number: the round, counted from 1.
            rounds: all rounds of the run.
            size_px: the full side, `image.size_px`.

        Returns:
            Half of `size_px`, 32 at least, in an early round; `size_px` in the others, the last always among them.
        """
        early = min(math.ceil(round(self.early_fraction * rounds, 9)), rounds - 1)
        return max(size_px // 2, 32) if round_number <= early else size_px


class StrategyConfig(Section):
    """How the coordinator draws sites, checks their replies and combines them."""

    name: StrategyName = "fedavg"
    weight_by: Literal["images", "hospitals"] = "images"
    """What a site's update weighs in the mean: its training images (McMahan et al. 2017), or the same for every site, where the few
    images of a population that only small hospitals have would else hardly count. See `check_weights` for what it goes with."""
    fraction_train: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_sites: Count | None = None
    """A round with fewer good replies fails. Unset it is 2f + 3 for Krum and Multi-Krum (Blanchard et al. 2017, proposition 1), else 1."""
    wait_for_sites: Annotated[int, Field(ge=0)] = 0
    """Sites that must be connected before the first round; 0 means `min_sites`. After `wait_timeout_sec` the run starts with
    those that are there, if they are `min_sites` at least."""
    wait_timeout_sec: Positive = 300.0
    round_timeout_sec: Positive = 3600.0
    enough_sites: Count | None = None
    """k of n: a round closes as soon as so many sites have answered well. The others are late; what they send is dropped and counted.
    Unset, a round waits for all until `round_timeout_sec`."""
    buffer: Count | None = None
    """K of FedBuff (Nguyen et al. 2022, algorithm 1): asynchronous rounds. A round is over as soon as K good updates have come, whichever
    weights each was begun from; those of older weights count for less (`server.federation.asynchronous`). Nobody waits for the slowest
    site, and nothing that comes late is dropped. Unset, rounds are synchronous."""
    update_precision: UpdatePrecision = "float32"
    """Number type of an update on the wire; see `common.wire.fields`."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Above 0 sites and coordinator evaluate, and the run keeps, the exponential moving average of the global weights over the rounds
    (after Polyak and Juditsky 1992, who average all steps), while sites train on from the round's own weights. It evens out what one
    round's draw of images and sites changes by chance; 0.7 looks back about three rounds."""
    max_update_norm_factor: Positive = 10.0
    """A reply whose update is longer than this many times the median update of its round is left out."""
    server_learning_rate: Positive | None = None
    """Of the server's optimizer; unset it is 1 for fedavgm and scaffold and 0.01 for fedadam and fedyogi."""
    server_momentum: Fraction = 0.9
    beta_1: Fraction = 0.9
    beta_2: Fraction = 0.99
    tau: Positive = 1.0e-3
    """Keeps the denominators of fedadam, fedyogi and fedexp from zero."""
    trim_fraction: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.2
    malicious_sites: Annotated[int, Field(ge=0)] = 0
    """f of Krum and Multi-Krum: how many sites may be hostile. Krum goes on with only one site's update, which is a noisy model."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(write(self), weight_by="images")

    @property
    def replies_needed(self) -> int:
        """`min_sites`, or the strategy's own minimum where it is unset."""
        if self.min_sites is not None:
            return self.min_sites
        return 2 * self.malicious_sites + 3 if self.is_krum else 1

    @property
    def is_krum(self) -> bool:
        """Whether the strategy is Krum or Multi-Krum."""
        return self.name in ("krum", "multikrum")


class PersonalConfig(Section):
    """A model of its own for each hospital, beside the global one and with any strategy. It never leaves the hospital."""

    method: Literal["none", "ditto"] = "none"
    """`ditto` (Li, Hu, Beirami and Smith 2021, algorithm 1): in each round that a site trains in, it also trains its own model v on its own
    images, with proximal_lambda / 2 * ||v - w||^2 added to the loss; w are the global weights that the round began with."""
    proximal_lambda: NonNegative = 1.0
    """Pull toward the global weights: 0 is training alone, and the larger it is the nearer v stays to w. Where plain SGD steps are longer
    than 2 / proximal_lambda they no longer come nearer to anything."""
    epochs: Count | None = None
    """Passes of v over the site's images in a round; unset as many as of the global model."""

    @property
    def is_on(self) -> bool:
        """Whether sites train models of their own."""
        return self.method != "none"


class EvaluationConfig(Section):
    """Central and federated evaluation."""

    every_rounds: Count = 1
    """The central sets are evaluated after each so many rounds, and always after the last."""
    validate_every_rounds: Count = 1
    """The sites judge the new model on their validation patients after each so many rounds, after the last one, and wherever the central
    sets are evaluated, at the threshold that these patients choose. Each time is a message to every site, and an answer about the same
    patients, of which a policy allows `max_evaluations_per_data`. Only such a round's model can be kept as the best one; early stopping
    and the schedule `plateau` count these rounds only."""
    fraction_sites: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the sites that evaluate the new model on their validation patients in such a round."""
    with_training: bool = False
    """The sites judge a round's model when the next round's training message brings it, before they train on it: one exchange of messages
    a round in place of two. Off, since a round's validation, threshold and central evaluation are then known one round later, and with
    them early stopping and `plateau`; only the sites that are drawn to train judge. The last round's model gets a message of its own."""
    bootstrap_samples: Annotated[int, Field(ge=0, le=100_000)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    batch_size: Count = 64
    threshold_policy: ThresholdPolicyName = "sensitivity"
    """Chosen on the sites' pooled validation statistics, then applied to the test and external sets. Images of other places tend to look
    sicker to a network than they are, so that a threshold as high as the sensitivity allows keeps more of its worth elsewhere. A fixed
    specificity fixes no threshold where validation is told apart nearly without error, and one mislabelled image moves it far."""
    target: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """The sensitivity or specificity that the policies of these names hold."""
    hospital_reference: bool = False
    """After the last round, the sites count how their validation patients score in the suitability tests, one image a patient, and an
    export takes its limits from these counts. Off, since these are three more answers without noise about the same patients."""
    alone: bool = False
    """After the last round, each site that allows it (`train_alone` in its policy) trains once by itself on the run's whole budget, from
    the weights that the run began with, and sends statistics of its own and of the global model on its validation patients. Off, since
    it takes as long as the run's training and is two more answers without noise. Nothing of the own model leaves."""
    alone_timeout_sec: Annotated[float, Field(gt=0.0, le=7 * 86400.0)] = 86400.0
    """How long the coordinator waits for those who train alone."""
    cross_site: bool = False
    """With `alone`: each site that allows it (`share_own_model` in its policy) also gives the model that it trained alone, which the
    coordinator has the other sites judge on their validation patients: whose model does how well on whose patients. Off, since a model
    of one hospital's images travels to other hospitals, and each model is one more answer without noise."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(write(self), validate_every_rounds=1, with_training=False)


class EarlyStoppingConfig(Section):
    """Stops a run whose validation AUROC no longer grows."""

    patience_rounds: Annotated[int, Field(ge=0)] = 0
    """Validated rounds (`evaluation.validate_every_rounds`) without improvement before the run stops; 0 is off."""
    min_delta: NonNegative = 0.001


class ExperimentConfig(Section):
    """Everything that defines a run for all parties; holds nothing of any site."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)] = "pneumonia"
    task: LabelTask = "binary"
    """`binary` (normal, pneumonia), `three_class` (normal, bacterial, viral), or 2 to 20 own classes in a list, of which the first is
    `normal`: `[normal, pneumonia, tuberculosis]`. See `common.config.classes`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    rounds: Count = 12
    image: ImageConfig = ImageConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    personal: PersonalConfig = PersonalConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    central_privacy: CentralPrivacyConfig = CentralPrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    parent: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest of the model bundle that the run starts from, which `model.weights` then names. The sites read it here, and it goes into
    every hash of the experiment."""

    @model_validator(mode="before")
    @classmethod
    def _take_clinical(cls, values: Any) -> Any:
        """`clinical:` at the top is the network's second input, `model.clinical`, and lies over it where both are there."""
        if not isinstance(values, dict) or "clinical" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "clinical"}
        model, given = rest.get("model", {}), values["clinical"]
        if not isinstance(model, dict):
            model = ModelConfig.model_validate(model).model_dump()
        before = model.get("clinical")
        if isinstance(before, dict) and isinstance(given, dict):
            given = {**before, **given}
        return {**rest, "model": {**model, "clinical": given}}

    @property
    def clinical(self) -> ClinicalConfig | None:
        """The clinical values that the network takes beside the image; None for the image only."""
        return self.model.clinical

    @property
    def asks_clinical_sums(self) -> bool:
        """Whether sites are asked for sums of their clinical numbers before the first round (`ClinicalConfig.standardize`)."""
        if self.clinical is None or self.clinical.standardize == "range":
            return False
        private = self.privacy.mechanism != "none" or self.central_privacy.enabled  # the model would hold what nothing hides
        if private or self.secure_aggregation.enabled or self.parent is not None:
            return False
        return any(column.kind == "number" and column.mean is None for column in self.clinical.columns)

    @property
    def split_seed(self) -> int:
        """`training.split_seed`, or the run's seed where it is unset."""
        return self.seed if self.training.split_seed is None else self.training.split_seed

    def judges_centrally(self, round_number: int) -> bool:
        """Whether the central sets are evaluated after the round (from 1)."""
        return round_number % self.evaluation.every_rounds == 0 or round_number == self.rounds

    def validates(self, round_number: int) -> bool:
        """Whether the sites judge the round's model (from 1) on their validation patients."""
        return round_number % self.evaluation.validate_every_rounds == 0 or self.judges_centrally(round_number)

    def judges_in_training(self, round_number: int) -> bool:
        """Whether the sites judge the model of the round before when they train in this one (from 1)."""
        return self.evaluation.with_training and round_number > 1 and self.validates(round_number - 1)

    @property
    def proximal_mu(self) -> float:
        """`training.proximal_mu`, or the strategy's own value where it is unset."""
        if self.training.proximal_mu is not None:
            return self.training.proximal_mu
        return 0.01 if self.strategy.name in ("fedprox", "feddyn") else 0.0

    @model_validator(mode="after")
    def _check_together(self) -> ExperimentConfig:
        if self.loss.logit_adjustment and self.loss.class_weights != "none":
            raise ValueError(
                "loss.logit_adjustment corrects for the class shares already; set loss.class_weights to 'none' or it to false"
            )
        if self.strategy.enough_sites is not None and self.strategy.enough_sites < self.strategy.replies_needed:
            raise ValueError(
                f"strategy.enough_sites is {self.strategy.enough_sites} but {self.strategy.replies_needed} replies are needed"
            )
        needed = 2 * self.strategy.malicious_sites + 3
        if self.strategy.is_krum and self.strategy.replies_needed < needed:
            raise ValueError(
                f"strategy.min_sites: Krum against {self.strategy.malicious_sites} hostile sites needs {needed} replies a round "
                f"(2f + 3), got {self.strategy.min_sites}"
            )
        if self.strategy.name == "fedbn" and self.model.norm != "batch":
            raise ValueError(
                "strategy.name is 'fedbn' but model.norm is 'group'; FedBN keeps BatchNorm layers local, set model.norm to 'batch'"
            )
        if STUDY_CODE.fullmatch(self.model.name) and self.model.freeze == "last_block":
            raise ValueError("model.freeze 'last_block' is not known of a study's own network: set it to 'none' or 'head_only'")
        if STUDY_CODE.fullmatch(self.loss.name) and self.loss.class_weights != "none":
            raise ValueError(
                "loss.class_weights are of the listed losses: a study's own loss takes class_counts and weighs by itself"
            )
        if self.model.head_first_rounds >= self.rounds and self.model.head_first_rounds > 0:
            raise ValueError("model.head_first_rounds must be smaller than rounds")
        needed = self.training.plateau.patience_rounds + 3 + self.evaluation.with_training
        if self.training.schedule == "plateau" and (validated := sum(map(self.validates, range(1, self.rounds + 1)))) < needed:
            raise ValueError(
                f"training.schedule is 'plateau', but with training.plateau.patience_rounds {self.training.plateau.patience_rounds} the "
                f"rate can fall after {needed - 1} validated rounds at the earliest, and {validated - 1} come before the last; take more "
                "rounds, less patience or another schedule"
            )
        if self.training.batch_size == 1 and self.model.trains_batch_norm and self.privacy.mechanism == "none":
            raise ValueError(
                "training.batch_size is 1 but BatchNorm cannot normalise a single image; take at least 2, or set model.norm to 'group'"
            )
        return self

    @model_validator(mode="after")
    def _check_parent(self) -> ExperimentConfig:
        if self.parent is not None and self.model.weights in ("none", "imagenet"):
            raise ValueError("parent names the bundle that the run starts from, but model.weights is no path of one")
        return self

    @model_validator(mode="after")
    def _check_local_steps(self) -> ExperimentConfig:
        check_volume_settings(self)
        check_micro_batches(self)
        check_local_sgd(self)
        check_weights(self)
        check_asynchronous(self)
        check_judging_in_training(self)
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> ExperimentConfig:
        check_dp_sgd(self)
        check_central_privacy(self)
        check_cross_site(self)
        check_secure_aggregation(self)
        return self
