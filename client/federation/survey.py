"""A site's answer to a survey before training: its patients by label, sex, age and so on, in tables in which nobody can be found.

answer_survey(instruction, config, policy)   the reply: what the policy's `survey` lists, and no more
count_cells(dataset, fields)                 the cell of each patient, by one image: the first with pneumonia, else the first

Without noise counts are in tens with small cells left out (`client.federation.small_cells`), by the site's own key: the same patients have
the same table however often it is asked (cell keys: Fraser and Wooton 2005), so that nothing can be averaged. A table is about a whole
version of the patients, as an evaluation is (`client.federation.evaluations`): who joins waits until twenty did, and where fewer than that
left or changed their cell nothing is told. Images are prepared as by default and all labels count, whatever the experiment says, so that no
setting of it asks about other patients or cuts grey levels otherwise. Only the table by label follows the experiment, where its classes are
own ones, and a site tells patients by label by one list of classes only, the first: two tables of overlapping classes, each rounded by
itself, would say more together than either may. `work_dir/surveys/` keeps what was told, with patients by keyed hashes only.

With the policy's `count_noise` counts have Gaussian noise in place of random rounding, each table is paid for in the ledger once, and is
rounded to tens with small cells left out after that, which costs nothing more. A patient is in one cell of a table: one patient more or
less moves the counts by 1 in L2 norm, one image at most by sqrt(2), since it may take the place of the image that counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from pneumofed.client.federation.evaluations import admit_units, read_evaluations
from pneumofed.client.federation.policy import local_now
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE, read_site_manifest
from pneumofed.client.federation.small_cells import LEAST_CHANGE, ToldTable, choose_table
from pneumofed.common.config.classes import LabelTask
from pneumofed.common.config.experiment import ExperimentConfig, ImageConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy, SurveyField
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.errors import BudgetError, PolicyError
from pneumofed.common.files import StateFile
from pneumofed.common.imaging.dicom_header import Acquisition, read_acquisition
from pneumofed.common.imaging.patient_groups import groups_of
from pneumofed.common.imaging.volumes import mean_hounsfield, read_volume_acquisition
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE, RandomStream, own_secret, round_key
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import Content
from pneumofed.common.wire.survey import (
    FIELDS,
    NOT_STATED,
    SMALL_CELL,
    SurveyAnswer,
    manufacturer_of,
    own_classes,
    pack_survey,
    survey_cells,
    survey_fields,
)

logger = logging.getLogger(__name__)

SURVEYS_FOLDER = "surveys"
"""In the work folder: for each field FIELD.json, which patients answers were about, and FIELD-told.json, the tables."""
OWN_LABELS, FIRST_LABELS = "label-own-", "label-first"
"""Before the hash of a list of own classes; and the file that names the list by which labels were told first."""
OPENED = ("year", "image_size", "slices", "slice_step")
LEAST_PATIENTS = LEAST_CHANGE
"""Fewer are no survey; `min_validation_patients` may ask for more."""
VOLUME_IMAGE = ImageConfig(size_px=64, slices=32)
"""As which CT volumes are prepared, whatever the experiment says: that of configs/ct.yaml."""
Cells = Mapping[str, str]
"""Patient -> cell."""


def answer_survey(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Content:
    """Counts the site's patients by the fields that are asked for and that the policy lets leave.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came; whether it allows a survey at all was decided on arrival.

    Raises:
        PolicyError: too few patients, or no table may leave.
        BudgetError: the ledger has no budget for noised tables.
        DataError: the site's data cannot be read.
    """
    classes, fields = own_classes(instruction.experiment.task), [one for one in instruction.survey if one in policy.survey]
    sets = _load_sets(config, instruction.experiment, fields)
    told: dict[SurveyField, dict[str, int]] = {}
    sizes = []
    spent: BudgetError | None = None
    cells: dict[SurveyField, Cells] = {}
    for dataset in {id(one): one for one in sets.values()}.values():
        cells |= count_cells(dataset, [field for field in sets if sets[field] is dataset], classes)
    for field, dataset in sets.items():
        try:
            if policy.count_noise is None:
                table = _unnoised(field, cells[field], instruction, config, policy)
            else:
                table = _noised(dataset, field, cells[field], instruction, config, policy)
        except BudgetError as error:  # what was paid for is told all the same
            spent, table = error, None
        if table is not None:
            told[field] = table[0]
            sizes.append(table[1])
    if spent and not told:
        raise spent
    if not told:
        raise PolicyError("survey", "no table may leave: few patients changed since the last answer, or cells are too small")
    missing = [field for field, table in told.items() if not set(table) - {NOT_STATED}]
    withheld = [field for field in instruction.survey if field not in told]
    tables = {field: table for field, table in told.items() if field not in missing}
    deviation = None if policy.count_noise is None else policy.count_noise * _sensitivity(policy)
    answer = SurveyAnswer(
        patients=sizes[0], tables=tables, missing=tuple(missing), withheld=tuple(withheld), noise=deviation, classes=classes
    )
    return pack_survey(config.name, answer)


def _load_sets(config: SiteConfig, experiment: ExperimentConfig, fields: Sequence[SurveyField]) -> dict[SurveyField, Dataset]:
    """The images that each table is about: all of the named labels, whatever the experiment asks, and of own classes for labels only.

    Raises:
        PolicyError: too few patients for any table.
    """
    manifest, cache, task = read_site_manifest(config), Path(config.work_dir) / "cache", experiment.task
    image = VOLUME_IMAGE if experiment.image.slices else ImageConfig()
    tasks: dict[SurveyField, LabelTask] = {one: task if one == "label" and own_classes(task) else "binary" for one in fields}
    loaded = {one: load_dataset(manifest, one, image, cache) for one in dict.fromkeys(tasks.values())}
    patients = {one: len(set(dataset.patients)) for one, dataset in loaded.items()}
    if max(patients.values(), default=0) < LEAST_PATIENTS:
        raise PolicyError("survey", f"{max(patients.values(), default=0)} patients, a survey needs {LEAST_PATIENTS}")
    return {field: loaded[one] for field, one in tasks.items() if patients[one] >= LEAST_PATIENTS}


def count_cells(dataset: Dataset, fields: Sequence[SurveyField], classes: Sequence[str] = ()) -> dict[SurveyField, Cells]:
    """Finds the cell of each patient in each table, `NOT_STATED` where it is not known, or the field is not of such images.

    Args:
        dataset: the site's images, with the rows of its manifest.
        fields: what is counted; files are opened again only for `OPENED`.
        classes: that labels are counted by, which `dataset` was loaded for; none: by the label itself.
    """
    order = sorted(range(len(dataset)), key=lambda row: (-int(dataset.labels[row] > 0), dataset.digests[row]))
    chosen = {dataset.patients[row]: row for row in reversed(order)}
    images = Counter(dataset.patients)
    read = read_volume_acquisition if dataset.pixels.ndim == 4 else _acquisition
    taken = {row: read(dataset.records[row].path) for row in chosen.values()} if set(OPENED) & set(fields) else {}
    finders: dict[SurveyField, Callable[[str, int], str | None]] = {
        "label": lambda _, row: classes[dataset.labels[row]] if classes else dataset.records[row].label,
        "manufacturer": lambda _, row: manufacturer_of(dataset.records[row].manufacturer),
        "year": lambda _, row: _year(taken[row]),
        "image_size": lambda _, row: _from(FIELDS["image_size"], (256, 512, 1024, 2048), _side(taken[row])),
        "grey_level": lambda _, row: FIELDS["grey_level"][int(np.mean(dataset.pixels[row]) // 32)],
        "contrast": lambda _, row: FIELDS["contrast"][min(6, int(np.std(dataset.pixels[row]) // 16))],
        "slices": lambda _, row: _from(FIELDS["slices"], (50, 100, 200, 400), getattr(taken[row], "slices", None)),
        "slice_step": lambda _, row: _from(FIELDS["slice_step"], (1.0, 2.0, 3.0, 5.0), getattr(taken[row], "step_mm", None)),
        "hounsfield": lambda _, row: _from(FIELDS["hounsfield"], range(-900, -499, 100), mean_hounsfield(dataset.pixels[row])),
        "images": lambda patient, _: _from(FIELDS["images"], (2, 3, 6), images[patient]),
        **{kind: _group_finder(dataset.records, kind) for kind in ("view", "sex", "age")},
    }
    others = set(FIELDS) - set(survey_fields(dataset.pixels.ndim == 4))  # `grey_level` and `hounsfield` would be one number twice
    finders |= dict.fromkeys(others, lambda _, __: None)
    return {
        field: {patient: finders[field](patient, row) or NOT_STATED for patient, row in sorted(chosen.items())}
        for field in fields
    }


def read_surveys(work_dir: Path) -> list[str]:
    """Says how many surveys were answered, for people, by field.

    Raises:
        PolicyError: a count is damaged.
    """
    now, said = local_now(), []
    own = sorted(path.stem for path in (work_dir / SURVEYS_FOLDER).glob(f"{OWN_LABELS}*.json") if not path.stem.endswith("-told"))
    for stem in (*FIELDS, *own):
        name = f"{SURVEYS_FOLDER}/{stem}.json"
        if (work_dir / name).exists():
            found = read_evaluations(work_dir, name)
            about = [f"{version.answers} on a set of {len(version.units)} patients" for version in found.versions]
            what = "label, by own classes" if stem in own else stem
            said.append(f"surveys answered on {what}: {found.today(now)} in the last 24 hours; {', '.join(about)}")
    return said


def _unnoised(
    field: SurveyField, cells: Cells, instruction: Instruction, config: SiteConfig, policy: SitePolicy
) -> tuple[dict[str, int], int] | None:
    """The table of one version of the patients, and their number in tens; None where it may not leave."""
    work_dir, classes = Path(config.work_dir), own_classes(instruction.experiment.task)
    stem, cell_names = _stem(field, classes), (*survey_cells(field, classes), NOT_STATED)
    secret = own_secret(work_dir, SPLIT_KEY_FILE if config.policy else NOISE_KEY_FILE)
    names = {patient: round_key(secret, ("survey", patient)).hex()[:32] for patient in cells}
    units = {names[who]: round_key(secret, ("survey", field, who, cell)).hex()[:32] for who, cell in cells.items()}
    if config.policy is not None:
        least = max(LEAST_PATIENTS, policy.min_validation_patients)
        own = policy.model_copy(update={"min_validation_patients": least, "max_evaluations_per_data": sys.maxsize})
        request = RunRequest.of(instruction.experiment, "query", instruction.run, instruction.round, survey=instruction.survey)
        try:
            units = dict(admit_units(units, request, own, work_dir / SURVEYS_FOLDER / f"{stem}.json", what="patients").units)
        except PolicyError as error:
            logger.info("survey: nothing of %s leaves (%s)", field, error)
            return None
        if field == "label" and not _is_first_list(work_dir / SURVEYS_FOLDER, stem):
            logger.info("survey: nothing of %s leaves (it was told by other classes before)", field)
            return None
    counts = Counter(dict.fromkeys(cell_names, 0))
    counts.update(cell for patient, cell in cells.items() if names[patient] in units)
    key = round_key(secret, ("survey rounding", field, *sorted(f"{one}{state}" for one, state in units.items())))
    simulated = config.policy is None
    table = (
        choose_table(counts, RandomStream(key)) if simulated else _told_once(_told_file(work_dir, stem, cell_names), key, counts)
    )
    return None if table is None else (dict(table.shown), len(units) // SMALL_CELL * SMALL_CELL)


def _stem(field: SurveyField, classes: Sequence[str]) -> str:
    """The name of a table's files; of own classes one a list of them, in whatever order."""
    if field != "label" or not classes:
        return field
    return OWN_LABELS + hashlib.sha256("/".join(sorted(classes)).encode()).hexdigest()[:16]


def _is_first_list(folder: Path, stem: str) -> bool:
    """Whether patients by label are told by these cells: the first list that was told stands from then on."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / FIRST_LABELS).open("x", encoding="ascii") as file:
            file.write("label" if (folder / "label-told.json").exists() else stem)
    except FileExistsError:
        pass
    return (folder / FIRST_LABELS).read_text(encoding="ascii") == stem


def _told_once(file: StateFile[dict[str, ToldTable | None]], key: bytes, counts: Mapping[str, int]) -> ToldTable | None:
    """The table of one version of the patients: as it was told, or one that may leave beside those of the other versions, kept first."""
    version = hashlib.sha256(key).hexdigest()[:32]
    try:
        with file.locked() as told:
            if version not in told:
                earlier = [table for table in told.values() if table is not None]
                told = {**told, version: choose_table(counts, RandomStream(key), earlier)}
                file.write(told)
            return told[version]
    except OSError as error:
        raise PolicyError("survey", f"{file.path} cannot be written: {error.strerror}; nothing leaves unkept") from error


def _told_file(work_dir: Path, stem: str, cells: tuple[str, ...]) -> StateFile[dict[str, ToldTable | None]]:
    """Version of the patients -> what was told of it; None where nothing could be."""

    def parse(content: bytes) -> dict[str, ToldTable | None]:
        return {
            str(version): None if table is None else ToldTable(int(table["patients"]), cells, dict(table["shown"]))
            for version, table in json.loads(content).items()
        }

    def dump(told: dict[str, ToldTable | None]) -> bytes:
        tables = {
            version: None if table is None else {"patients": table.patients, "shown": dict(table.shown)}
            for version, table in told.items()
        }
        return json.dumps(tables).encode()

    return StateFile(
        work_dir / SURVEYS_FOLDER / f"{stem}-told.json",
        kind="the tables that surveys were told",
        parse=parse,
        missing={},
        remedy="nothing of them leaves; restore it from a backup, or remove it and surveys/ with it to begin anew",
        refuse=lambda problem: PolicyError("survey", problem),
        dump=dump,
    )


def _noised(
    dataset: Dataset,
    field: SurveyField,
    cells: Cells,
    instruction: Instruction,
    config: SiteConfig,
    policy: SitePolicy,
) -> tuple[dict[str, int], int] | None:
    """The table with noise, and the sum of its counts in tens; None where no count is large enough.

    The noise is in the ledger before it is drawn, once for a table of these cells in this order: another list of own classes is another.
    """
    from pneumofed.client.privacy.entries import DataUnits  # Opacus costs a second to import
    from pneumofed.client.privacy.ledger import noise_paid_once

    exact, units, experiment = Counter(cells.values()), DataUnits(dataset.digests, dataset.patients), instruction.experiment
    names = (*survey_cells(field, own_classes(experiment.task)), NOT_STATED)
    about = (field, repr(names), repr(sorted(cells.items())))
    stream, deviation = noise_paid_once("survey", about, config, units, experiment, policy)
    noise = deviation * _sensitivity(policy) * stream.normal(len(names)).numpy()
    noisy = {name: exact[name] + float(value) for name, value in zip(names, noise, strict=True)}
    table = {name: SMALL_CELL * round(value / SMALL_CELL) for name, value in noisy.items() if value >= SMALL_CELL}
    return (table, max(0, math.floor(sum(noisy.values()) / SMALL_CELL)) * SMALL_CELL) if table else None


def _sensitivity(policy: SitePolicy) -> float:
    return 1.0 if policy.min_unit == "patient" else math.sqrt(2.0)


def _acquisition(path: Path) -> Acquisition | None:
    """Size and year of an image that was read before."""
    try:
        if (found := read_acquisition(path)) is not None:
            return found
        with PIL.Image.open(path) as image:
            return Acquisition(image.height, image.width, None)
    except Exception:  # Pillow's plugins raise nearly any class; the image counts as one of unknown size
        return None


def _group_finder(records: Sequence[ImageRecord], kind: str) -> Callable[[str, int], str | None]:
    groups = [groups_of(one.age_years, one.sex, one.view) for one in records]
    return lambda _, row: dict(groups[row].known()).get(kind)


def _side(taken: Acquisition | None) -> int | None:
    return None if taken is None else min(taken.rows, taken.columns)


def _year(taken: Acquisition | None) -> str | None:
    return None if taken is None else _from(FIELDS["year"], (2000, 2005, 2010, 2015, 2020, 2025), taken.year)


def _from(cells: Sequence[str], limits: Sequence[float], value: float | None) -> str | None:
    """The cell of a value; each limit is the least value of the next cell."""
    return None if value is None else cells[sum(value >= limit for limit in limits)]
