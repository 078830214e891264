"""A site's monitor of drift: it records judged images and readings, and reports what has changed.

`Monitor` joins the store in a folder with the reference of the bundle that judges; the reading room and the command line use it.
`find_drift` computes the findings from observations only. `record_images` judges files and folders and puts them into a monitor.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pneumofed.common.errors import ConfigError, DataError
from pneumofed.common.files import OnProgress, count_off, tell_nobody
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.e_processes import YEAR_DAYS, Baseline, list_tests
from pneumofed.inference.monitor.reference import Observations, Reference, reference_of
from pneumofed.inference.monitor.share import Grid, Summary
from pneumofed.inference.monitor.store import Label, MonitorStore, Observation, today
from pneumofed.inference.monitor.streams import DailyTest, Stream, daily_tests, watch
from pneumofed.inference.predict.predict import find_files, judge_files

if TYPE_CHECKING:
    from pneumofed.common.imaging.types import ImageInfo
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.model_bundle.suitability import Judgement


UNKNOWN_SCANNER = "unknown scanner"
MIN_BASELINE_PATIENTS = 50
TESTED_BACK_DAYS = 90


@dataclass(frozen=True)
class DriftFindings:
    """What the monitor says now.

    Attributes:
        found: all that was judged.
        streams: the evidence of every quantity of every scanner, by year.
        daily_tests: the single days, of the last `TESTED_BACK_DAYS`.
        starts: by scanner, the first image that is compared with what it is compared with now.
    """

    found: Observations
    streams: Sequence[Stream]
    daily_tests: Sequence[DailyTest]
    starts: Mapping[str, int]

    @property
    def current(self) -> list[Stream]:
        """The streams of this year of watching that no later baseline ended; only these can alarm."""
        year = int(self.found.days[-1] - self.found.days[0]) // YEAR_DAYS if len(self.found) else 0
        return [stream for stream in self.streams if stream.year == year and stream.test.start == self.starts[stream.scanner]]

    @property
    def alarms(self) -> list[Stream]:
        """Streams of `current` that raised an alarm, the clearest first."""
        return sorted((stream for stream in self.current if stream.alarm is not None), key=lambda stream: stream.p_value)


def find_drift(found: Observations, reference: Reference, baselines: Sequence[Baseline] = ()) -> DriftFindings:
    """Computes the evidence for drift in `found`, and the tests of the last `TESTED_BACK_DAYS` days.

    Args:
        found: all judged images, in the order of arrival; may be empty.
        reference: of the bundle that judged them.
        baselines: accepted by a person; see `MonitorStore.read_baselines`.
    """
    if not len(found):
        return DriftFindings(found, (), (), {})
    tests = list_tests(found, baselines)
    since = int(found.days[-1]) - TESTED_BACK_DAYS + 1
    starts = {test.scanner: test.start for test in tests}
    return DriftFindings(found, watch(found, reference, baselines), daily_tests(found, reference, tests, since), starts)


class Monitor:
    """The store in a folder together with the reference of the bundle that judges."""

    def __init__(self, folder: Path, reference: Reference) -> None:
        self.store, self.reference = MonitorStore(folder), reference

    @classmethod
    def open(cls, folder: Path, bundle: Bundle) -> Monitor:
        """Opens the monitor in `folder` for `bundle`; the folder is made with the first image.

        Args:
            folder: of the store; may hold what other bundles judged, which is left out.
            bundle: opened, hence checked; carries the reference to compare with.

        Raises:
            BundleError: the bundle's reference cannot be read.
            ConfigError: the bundle carries none, or one that is too small.
        """
        return cls(folder, reference_of(bundle))

    def record(self, judgement: Judgement, info: ImageInfo, day: date | None = None, patient: str | None = None) -> int:
        """Writes one judged image and returns its number for `record_reading`.

        Args:
            judgement: of the bundle that this monitor was opened for.
            info: of the image; its manufacturer and model name the scanner.
            day: of the judgement; today without one.
            patient: any constant name of the patient, or else of the study. It is hashed with a key of this folder and not kept. Without
                one the image counts as a patient of its own.

        Raises:
            DataError: the folder cannot be written.
        """
        return self.store.append(self.reference.digest, self._observation(judgement, info, day, patient))

    def record_reading(self, image: int, label: Label, day: date | None = None) -> None:
        """Writes what the reader found on the image of that number; what agrees with the verdict counts too.

        Args:
            image: number that `record` returned.
            label: of the reader. The first reading of an image is kept, later ones are passed over.
            day: of the reading; today without one.

        Raises:
            DataError: there is no such image, or the folder cannot be written.
        """
        self.store.append_reading(image, label, day.toordinal() if day else today())

    def check(self) -> DriftFindings:
        """Computes all evidence so far, and tests the last days one by one.

        Raises:
            ConfigError: this bundle judged nothing here, as when a path is mistyped: that must not pass for quiet.
            DataError: the store is damaged.
        """
        found = self._found
        if not len(found):
            others = ", ".join(f"{digest[:12]} ({images} images)" for digest, images in self.store.bundles()) or "none"
            raise ConfigError(
                f"{self.store.folder} holds no image that bundle {self.reference.digest[:12]} judged; bundles there: {others}. "
                "Check --folder and --bundle, or begin with `pneumofed monitor add`"
            )
        baselines = self.store.read_baselines(self.reference.digest, found)
        return find_drift(found, self.reference, baselines)

    def accept(self, scanner: str, first: date, last: date) -> int:
        """Makes the images of `scanner` from `first` to `last` its baseline from then on, and counts their patients.

        Args:
            scanner: as `record` named it.
            first: day of the first image of the baseline.
            last: day of the last one, included; from the day after it on images are compared with the baseline.

        Returns:
            Number of patients in the baseline, `MIN_BASELINE_PATIENTS` at least.

        Raises:
            ConfigError: no such scanner was seen, or there are fewer than `MIN_BASELINE_PATIENTS` patients.
            DataError: the folder cannot be written.
        """
        found = self._check_scanner(scanner)
        inside = (found.scanners == scanner) & ~found.refused
        inside &= (found.days >= first.toordinal()) & (found.days <= last.toordinal())
        patients = len(np.unique(found.units[inside]))
        if patients < MIN_BASELINE_PATIENTS:
            raise ConfigError(
                f"'{scanner}' has images of {patients} patients from {first} to {last}, a baseline needs {MIN_BASELINE_PATIENTS}; "
                "take more days"
            )
        self.store.append_baseline(self.reference.digest, scanner, first.toordinal(), last.toordinal())
        return patients

    def resume(self, scanner: str, last: date) -> None:
        """Compares `scanner` with the reference again from the day after `last` on, as if it had just begun: its fault was fixed.

        Args:
            scanner: as `record` named it.
            last: day of the last image before the repair, included.

        Raises:
            ConfigError: no such scanner was seen.
            DataError: the folder cannot be written.
        """
        self._check_scanner(scanner)
        self.store.append_baseline(self.reference.digest, scanner, last.toordinal() + 1, last.toordinal())

    def summarise(self, first: date, last: date) -> Summary:
        """Computes what may be sent to the coordinator of the images judged from `first` to `last`.

        Args:
            first: first day.
            last: last day, included.

        Raises:
            DataError: too few patients, or the store is damaged.
        """
        found = self._found
        inside = (found.days >= first.toordinal()) & (found.days <= last.toordinal())
        if not inside.any():
            raise DataError(f"this bundle judged nothing from {first} to {last}")
        return Summary.of(found.take(inside), self.reference, self._grid).for_release()

    def _observation(self, judgement: Judgement, info: ImageInfo, day: date | None, patient: str | None) -> Observation:
        return Observation(
            day=day.toordinal() if day else today(),
            scanner=info.manufacturer or UNKNOWN_SCANNER,
            patient=patient,
            verdict=judgement.verdict,
            probability=judgement.prediction.probability if judgement.prediction else None,
            statistics=judgement.pixel_statistics,
            embedding=self.reference.embedding.map(judgement.features)[0],
            groups=judgement.population.groups,
        )

    def _check_scanner(self, scanner: str) -> Observations:
        found = self._found
        if scanner not in found.scanners:
            known = ", ".join(sorted(set(found.scanners.tolist()))) or "none"
            raise ConfigError(f"no image of '{scanner}' was judged by this bundle; scanners here: {known}")
        return found

    @property
    def _found(self) -> Observations:
        return self.store.read(self.reference.digest)

    @cached_property
    def _grid(self) -> Grid:
        return Grid.of(self.reference)


@dataclass
class Added:
    """What became of the files.

    Attributes:
        judged: images that were written.
        refused: of them, those that the model would not judge.
        patients_unknown: of them, those without a patient in the file, each of which counts as one of its own.
        skipped: files that are no usable image, by reason.
    """

    judged: int = 0
    refused: int = 0
    patients_unknown: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def record_images(
    monitor: Monitor,
    predictor: Predictor,
    paths: Iterable[Path],
    day: date | None = None,
    patients: Mapping[Path, str] | None = None,
    on_progress: OnProgress = tell_nobody,
) -> Added:
    """Judges every file of `paths` (folders with all below them) as of `day`, today without one, and writes it to `monitor`.

    In random order: names often sort by class or by device, and such an order is itself a change to whoever watches.

    A file that is no usable image is counted with its reason. The same file added twice counts twice.

    Args:
        monitor: takes the judgements.
        predictor: of the bundle that `monitor` was opened for.
        paths: files, and folders as `find_files` searches them.
        day: of the images.
        patients: whose the images are, by path; it wins over what a DICOM file says. Without it images of one patient that name none
            count as so many patients, and a set in which the sick have more images than the healthy looks unlike the reference, which
            has one image a patient.
        on_progress: told of each file.

    Raises:
        DataError: the monitor's folder cannot be written.
    """
    listed = list(find_files(paths))
    order = numpy_generator("drift", "arrival", monitor.reference.digest, len(listed)).permutation(len(listed))
    known = {os.path.abspath(path): patient for path, patient in (patients or {}).items()}  # noqa: PTH100 - as `find_files` has them
    added = Added()
    results = judge_files((listed[row] for row in order), predictor)
    for result in count_off(results, "images judged", len(listed), on_progress):
        loaded, judgement = result.loaded, result.judgement
        if judgement is None or loaded.image is None:
            added.skipped[result.explanation] += 1
            continue
        patient = known.get(str(loaded.path)) or loaded.patient
        monitor.record(judgement, loaded.image.info, day, patient)
        added.judged += 1
        added.refused += judgement.prediction is None
        added.patients_unknown += patient is None
    return added
