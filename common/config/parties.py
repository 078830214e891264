"""What each party keeps to itself: the hospital's own configuration, connection and policy, and the coordinator's configuration.

A policy's delta (`hospital_delta`) is the probability with which epsilon may fail to hold. It is the hospital's, who answers for its
patients. Within delta a mechanism may publish a patient's whole record, so that a budget at a large delta limits nothing. It has to be
small against 1 / patients (Ponomareva et al. 2023, "How to DP-fy ML", section 5.2.2), for which n^-1.1 is the usual rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from pneumofed.common.config.choices import ModelName, PrivacyUnit, StrategyName, Withheld
from pneumofed.common.config.classes import check_class_name
from pneumofed.common.config.experiment import Fraction, NonNegative, Positive, Section


def _check_labels(words: dict[str, str]) -> dict[str, str]:
    for label in words.values():
        check_class_name(label)
    return words


LabelWordPairs = Annotated[dict[Annotated[str, Field(min_length=1)], str], AfterValidator(_check_labels)]


class SiteConfig(Section):
    """What one hospital keeps to itself. It is never sent."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    """The site's name as the coordinator knows it."""
    manifest: str
    """CSV with one row an image; see `common.data.manifest`."""
    work_dir: str
    """The site's own folder: decoded cache, local state, log. Nothing is written elsewhere."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the training process; 0 leaves torch's choice. Fix it where runs must repeat bit for bit."""
    policy: str | None = None
    """The site's policy file (`SitePolicy`). Unset, as in simulation, nothing is refused."""
    model_dir: str | None = None
    """Where the model of the last evaluation is kept until the next round, `work_dir` if unset. Virtual hospitals share one folder."""
    clinical_columns: dict[str, str | None] = Field(default_factory=dict)
    """A run's clinical column -> the manifest's column that has it, where the two are spelt otherwise; null says that the site has none."""
    label_words: LabelWordPairs = Field(default_factory=dict)
    """The site's own words for labels, in any case: `TB: tuberculosis`. They count in every import and in a manifest that was written by
    hand; see `common.data.label_words`. They never leave."""
    connection: str | None = None
    """File with the paths of the site's node key and of the federation's certificate authority (`ConnectionConfig`), which secure
    aggregation needs. Unset, it is `connection.yaml` beside the site's own file."""


class ConnectionConfig(Section):
    """How a hospital reaches the coordinator (`connection.yaml` in the site folder). Relative paths are relative to that file."""

    coordinator: Annotated[str, Field(pattern=r"^[^\s/:]+:\d{1,5}$")]
    """HOST:PORT of the coordinator's gateway."""
    ca: str = "keys/ca.crt"
    """The federation's certificate authority (PEM), the only one that is trusted for this connection."""
    key: str = "keys/node"
    """The site's private node key (PEM, P-384), mode 0600. The coordinator knows its public half."""
    client_certificate: str | None = None
    """For mutual TLS at the coordinator's proxy: the site's certificate (PEM) for `client_key`."""
    client_key: str | None = None
    """The private key (PEM) of `client_certificate`."""


TAKEN_NAMES = frozenset({"test", "external", "validation", "training", "pooled"})
"""Of sets that every run has or may have; a table shows them side by side with named ones."""


def _listed_or_study_entry(value: Any, listed: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and re.fullmatch(r"study(:[0-9a-f]{12,64})?", value) else listed(value)


def _refuse_taken_name(name: str) -> str:
    if name in TAKEN_NAMES:
        raise ValueError(f"'{name}' has a meaning of its own; choose another name")
    return name


ModelEntry = Annotated[ModelName, WrapValidator(_listed_or_study_entry), PlainSerializer(str, return_type=str)]
SurveyField = Literal[
    "label", "view", "sex", "age", "manufacturer", "year", "image_size", "grey_level", "contrast", "images",
    "slices", "slice_step", "hounsfield",
]  # fmt: skip
"""What a survey counts patients by; the cells of each are in `common.wire.survey`."""
SURVEYED: tuple[SurveyField, ...] = ("label",)
"""What a survey is told where the policy says nothing."""


QuietHours = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]


class SitePolicy(Section):
    """What may run at one hospital (`policy.yaml` in the site folder). Only the hospital sets it, and it wins over every run.

    A run outside it is refused before any data is read, and the refusal is recorded in the site's audit log.
    """

    approved_apps: list[Annotated[str, Field(pattern=r"^(installed|[0-9a-f]{64})$")]] = Field(
        default_factory=lambda: ["installed"]
    )
    """SHA-256 of the app bundles that may run here. `installed` stands for the bundle of the very code that is installed here."""
    strategies: list[StrategyName] | None = None
    """Strategies that a run may use; unset allows all."""
    models: list[ModelEntry] | None = None
    """Networks that a run may train; unset allows all. A study's own network or loss is `study`, or `study:` with the first digits of its
    file's SHA-256, twelve at least: a list without either allows none."""
    min_patients: Annotated[int, Field(ge=1)] = 10
    """With fewer training patients the site takes no part: an update over few patients reveals much about each."""
    min_patients_private: Annotated[int, Field(ge=2)] = 20
    """With fewer training patients the site takes no part in a private run: of few patients no delta is small enough to mean anything."""
    min_validation_share: Fraction = 0.05
    """A run that keeps a smaller share of the patients for validation is refused. Who they are this site's own key decides."""
    max_validation_share: Fraction = 0.5
    """The same for a larger share."""
    min_validation_patients: Annotated[int, Field(ge=1)] = 20
    """No statistics leave of fewer validation patients, nor of others whom fewer tell apart from those answered on before."""
    max_evaluations_per_day: Annotated[int, Field(ge=0)] = 200
    """Evaluations that are answered within 24 hours, over all runs."""
    max_evaluations_per_data: Annotated[int, Field(ge=0)] = 1000
    """Evaluations that are answered on one and the same validation patients, over all runs."""
    score_bins: Literal[64, 128, 256, 512, 1024, 2048] = 512
    """How finely scores leave: so many bins of the logit, and sums over images in multiples of 1 / score_bins. 2048 is as computed."""
    open_statistics: bool = False
    """Whether statistics of the validation patients, and with `privacy.open_metrics` those of training, leave without noise although an
    epsilon limit is set. They come from the raw data, so that the limit says nothing of them; the rules above hold."""
    train_alone: bool = False
    """Whether a run with `evaluation.alone` may have this site train once by itself, as long as all rounds together take it, to compare
    its own model with the global one. Two more evaluations leave, and nothing of the own model."""
    share_own_model: bool = False
    """Whether in a run with `evaluation.cross_site` the model that this site trained alone leaves, to be judged by the other sites. It is
    of this hospital's images only and has no noise, so that it tells more of them than any global model. Needs `train_alone`."""
    survey: list[SurveyField] = Field(default_factory=lambda: list(SURVEYED))
    """What a survey before training may be told: patients by these fields, in tens, small cells left out (`client.federation.survey`).
    By default the label only, which enrolment in any run tells more finely; empty refuses every survey."""
    max_rounds_per_day: Annotated[int, Field(ge=0)] = 1000
    """Training rounds that are answered within 24 hours, over all runs."""
    max_epsilon: NonNegative | None = None
    """Privacy budget of the site's data over all runs (see `client.privacy.ledger`): a round beyond it, and every run that is not
    private at all, is refused. Unset sets no limit."""
    max_epsilon_per_study: NonNegative | None = None
    """The same for the runs of one experiment name. The coordinator chooses the name, so that only `max_epsilon` binds it."""
    max_delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """At which the limits are judged, or at a smaller one that a run planned with; a run that plans with a larger one is refused. Unset it
    is patients^-1.1 of the site, 0.001 at most (`common.config.parties`)."""
    min_unit: PrivacyUnit = "image"
    """What a private run must protect at least. With `patient`, a run that protects single images is refused."""
    withhold: list[Withheld] = Field(default_factory=list)
    """What never leaves this site, whatever a run asks for (see `client.federation.requests`): the report on its data (what was
    found, left out and why, of which class), the metrics of its training, the statistics of its validation. The run goes on without."""
    count_noise: Positive | None = None
    """Numbers of images leave with Gaussian noise of this deviation, for `min_unit` patient times `images_counted`. The ledger
    counts it, once for each state of the data. Unset they leave as they are. Under secure aggregation they are masked instead.
    Set, runs of `fednova` and `scaffold` are refused, which compute with exact numbers."""
    images_counted: Annotated[int, Field(ge=1)] = 5
    """Of a patient at most so many images are in numbers with noise where `min_unit` is patient: were it as many as a patient here has,
    the noise would tell that there is such a patient."""
    require_secure_aggregation: bool = False
    """Whether a run is refused in which the coordinator could see this site's update and counts."""
    min_sum_threshold: Annotated[float, Field(gt=0.5, le=1.0)] = 0.67
    """Smallest `secure_aggregation.threshold` of a run. Above two thirds a coordinator with up to a third of the sites on its side cannot
    tell two stories about who survived (Bonawitz et al. 2017, section 6.2); of more than 100 sites, with up to a fifth."""
    min_sites_in_sum: Annotated[int, Field(ge=3)] = 3
    """Fewest sites whose vectors are added up, this one included, in each sum of updates or validation statistics."""
    max_weight_in_sum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Largest share of one site in the mean of a secure sum that the run's terms allow."""
    max_sum_step: Positive = 1e-4
    """Coarsest step, in units of the parameters, in which a run may round updates; it grows with `secure_aggregation.clip_norm` and the
    number of sites, and coarse ones leave nothing of the small sites, so that the sum is the largest one's update."""
    min_neighbours: Annotated[int, Field(ge=4)] | None = None
    """With how many others each site of a secure sum must share masks (all of them, where there are fewer). Unset, as many as
    `common.secure_aggregation.masking.neighbours_needed` says: all up to 100 sites. A smaller number lets a coordinator that lies read
    this site's vector with fewer sites on its side."""
    quiet_hours: list[QuietHours] = Field(default_factory=list)
    """Times of day (local, e.g. `07:30-18:00`) in which nothing is trained here; may pass midnight."""


SetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$"), AfterValidator(_refuse_taken_name)]
"""A held-out set, e.g. `children` or `adults`. It stands in file names."""


class CentralSets(Protocol):
    """Settings that name held-out sets."""

    test_manifest: str | None
    external_manifest: str | None
    held_out: dict[SetName, str]
    reference_sets: list[str]


Sets = TypeVar("Sets", bound=CentralSets)


def check_reference_sets(settings: Sets) -> Sets:
    """Validates that `reference_sets` names held-out sets that there are; a ValueError names one that is not."""
    for name in settings.reference_sets:
        if name not in (known := central_manifests(settings)):
            raise ValueError(f"reference_sets: there is no held-out set {name}; there are {', '.join(known) or 'none'}")
    return settings


def reference_names(settings: CentralSets, present: Collection[str]) -> list[str]:
    """Lists which of the held-out sets that are `present` a bundle's reference is made of: `reference_sets`, else the first."""
    return [name for name in settings.reference_sets if name in present] or list(present)[:1]


def foreign_names(settings: CentralSets) -> list[str]:
    """Lists the held-out sets of other hospitals than those that train: `external`, and where `reference_sets` tells which sets are of
    their own patients, all others."""
    own = {"test", *settings.reference_sets}
    return [name for name in central_manifests(settings) if name == "external" or (settings.reference_sets and name not in own)]


def central_manifests(settings: CentralSets) -> dict[str, str]:
    """Lists the manifest of each held-out set: `test`, `external`, then the named ones; those that are not configured are left out."""
    named = {"test": settings.test_manifest, "external": settings.external_manifest}
    return {**{name: path for name, path in named.items() if path}, **settings.held_out}


class CoordinatorConfig(Section):
    """What the coordinator keeps to itself: its run folder and the held-out sets it evaluates the model on."""

    _reference_sets = model_validator(mode="after")(check_reference_sets)

    run_dir: str
    test_manifest: str | None = None
    external_manifest: str | None = None
    held_out: dict[SetName, str] = Field(default_factory=dict)
    """Manifest of each further set by its name."""
    reference_sets: list[str] = Field(default_factory=list)
    """Held-out sets of patients like those of the hospitals that train, e.g. `[test, adults]`: a bundle judges images that are like
    those of any of them. Without: like those of the first set."""
    cache_dir: str | None = None
    audit_log: str | None = None
    """The coordinator's audit log; unset, as in simulation, none is kept."""
    key_roster: str | None = None
    """The sites' public node keys, signed when they were provisioned (`roster.json`); secure aggregation needs it."""
    resume: bool = False
    survey: list[SurveyField] | None = None
    """What sites are asked in a survey, in the place of a run; unset, the run's rounds follow."""
    slow: dict[str, Annotated[float, Field(gt=0.0)]] | None = None
    """In simulation: by site, how many times as long as others it takes to train; the run then goes by a virtual clock
    (`server.federation.asynchronous`). Unset, as in a real federation, updates are taken as they come."""
    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 0


DELTA_CEILING = 1.0e-3
"""No delta is larger unless a hospital writes so: for few patients n^-1.1 is no small number."""


def default_delta(patients: int) -> float:
    """Computes n^-1.1 of so many patients, `DELTA_CEILING` at most: where a run or a policy names no delta.

    Args:
        patients: of the site, training and validation together.
    """
    return min(DELTA_CEILING, max(1, patients) ** -1.1)


def hospital_delta(policy: SitePolicy, patients: int) -> float:
    """Returns the delta at which a hospital's limits hold: its `max_delta`, or where it set none the default of its patients.

    Args:
        policy: the hospital's.
        patients: of the site, training and validation together.
    """
    return default_delta(patients) if policy.max_delta is None else policy.max_delta
