"""What a site is during one message: its own configuration, its data split by patient, its log.

    find_site_config, read_site_config, read_connection    the site's files
    load_site                                              its images for one experiment, decoded or from the cache
    split_site, forget_split, rename_split                 which patients are kept for validation, remembered
    site_log                                               this process's log, in the site's folder

Who is in validation is the hospital's to draw: by a keyed hash of each patient under `work_dir/split.key`, each alone, so that data sets
which differ by one patient differ by that one on either side, and no run's seed chooses who is asked about. A simulated hospital has no
secret: its private runs split by a key of the run's seed, so that the mechanism that is accounted is the one that runs, its others
stratified by class.

Images which join later move nobody to the other side of a split. A model that starts from an earlier one has seen that one's training
patients: were one of them judged on now, or one of those that the earlier was judged on trained on, the comparison of the two would
flatter the new one. So `work_dir/split.json` holds, for each split that a run asked for (its share; of a simulated hospital, and of one
that drew by seeds before it had a key, seed and share), the side of every patient who was ever drawn. It names patients as the manifest
does and stays at the site; who withdraws is taken out of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumofed.client.data.splits import split_by_key, split_by_patient
from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import ConnectionConfig, SiteConfig
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.data.clinical import with_clinical
from pneumofed.common.data.dataset import Dataset, check_causes, load_dataset
from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import Manifest, read_manifest
from pneumofed.common.errors import ConfigError, DataError, PrintableFormatter
from pneumofed.common.files import StateFile
from pneumofed.common.privacy.randomness import own_secret
from pneumofed.common.seeds import derive_seed
from pneumofed.common.wire.messages import SITE_CONFIG_KEY, SITES_KEY

SPLIT_FILE = "split.json"
SPLIT_KEY_FILE = "split.key"
SplitSides = dict[str, bool]
"""Whether each patient is in validation."""


@dataclass(frozen=True)
class SiteData:
    """A hospital's data for one experiment; `train` and `validation` share no patient."""

    config: SiteConfig
    train: Dataset
    validation: Dataset
    public_report: Mapping[str, Any]
    """Only counts; this much may leave the site."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def patients(self) -> int:
        """Patients of both sides."""
        return len({*self.train.patients, *self.validation.patients})

    @property
    def cache_dir(self) -> Path:
        """Of decoded images and features; goes whole when a patient withdraws."""
        return Path(self.config.work_dir) / "cache"

    def class_counts(self, classes: int) -> list[int]:
        """Training images of each class."""
        return np.bincount(self.train.labels, minlength=classes).tolist()


def find_site_config(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> SiteConfig:
    """Finds and reads the hospital's configuration. Its own node config wins; the run's `sites` folder only serves virtual hospitals.

    Args:
        node_config: of the SuperNode: `site-config` is a file's path, `partition-id` the number of a virtual hospital.
        run_config: of the run: `sites` is a folder with a file for each virtual hospital, `0.yaml` and so on.

    Raises:
        ConfigError: neither names a file, or the file is wrong.
    """
    if SITE_CONFIG_KEY in node_config:
        return read_site_config(Path(str(node_config[SITE_CONFIG_KEY])))
    if run_config.get(SITES_KEY) and "partition-id" in node_config:
        return read_site_config(Path(str(run_config[SITES_KEY])) / f"{int(node_config['partition-id'])}.yaml")
    raise ConfigError(
        f"this node knows no site: a hospital starts its SuperNode with --node-config '{SITE_CONFIG_KEY}=\"/path/site.yaml\"'; "
        "virtual hospitals are made by `pneumofed simulate` or `flower-simulation`"
    )


def read_site_config(path: Path) -> SiteConfig:
    """Reads the site configuration in `path`, with relative paths resolved against its folder."""
    config = build_config(SiteConfig, read_yaml(path), path.name)
    paths: dict[str, str | None] = {
        key: str((path.parent / value).resolve()) for key in ("manifest", "work_dir", "policy") if (value := getattr(config, key))
    }
    beside = path.parent.resolve() / "connection.yaml"
    paths["connection"] = str((path.parent / config.connection).resolve()) if config.connection else None
    if config.connection is None and beside.is_file():
        paths["connection"] = str(beside)
    return config.model_copy(update=paths)


def read_connection(path: Path) -> ConnectionConfig:
    """Reads how the coordinator is reached from the file `path`; its paths become absolute."""
    connection = build_config(ConnectionConfig, read_yaml(path), path.name)
    names = ("ca", "key", "client_certificate", "client_key")
    paths = {name: str((path.parent / value).resolve()) for name in names if (value := getattr(connection, name))}
    return connection.model_copy(update=paths)


def read_site_manifest(config: SiteConfig) -> Manifest:
    """Reads the site's manifest, its labels by the site's own words (`SiteConfig.label_words`).

    Raises:
        ConfigError: the file does not exist, or the words contradict each other.
        DataError: the manifest cannot be read.
    """
    return LabelWords.of(config.label_words, "label_words").apply(read_manifest(Path(config.manifest)))


def load_site(config: SiteConfig, experiment: ExperimentConfig) -> SiteData:
    """Loads the site's data, decoded or from its cache, split by patient.

    Args:
        config: the site's own; decoded images are kept in its work folder.
        experiment: decides the task, the size of images and the split.

    Raises:
        DataError: the manifest cannot be read.
        EmptySiteError: no image is usable for the experiment's task, or no pneumonia has the cause that it asks for.
    """
    manifest = read_site_manifest(config)
    check_causes(manifest, experiment.task)
    dataset = load_dataset(manifest, experiment.task, experiment.image, Path(config.work_dir) / "cache")
    dataset = with_clinical(dataset, experiment.clinical, config.clinical_columns, Path(config.manifest).name)
    seed = derive_seed(experiment.split_seed, config.name, "validation split")
    fraction = experiment.training.validation_fraction
    train, validation = split_site(dataset, fraction, seed, Path(config.work_dir), _split_key(config, experiment, seed))
    return SiteData(config, dataset.subset(train), dataset.subset(validation), dataset.report.public())


@dataclass(frozen=True)
class SplitKey:
    """What decides on each patient alone. `own` is whether the hospital drew it, so that its splits have no seed."""

    secret: bytes
    own: bool


def _split_key(config: SiteConfig, experiment: ExperimentConfig, seed: int) -> SplitKey | None:
    if config.policy is not None:
        return SplitKey(own_secret(Path(config.work_dir), SPLIT_KEY_FILE), own=True)
    if experiment.privacy.mechanism != "none":
        return SplitKey(hashlib.sha256(f"simulated split, seed {seed}".encode()).digest(), own=False)
    return None


def split_site(
    dataset: Dataset, fraction: float, seed: int, work_dir: Path, key: SplitKey | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits images as `split_by_key` does, without a key as `split_by_patient`; who was drawn before stays on the side where he was.

    Args:
        dataset: the site's images.
        fraction: share of patients for validation, in [0, 1).
        seed: of the draw; with `fraction` it names a split that no key of the hospital's own decides.
        work_dir: keeps the splits.
        key: decides on those who are new.

    Returns:
        Two int64 arrays, ascending, disjoint and complete.

    Raises:
        DataError: the list of splits is damaged, or cannot be written.
    """
    name = f"{seed} {fraction!r}"
    try:
        file = _file(work_dir)
        with file.locked() as splits:
            if key is not None and key.own and name not in splits:
                name = f"keyed {fraction!r}"
            known = splits.get(name, {})
            if key is None:
                train, validation = split_by_patient(dataset.patients, dataset.labels.tolist(), fraction, seed, known)
            else:
                train, validation = split_by_key(dataset.patients, fraction, key.secret, known)
            drawn = {dataset.patients[row]: False for row in train} | {dataset.patients[row]: True for row in validation}
            if drawn.keys() - known.keys():
                file.write({**splits, name: {**known, **drawn}})
    except OSError as error:
        raise DataError(f"{work_dir / SPLIT_FILE} cannot be written: {error.strerror}; without it no split can be kept") from None
    return train, validation


def forget_split(work_dir: Path, gone: Callable[[str], bool]) -> None:
    """Removes the patients of whom `gone` is true from all splits.

    Args:
        work_dir: keeps the splits; nothing happens where there are none.
        gone: whether a patient, by his name in the manifest, is to be taken out.

    Raises:
        DataError: the list of splits is damaged.
        OSError: it cannot be written.
    """
    file = _file(work_dir)
    if not file.path.exists():
        return
    with file.locked() as splits:
        left = {name: {who: side for who, side in sides.items() if not gone(who)} for name, sides in splits.items()}
        file.write(left, forget=True)


def rename_split(work_dir: Path, names: Mapping[str, str], held: Path) -> None:
    """Renames patients in all splits, so that each stays on his side. Who was on both under two names is in training from now on.

    Args:
        work_dir: keeps the splits; nothing happens where there are none.
        names: the new name by the old one.
        held: a folder whose lock the caller holds; it may be `work_dir`.

    Raises:
        DataError: the list of splits is damaged.
        OSError: it cannot be written.
    """
    file = _file(work_dir)
    if not file.path.exists():
        return
    with nullcontext(file.read()) if work_dir.samefile(held) else file.locked() as splits:
        file.write({name: _renamed(sides, names) for name, sides in splits.items()})


def _renamed(sides: SplitSides, names: Mapping[str, str]) -> SplitSides:
    found: SplitSides = {}
    for patient, side in sides.items():
        name = names.get(patient, patient)
        found[name] = side and found.get(name, True)  # nobody is judged on who was trained on
    return found


def class_number(experiment: ExperimentConfig) -> int:
    return len(classes_of(experiment.task))


@contextmanager
def site_log(config: SiteConfig) -> Iterator[None]:
    """Sends this process's log to the site's own `site.log`, the only place where the details of an error are written."""
    work_dir = Path(config.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.FileHandler(work_dir / "site.log", encoding="utf-8", delay=True)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("pneumofed.client", "pneumofed.common")]
    for logger in loggers:
        logger.addHandler(handler)
        if logger.level != logging.INFO:  # setting it empties the caches of all loggers of the process
            logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
        handler.close()


def _file(work_dir: Path) -> StateFile[dict[str, SplitSides]]:
    return StateFile(
        work_dir / SPLIT_FILE,
        kind="the list of patients kept for validation",
        parse=_parse,
        missing={},
        remedy="restore it from a backup; if there is none, remove it, and do not compare new models with those that were trained before",
        refuse=DataError,
        falls_back=True,  # who was added last is drawn again, as he was drawn
    )


def _parse(content: bytes) -> dict[str, SplitSides]:
    return {
        str(name): {str(patient): bool(side) for patient, side in sides.items()} for name, sides in json.loads(content).items()
    }
