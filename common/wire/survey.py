"""A survey: what a coordinator asks before any training, and what a site answers. Patients are counted, never images or values.

    FIELDS                 what may be asked, with the cells of each table; there are no others, so that no text of a site travels
    SurveyAnswer           tables of patients, rounded to tens, with small cells left out (see `client.federation.survey`)
    pack_survey, unpack_survey    the reply, as records {site, survey}

Each table is of one field: patients by label and by sex are asked, never by label and sex together, since the tables of two fields at
once would need cells to be hidden in each of them for the sake of the others (linked tables: Hundepool et al. 2012, "Statistical
Disclosure Control", chapters 4 and 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from flwr.app import ConfigRecord
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from pneumofed.common.config.classes import MOST_CLASSES, LabelTask, classes_of
from pneumofed.common.config.experiment import Positive, Section
from pneumofed.common.config.parties import SurveyField
from pneumofed.common.data.manifest import LABELS
from pneumofed.common.errors import MessageError
from pneumofed.common.imaging.patient_groups import AGE, KINDS, SEX, VIEW
from pneumofed.common.wire.fields import MOST_COUNT, bounded_text
from pneumofed.common.wire.messages import SURVEY, Content, Presence, pack_presence, record_named, unpack_presence

SMALL_CELL = 10
"""Cells of fewer patients are not told, and counts are multiples of it. Ten is what trusted research environments and health statistics
commonly ask for (NHS England hides up to 7 in hospital statistics and rounds to 5; Medicare in the US hides up to 10)."""
NOT_STATED = "not stated"
"""A cell of every table: patients of whom the site does not know it."""
ANSWER = "answer"
MAX_ANSWER_BYTES = 2**15

FIELDS: dict[SurveyField, tuple[str, ...]] = {
    "label": LABELS,
    "view": tuple(KINDS[VIEW]),
    "sex": tuple(KINDS[SEX]),
    "age": tuple(str(group) for group in KINDS[AGE]),
    "manufacturer": (
        *("Agfa", "Canon", "Carestream", "Fujifilm", "GE", "Konica Minolta", "Philips", "Samsung", "Shimadzu", "Siemens"),
        *("Toshiba", "another"),
    ),
    "year": ("before 2000", "2000-2004", "2005-2009", "2010-2014", "2015-2019", "2020-2024", "2025 and later"),
    "image_size": ("below 256", "256-511", "512-1023", "1024-2047", "2048 and above"),
    "grey_level": ("0-31", "32-63", "64-95", "96-127", "128-159", "160-191", "192-223", "224-255"),
    "contrast": ("0-15", "16-31", "32-47", "48-63", "64-79", "80-95", "96 and above"),
    "images": ("1", "2", "3-5", "6 and more"),
    "slices": ("below 50", "50-99", "100-199", "200-399", "400 and above"),
    "slice_step": ("below 1", "1 to 1.9", "2 to 2.9", "3 to 4.9", "5 and above"),
    "hounsfield": ("below -900", "-900 to -801", "-800 to -701", "-700 to -601", "-600 to -501", "-500 and above"),
}
"""Field -> its cells, in the order of all tables, without `NOT_STATED`; of labels those of the named tasks."""

TITLES: dict[SurveyField, str] = {
    "label": "label; pneumonia as such where its cause is not stated",
    "view": "view",
    "sex": "sex",
    "age": "age group",
    "manufacturer": "manufacturer",
    "year": "year of the examination",
    "image_size": "shorter side of the image, in pixels",
    "grey_level": "mean grey level of the image, 0 to 255",
    "contrast": "standard deviation of the grey levels",
    "images": "images of the patient",
    "slices": "slices of the CT volume",
    "slice_step": "step between slices, in mm",
    "hounsfield": "mean Hounsfield units of the 400 mm around the middle, within -1350 to 150",
}
"""Field -> what a table of it counts, in words."""


OF_RADIOGRAPHS: tuple[SurveyField, ...] = ("view", "grey_level", "contrast")
OF_VOLUMES: tuple[SurveyField, ...] = ("slices", "slice_step", "hounsfield")


def survey_fields(volumes: bool) -> list[SurveyField]:
    """Lists what patients can be counted by, of CT volumes or of radiographs."""
    return [field for field in FIELDS if field not in (OF_RADIOGRAPHS if volumes else OF_VOLUMES)]


def own_classes(task: LabelTask) -> tuple[str, ...]:
    """Returns the classes that patients are counted by in the place of `LABELS`; none where these hold all classes of `task`."""
    classes = classes_of(task)
    return () if set(classes) <= set(LABELS) else classes


def survey_cells(field: SurveyField, classes: Sequence[str] = ()) -> tuple[str, ...]:
    """Lists the cells of a table, without `NOT_STATED`.

    Args:
        field: what is counted.
        classes: of `own_classes`.
    """
    return tuple(classes) if field == "label" and classes else FIELDS[field]


def manufacturer_of(text: str | None) -> str | None:
    """Finds a known manufacturer in free text such as `FUJIFILM Corporation`; `another` where it names none of them."""
    if not text or not text.strip():
        return None
    words = text.lower()
    if "kodak" in words:  # whose radiography became Carestream Health in 2007
        return "Carestream"
    if words.split()[0].strip("',.\"") in ("ge", "gems") or "general electric" in words:
        return "GE"
    known = {"fuji": "Fujifilm", "konica": "Konica Minolta", "minolta": "Konica Minolta"}
    known |= {name.lower(): name for name in FIELDS["manufacturer"] if name not in ("GE", "another")}
    return next((name for word, name in known.items() if word in words), "another")


Tens = Annotated[int, Field(ge=0, le=MOST_COUNT, multiple_of=SMALL_CELL)]


class SurveyAnswer(Section):
    """What one site tells.

    Each field that was asked stands in one place. A cell that is not in its table has fewer than `SMALL_CELL` patients, or none.
    """

    patients: Tens
    """Of the first table, rounded down."""
    tables: dict[SurveyField, dict[str, Tens]] = Field(default_factory=dict)
    """Field -> cell -> patients."""
    missing: tuple[SurveyField, ...] = ()
    """What the site does not know of enough patients for one cell, e.g. since its images state no age."""
    withheld: tuple[SurveyField, ...] = ()
    """What it does not tell. Why is its own: by its policy, since few patients changed, or since a table would give a small cell away."""
    noise: Positive | None = None
    """Standard deviation of the Gaussian noise on each count before it was rounded; None where there is none."""
    classes: Annotated[tuple[str, ...], Field(max_length=MOST_CLASSES)] = ()
    """The planned run's, which labels were counted by; empty for `LABELS`."""

    @model_serializer(mode="wrap")
    def _leave_out_classes(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if not self.classes:  # as before there were own classes
            values.pop("classes", None)
        return values

    @model_validator(mode="after")
    def _check_cells(self) -> SurveyAnswer:
        for field, table in self.tables.items():
            if not table or not set(table) <= {*survey_cells(field, self.classes), NOT_STATED}:
                raise ValueError(f"{field}: cells that are none")
            if min(table.values()) < SMALL_CELL:
                raise ValueError(f"{field}: a small cell")
        stated = [*self.tables, *self.missing, *self.withheld]
        if len(stated) != len(set(stated)):
            raise ValueError("a field in two places")
        return self

    def known(self, field: SurveyField) -> dict[str, int]:
        """Returns the cells of `field` that are told, without those of whom it is not known; empty where there is no table."""
        return {cell: patients for cell, patients in self.tables.get(field, {}).items() if cell != NOT_STATED}


def pack_survey(site: str, answer: SurveyAnswer) -> Content:
    """Packs a site's answer.

    Args:
        site: its name.
        answer: what may leave.
    """
    content = pack_presence(Presence(site, ""))
    content[SURVEY] = ConfigRecord({ANSWER: answer.model_dump_json()})
    return content


def unpack_survey(content: Content, asked: Sequence[SurveyField], classes: Sequence[str] = ()) -> tuple[Presence, SurveyAnswer]:
    """Unpacks a site's answer.

    Args:
        content: of the reply, not trusted.
        asked: every field stands in the answer once, and no other.
        classes: that labels were to be counted by, of `own_classes`.

    Raises:
        MessageError: it is no such answer, as of a site that knows no surveys.
    """
    presence = unpack_presence(content)
    if SURVEY not in content.config_records:
        raise MessageError("the site answered without a survey; install the same version")
    text = bounded_text(record_named(content.config_records, SURVEY).get(ANSWER), "survey", MAX_ANSWER_BYTES)
    try:
        answer = SurveyAnswer.model_validate_json(text)
    except ValidationError:
        raise MessageError("survey: expected tables of the agreed cells in multiples of ten") from None
    if {*answer.tables, *answer.missing, *answer.withheld} != set(asked):
        raise MessageError("survey: expected every field that was asked, and no other")
    if answer.classes != tuple(classes):
        raise MessageError("survey: labels were counted by other classes than the planned run's; install the same version")
    return presence, answer
