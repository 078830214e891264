"""What the room's HTTP interface takes and gives. A patient's number stands only in bodies, never in an address or a log."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pneumofed.common.config.classes import CLASS_NAME, Positive
from pneumofed.common.imaging.patient_groups import AgeGroup
from pneumofed.common.imaging.types import Format
from pneumofed.common.model_bundle.population import PopulationStatus
from pneumofed.common.model_bundle.suitability import Verdict
from pneumofed.inference.reading_room.clinical import ClinicalAnswer, ClinicalColumnView, ClinicalView, EvidenceView, ValueProblem
from pneumofed.inference.reading_room.image_facts import FileFacts

Role = Literal["radiologist", "admin"]
Label = Annotated[str, StringConstraints(pattern=f"^{CLASS_NAME.pattern}$")]
"""What a reader may say: one of `ModelInfo.labels`. All but `unsure` are labels of the manifest (`common.config.classes`)."""
Status = Literal["open", "read"]
"""`read` as soon as somebody gave a finding."""
Sort = Literal["arrival", "probability"]
MapWarning = Literal["outside", "marks", "too_coarse", "no_lungs", "empty"]
"""Where the weight of a map lies: too much outside the lungs, much on markers or text, a map too coarse to tell, lungs not found and so
unknown, nowhere. As `inference.explain.focus.Misplaced`, in lower case."""

ErrorCode = Literal[
    # who asks
    "not_signed_in", "wrong_login", "locked", "forbidden", "no_csrf", "foreign_page", "weak_password",
    # what is asked
    "invalid_request", "not_found", "wrong_method", "no_map", "request_too_large", "too_many_files", "too_slow",
    "busy", "not_ready", "disk_full", "internal",
    # why a file is refused; as `common.errors.SkipReason`, in lower case
    "empty", "unknown_format", "archive_file", "corrupt", "no_pixel_data", "unsupported_compression", "unsupported_bits", "colour",
    "multi_frame", "too_large", "too_small", "constant", "unreadable", "file_too_large",
    # why a CT series is refused, or a radiograph where the model judges CT, or the reverse; likewise
    "ct_image", "not_ct", "no_slices", "mixed_series", "missing_slices", "gantry_tilt", "no_geometry", "time_series", "not_hounsfield",
    "no_nibabel", "no_slice",
    # why clinical values are refused, or there is no evidence
    ValueProblem, "other_model", "no_evidence",
]  # fmt: skip
"""Fixed words, for the page to translate."""

CaseId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class Strict(BaseModel):
    """A request's body: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(BaseModel):
    """The body of every answer above 399. `detail` is an English sentence without any value of the request; of a CT series with counts."""

    error: ErrorCode
    detail: str
    retry_sec: int | None = Field(default=None, description="When to try again; with `locked` and `busy`.")
    column: str | None = Field(default=None, description="With `value_...`: of the model's clinical columns the one it is about.")


# --- who


class Credentials(Strict):
    """A user's name and password."""

    user: str = Field(max_length=64)
    password: str = Field(max_length=256)


class NewPassword(Strict):
    """For changing one's own password; at least 10 characters."""

    old: str = Field(max_length=256)
    new: str = Field(max_length=256)


class SessionInfo(BaseModel):
    """Who is signed in. `csrf` goes into the header `X-CSRF-Token` of every request that is no GET."""

    user: str
    role: Role
    csrf: str
    idle_sec: int = Field(description="After as many seconds without a request the session ends.")


class Limits(BaseModel):
    """Of uploads."""

    file_bytes: int
    files: int = Field(description="In one request; where the model judges CT, of one series.")
    request_bytes: int


class ModelInfo(BaseModel):
    """The model bundle that judges."""

    name: str
    digest: str
    classes: list[str]
    positive: Positive = Field(description="What all classes but normal are called together: the probability is of these.")
    labels: list[Label] = Field(description="What a reader may say of a case, in the order of the page.")
    phantom: bool = Field(description="Trained on drawn images: its judgements say nothing about patients; the page says so.")
    threshold: float = Field(description="On the calibrated probability: at or above it the verdict is what `positive` says.")
    threshold_of: str | None = Field(
        default=None,
        description="The hospital on whose own patients the threshold was chosen; null: those of all hospitals of the run.",
    )
    clinical: list[ClinicalColumnView] = Field(
        default_factory=list, description="Clinical values that it takes beside an image; empty: the image only."
    )
    slices: int = Field(default=0, description="Above 0 it judges CT series, so many slices of each; 0: radiographs.")
    signer: str = Field(description="Fingerprint of the key that signed the bundle.")
    created: datetime


class RoomInfo(BaseModel):
    """What the page needs to know once, after the login."""

    hospital: str
    model: ModelInfo
    limits: Limits
    retention_days: int


class RoomHealth(BaseModel):
    """`ready` is false while the model cannot judge (it is starting, or the store is full or not writable)."""

    live: bool = True
    ready: bool


# --- judgements


class PopulationView(BaseModel):
    """Whether the model was judged for such a patient. The page has to show it beside the judgement."""

    status: PopulationStatus
    age_group: AgeGroup | None
    sex: Literal["F", "M"] | None
    view: Literal["AP", "PA"] | None
    outside: list[Literal["age", "sex", "view"]] = Field(
        description="In which of these the patient is of no group that it was judged for."
    )
    judged: dict[str, list[str]] = Field(description="By the same, the groups that it was judged for.")
    sentence: str = Field(description="The same in plain English.")


class JudgementOut(BaseModel):
    """The model's answer for one image."""

    verdict: Verdict
    probability: float | None = Field(
        ge=0,
        le=1,
        description="Calibrated, of all classes but normal; null if it cannot be judged.",
    )
    low: float | None = Field(ge=0, le=1, description="Lower end of its 95 % interval.")
    high: float | None = Field(ge=0, le=1)
    threshold: float = Field(ge=0, le=1)
    classes: dict[str, float] = Field(description="Probability by class, summing to 1; empty if it cannot be judged.")
    reasons: list[str] = Field(description="Why it cannot be judged; empty for other verdicts.")
    population: PopulationView
    clinical: ClinicalAnswer | None = Field(default=None, description="With which clinical values; null where none is known.")


class Area(BaseModel):
    """A rectangle in parts of the image's width and height; (0, 0) is the upper left corner. May reach beyond the image."""

    left: float
    top: float
    width: float
    height: float


class HeatMap(BaseModel):
    """Where the evidence for pneumonia lies: `values` row by row, in [0, 1], in parts of the image's strongest evidence for or against.

    Spread it over `area`. Of a whole CT series plane by plane from the feet, spread over `span`; of one of its slices it is one plane."""

    planes: int = Field(default=1, description="Above 1 only in the answer of `/api/explain` for a CT series.")
    span: tuple[float, float] | None = Field(
        default=None, description="With several planes: start and length of what they cover, in parts of the stack of slices."
    )
    rows: int
    columns: int
    values: list[float]
    area: Area
    warnings: list[MapWarning] = Field(description="Why where it lies is doubtful; empty where it lies on the lungs.")


class ExplanationView(BaseModel):
    """A judgement and its map, which an image that cannot be judged has not, nor a model without global average pooling."""

    judgement: JudgementOut
    map: HeatMap | None
    evidence: EvidenceView | None = Field(
        default=None, description="Null where no clinical value is known, or the model cannot say it."
    )


# --- cases


class WorklistQuery(Strict):
    """Which cases, in which order. A POST body, since the text may be a patient's number."""

    text: str = Field(
        default="",
        max_length=64,
        description="Part of a patient's number or of an accession number, or the beginning of a case id.",
    )
    verdict: list[Verdict] = Field(default_factory=list, max_length=4, description="Empty: all.")
    status: Status | None = None
    finding: list[Label] = Field(default_factory=list, max_length=24, description="Current finding is one of these. Empty: all.")
    arrived_from: date | None = None
    arrived_to: date | None = Field(default=None, description="The last day, included.")
    sort: Sort = "arrival"
    descending: bool = True
    offset: int = Field(default=0, ge=0, le=1_000_000)
    limit: int = Field(default=50, ge=1, le=200)


class CaseLine(BaseModel):
    """One case in the worklist."""

    id: CaseId
    arrived: datetime
    study_date: date | None
    patient: str = Field(description="The hospital's patient number; empty where the file has none.")
    accession: str
    modality: str | None
    view: str | None
    sex: Literal["M", "F"] | None
    age_years: float | None
    verdict: Verdict
    probability: float | None = Field(description="Null, like its interval, where the verdict is `cannot judge`.")
    low: float | None
    high: float | None
    reasons: list[str]
    positive: Positive = Field(description="What its model calls all classes but normal; the probability is of these.")
    likeliest: str | None = Field(description="With the verdict `finding`: the most probable class but normal.")
    threshold: float = Field(description="At which the case was judged; the room's may be another by now.")
    status: Status
    population: PopulationView | None = Field(description="Null for cases that an earlier version judged.")
    finding: Label | None = Field(description="The latest finding.")
    finding_by: str | None


class Worklist(BaseModel):
    """One page of cases; `total` counts all that match, `open` those of them that nobody has read."""

    total: int
    open: int
    cases: list[CaseLine]


class ViewWindow(BaseModel):
    """Grey values from `center - width / 2` (black) to `center + width / 2` (white), in parts of the pixels' full range, 65535."""

    center: float
    width: float


class ImageFacts(BaseModel):
    """The image of a case."""

    height: int
    width: int
    bits: int
    format: Format
    manufacturer: str | None
    window: ViewWindow = Field(description="The one to begin with.")
    facts: FileFacts = Field(description="Units, size of a pixel and technical attributes, as far as the file states them.")


class ReaderFinding(BaseModel):
    """What a reader said. Never changed; the latest counts."""

    id: int
    by: str
    at: datetime
    label: Label
    note: str
    agrees: bool | None = Field(description="With the model's verdict; None where either says nothing.")


class NewFinding(Strict):
    """A reader's finding on a case."""

    label: Label
    note: str = Field(default="", max_length=2000)


class CaseDetail(CaseLine):
    """All of one case."""

    classes: dict[str, float]
    model: str = Field(description="Name of the model that judged it.")
    model_digest: str
    image: ImageFacts
    has_map: bool
    map_warnings: list[MapWarning] = Field(description="As the map's own `warnings`.")
    clinical: ClinicalView | None = Field(description="The values it was judged with; null where none was ever known.")
    findings: list[ReaderFinding] = Field(description="Oldest first.")
    previous: list[CaseLine] = Field(description="Other cases of the same patient, newest first, 20 at most.")


class Uploaded(BaseModel):
    """What came of one file of an upload, or of one CT series, in the order sent. `known`: the same file was there already, under this
    case."""

    index: int = Field(description="Place of the file in the request; of a series of several files, of the first.")
    outcome: Literal["new", "known", "refused"]
    case: CaseId | None
    error: ErrorCode | None
    detail: str
    cause: str = Field(
        default="", description="How many slices of a CT series are wrong and where, in English; the end of `detail`."
    )
    column: str | None = Field(default=None, description="As in `ErrorBody`.")
    patient_name: str = Field(
        default="",
        description="Of a new DICOM file, for whoever sent it to match it with; the room keeps no name beside the file.",
    )


class Upload(BaseModel):
    """What came of an upload, file by file."""

    files: list[Uploaded]


class NextQuery(Strict):
    """The case after `after` in the order of `query` (its offset and limit do not matter); without `after` the first."""

    after: CaseId | None = None
    query: WorklistQuery = WorklistQuery()
    backwards: bool = False


class Next(BaseModel):
    """The next case, if there is one."""

    case: CaseId | None
    remaining: int = Field(description="How many come after `case`.")
