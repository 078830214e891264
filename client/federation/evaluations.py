"""Statistics of validation patients that leave without noise: of how many, how often, how finely, and what two answers tell apart.

Whoever chooses the weights chooses the question, and exact answers about few patients are their images in the end. So an answer

    is of `min_validation_patients` at least, and always of a whole version: a set of patients in a state (images, their labels, and
    the values that a network may take beside them)
    is of the version before, as long as fewer than `min_validation_patients` joined since; they wait
    is none, where fewer left or changed and the version before can no longer be asked: the two answers would tell them apart
    is counted before it is computed, by the day and by version, in `work_dir/evaluations.json`
    has scores on a coarse grid

It bounds what is told, and hides nobody: many answers about twenty patients tell much about the twenty. Two answers never differ by fewer
than that many patients; three may, if the second and the third each changed twenty of which most are the same. Only noise, and
`max_epsilon` with it, limits what all answers tell together. The file names patients by keyed hashes only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pneumofed.client.federation.policy import DAY, local_now
from pneumofed.client.federation.policy_decision import RunRequest, ValidationAsked, decide
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import PolicyError
from pneumofed.common.evaluation.statistics import CALIBRATION_BINS, FIXED_POINT, LOGIT_BINS, Statistics
from pneumofed.common.files import StateFile
from pneumofed.common.privacy.randomness import own_secret, round_key

EVALUATIONS_FILE = "evaluations.json"
Units = Mapping[str, str]
"""Keyed hash of each patient -> of the patient's images and labels, and behind it of the values beside them where the answer may rest on
these. Two states of which one has no values are the same as far as it goes: the answer that it stands for knew none."""


@dataclass(frozen=True)
class Version:
    """Validation patients on whom answers were given, and how many."""

    units: Units
    answers: int = 0


@dataclass(frozen=True)
class Evaluations:
    """What left so far: when, of the last day, and about whom."""

    times: tuple[float, ...] = ()
    versions: tuple[Version, ...] = field(default=())

    def today(self, now: datetime) -> int:
        """Counts the answers of the last 24 hours; those of a clock that was set back count too."""
        return sum(moment > (now - DAY).timestamp() for moment in self.times)

    def sentences(self, now: datetime) -> list[str]:
        """Says how many answers left, for people."""
        about = [f"{version.answers} on a set of {len(version.units)} validation patients" for version in self.versions]
        return [f"evaluations answered: {self.today(now)} in the last 24 hours; {', '.join(about)}"] if about else []


def admit_evaluation(
    data: Dataset,
    request: RunRequest,
    policy: SitePolicy,
    work_dir: Path,
    now: datetime | None = None,
    answers: int = 1,
    counts: bool = True,
) -> Dataset:
    """Counts an answer about validation patients, and returns those whom it may be about.

    Args:
        data: the validation patients as they are now.
        request: what the coordinator asks.
        policy: the site's, as it stood when the message came.
        work_dir: the site's own folder.
        now: the local time; the clock where it is None.
        answers: as how many it counts, such as the histograms that it holds; all of them or none.
        counts: False only asks whether one more answer would be admitted.

    Raises:
        PolicyError: names the rule; nothing was counted and nothing may leave.
    """
    secret = own_secret(work_dir, SPLIT_KEY_FILE)
    names = _patient_keys(data.patients, secret)
    states = _states(data, names, secret)
    version = admit_units(states, request, policy, work_dir / EVALUATIONS_FILE, now, answers, counts=counts)
    return data.subset([row for row, patient in enumerate(data.patients) if names[patient] in version.units])


def admit_units(
    units: Units,
    request: RunRequest,
    policy: SitePolicy,
    path: Path,
    now: datetime | None = None,
    answers: int = 1,
    what: str = "validation patients",
    counts: bool = True,
) -> Version:
    """Counts an answer about `units`, and returns the version of them that it may be about.

    Args:
        units: the patients as they are now.
        request: what the coordinator asks.
        policy: the site's, as it stood when the message came.
        path: file with what left so far.
        now: the local time; the clock where it is None.
        answers: as how many it counts; all of them or none.
        what: who they are, for the sentence of a refusal.
        counts: False only asks whether one more answer would be admitted.

    Raises:
        PolicyError: names the rule; nothing was counted and nothing may leave.
    """
    moment, file, more = now or local_now(), _file(path), answers - 1
    try:
        with file.locked() as before:
            version = choose_version(before.versions, units, policy.min_validation_patients, what)
            known = {patient: max(state, units[patient], key=len) for patient, state in version.units.items()}
            asked = ValidationAsked(len(version.units), before.today(moment) + more, version.answers + more, what)
            decide(policy, request, asked).enforce()
            if not counts:
                return version
            others = tuple(other for other in before.versions if other is not version)
            times = [*(time for time in before.times if time > (moment - DAY).timestamp())]
            times += [moment.timestamp()] * answers
            file.write(Evaluations(tuple(times), (*others, Version(known, version.answers + answers))))
    except OSError as error:
        raise _refused(f"{path} cannot be written: {error.strerror}; nothing leaves uncounted") from error
    return version


def count_lost_answers(path: Path, answers: int, now: datetime) -> None:
    """Counts answers that may have left and were not counted here, as after a restore: on every version, and today.

    Args:
        path: file with what left so far; nothing is done where there is none.
        answers: how many.
        now: the local time.

    Raises:
        PolicyError: the count is damaged.
        OSError: it cannot be written.
    """
    if not path.exists():
        return
    file = _file(path)
    with file.locked() as before:
        versions = tuple(replace(version, answers=version.answers + answers) for version in before.versions)
        file.write(Evaluations((*before.times, *[now.timestamp()] * answers), versions))


def choose_version(known: Sequence[Version], units: Units, least: int, what: str = "validation patients") -> Version:
    """Chooses whom an answer may be about, so that it and no earlier one are told apart by fewer than `least` patients.

    Args:
        known: versions with answers.
        units: the validation patients now.
        least: `min_validation_patients`.
        what: who they are, for the sentence of a refusal.

    Raises:
        PolicyError: fewer left or changed than that, so that neither they nor those before can be asked.
    """
    near = {number: found for number, version in enumerate(known) if (found := _difference(version.units, units)) < least}
    same = [number for number, difference in near.items() if difference == 0]
    within = [number for number in near if not _difference(known[number].units, _of(units, known[number].units))]
    if same or within:
        return known[max(same or within, key=lambda number: len(known[number].units))]
    if near:
        few = min(near.values())
        raise _refused(f"{few} {what} left or changed since the last answer; from {least} on they can be asked again")
    return Version(dict(units))


def read_evaluations(work_dir: Path, name: str = EVALUATIONS_FILE) -> Evaluations:
    """Reads what left so far.

    Args:
        work_dir: the site's own folder.
        name: of the file in it.

    Raises:
        PolicyError: the count is damaged.
    """
    return _file(work_dir / name).read()


def coarsen(statistics: Statistics, bins: int) -> Statistics:
    """Returns the statistics with scores on a grid of `bins` equal parts of the logit, and sums in multiples of 1 / bins.

    Each part's images lie in its lowest bin, so that counts at a threshold between two parts are exact, and only images of one part
    become ties: AUROC changes by at most the sum over parts of negatives * positives / (2 * all negatives * all positives).

    Args:
        statistics: on `FEDERATED_GRID`.
        bins: a power of two from 64; 2048 changes nothing.
    """
    if bins == LOGIT_BINS:
        return statistics
    width, unit = LOGIT_BINS // bins, FIXED_POINT // bins
    histograms = statistics.histograms.copy()
    views = len(histograms)
    histograms[..., 1:-1] = 0
    histograms[..., 1:-1:width] = statistics.histograms[..., 1:-1].reshape(views, 2, bins, width).sum(axis=-1)
    calibration, losses = statistics.calibration.copy(), statistics.losses
    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS * FIXED_POINT
    lowest, highest = np.ceil(calibration[:, 0] * edges[:-1]), np.floor(calibration[:, 0] * edges[1:])
    calibration[:, 2] = np.clip(np.rint(calibration[:, 2] / unit) * unit, lowest, highest).astype(np.int64)
    rounded = (np.rint(losses / unit) * unit).astype(np.int64)
    rounded[0] = min(rounded[0], statistics.n * FIXED_POINT)
    return replace(statistics, histograms=histograms, calibration=calibration, losses=rounded)


def _difference(one: Units, other: Units) -> int:
    """Patients who are not the same in both."""
    return sum(not _alike(one.get(patient), other.get(patient)) for patient in {*one, *other})


def _alike(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and (one.startswith(other) or other.startswith(one))


def _of(units: Units, patients: Iterable[str]) -> Units:
    return {patient: units[patient] for patient in patients if patient in units}


def _states(data: Dataset, names: Mapping[str, str], secret: bytes) -> Units:
    """By the manifest's own words, which are the same in every run: the task's classes and the schema's columns are the run's choice."""
    words = [record.label for record in data.records] or [str(label) for label in data.labels.tolist()]
    values = [(record.age_years, record.sex, record.view, record.others) for record in data.records]
    images, beside = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    for row, (patient, digest, word) in enumerate(zip(data.patients, data.digests, words, strict=True)):
        images[patient].append((digest, word))
        if data.clinical is not None:
            beside[patient].append((digest, values[row] if values else data.clinical[row].tolist()))

    def hashed(kind: str, patient: str, state: list[Any]) -> str:
        return round_key(secret, (kind, patient, repr(sorted(state, key=repr)))).hex()[:32]

    return {
        names[patient]: hashed("state", patient, state)
        + (hashed("values", patient, beside[patient]) if patient in beside else "")
        for patient, state in images.items()
    }


def _patient_keys(patients: Sequence[str], secret: bytes) -> dict[str, str]:
    return {patient: round_key(secret, ("validation patient", patient)).hex()[:32] for patient in set(patients)}


def _refused(sentence: str) -> PolicyError:
    return PolicyError("min_validation_patients", sentence)


def _file(path: Path) -> StateFile[Evaluations]:
    return StateFile(
        path,
        kind="the count of evaluations",
        parse=_parse,
        missing=Evaluations(),
        remedy="nothing of the validation patients leaves; restore it from a backup, or remove it to count anew",
        refuse=_refused,
        dump=_dump,
    )


def _dump(value: Evaluations) -> bytes:
    versions = [{"units": dict(version.units), "answers": version.answers} for version in value.versions]
    return json.dumps({"times": value.times, "versions": versions}).encode()


def _parse(content: bytes) -> Evaluations:
    found: dict[str, Any] = json.loads(content)
    versions = tuple(
        Version({str(key): str(state) for key, state in one["units"].items()}, int(one["answers"])) for one in found["versions"]
    )
    return Evaluations(tuple(float(moment) for moment in found["times"]), versions)
