"""What a site is during one message: its own configuration, its data split by patient, its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.split_memory import split_site
from common.config import ExperimentConfig
from common.config_reader import build_config, read_yaml
from common.data.dataset import Dataset, load_dataset
from common.data.manifest import CLASSES, read_manifest
from common.errors import ConfigError
from common.messages import SITE_CONFIG_KEY, SITES_KEY
from common.party_config import ConnectionConfig, SiteConfig
from common.seeds import derive_seed


@dataclass(frozen=True)
class Site:
    """A hospital's data for one experiment; `train` and `validation` share no patient."""

    config: SiteConfig
    train: Dataset
    validation: Dataset
    public_report: Mapping[str, Any]
    """Counts alone; this much may leave the site."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def cache_dir(self) -> Path:
        """Of decoded images and features; goes whole when a patient withdraws."""
        return Path(self.config.work_dir) / "cache"

    def class_counts(self, classes: int) -> list[int]:
        """Training images of each class."""
        return np.bincount(self.train.labels, minlength=classes).tolist()


def find_site_config(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> SiteConfig:
    """The hospital's configuration. Its own node config wins; the run's `sites` folder serves virtual hospitals alone.

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
    """The site configuration in `path`, with relative paths resolved against its folder."""
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
    """How the coordinator is reached, by the file `path`, with absolute paths."""
    connection = build_config(ConnectionConfig, read_yaml(path), path.name)
    names = ("ca", "key", "client_certificate", "client_key")
    paths = {name: str((path.parent / value).resolve()) for name in names if (value := getattr(connection, name))}
    return connection.model_copy(update=paths)


def load_site(config: SiteConfig, experiment: ExperimentConfig) -> Site:
    """The site's data, decoded or from its cache, split by patient (see `client.split_memory`).

    Raises:
        DataError: the manifest cannot be read.
        EmptySiteError: no image is usable for the experiment's task.
    """
    manifest = read_manifest(Path(config.manifest))
    dataset = load_dataset(manifest, experiment.task, experiment.image, Path(config.work_dir) / "cache")
    seed = derive_seed(experiment.split_seed, config.name, "validation split")
    fraction = experiment.training.validation_fraction
    train, validation = split_site(dataset, fraction, seed, Path(config.work_dir))
    return Site(config, dataset.subset(train), dataset.subset(validation), dataset.report.public())


def class_number(experiment: ExperimentConfig) -> int:
    return len(CLASSES[experiment.task])


@contextmanager
def site_log(config: SiteConfig) -> Iterator[None]:
    """Sends this process's log to the site's own `site.log`, where alone the details of an error are written."""
    work_dir = Path(config.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.FileHandler(work_dir / "site.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("client", "common")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
        handler.close()
