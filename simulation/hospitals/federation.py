"""Lays out N virtual hospitals in a run folder, each with the files of a real one: archive, manifest, configuration, keys.

RUN/sites/0.yaml ...                    SiteConfig of each virtual hospital, by partition number
RUN/sites/hospital-00/manifest.csv      its images
RUN/sites/hospital-00/                  its work folder: cache, log, local state, the secret of its private training
RUN/coordinator/                        the coordinator's settings, its held-out manifests and their cache
RUN/identities/                         where the experiment asks for secure aggregation, which runs as between real ones:
    ca/                                 the simulated federation's certificate authority
    keys/hospital-00/node               private node key of each hospital
    keys/hospital-00/connection.yaml    where its key and the authority's certificate lie
    roster.json                         the signed roster of all public keys
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from pneumofed.common.config.experiment import ExperimentConfig, Section
from pneumofed.common.config.parties import CoordinatorConfig, SiteConfig
from pneumofed.common.data.dataset import check_causes
from pneumofed.common.data.manifest import Manifest, write_manifest
from pneumofed.common.data.report import DataReport
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import ConfigError, DataError
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE, write_secret
from pneumofed.common.secure_aggregation.key_agreement import issue_roster
from pneumofed.common.seeds import derive_seed
from pneumofed.common.wire.keys import format_public_key, read_private_key, write_node_key
from pneumofed.server.provisioning.authority import open_authority
from pneumofed.simulation.hospitals.archive import render_archive
from pneumofed.simulation.hospitals.partition import partition
from pneumofed.simulation.phantoms.image import is_phantom
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.phantoms.scanners import draw_scanner
from pneumofed.simulation.plan import SimulationConfig

UNUSED_ADDRESS = "localhost:1"
"""The coordinator's address in a connection file of which only the keys are read."""
AUTHORITY_LIFETIME = timedelta(days=3650)


@dataclass(frozen=True)
class Federation:
    """Where the files of the virtual hospitals lie, and which images each one holds."""

    sites_dir: Path
    coordinator_file: Path
    manifests: tuple[Manifest, ...]
    phantom: bool
    """Whether the images are drawn."""
    report: DataReport
    """What the source of the training images found, before they were dealt."""

    @property
    def hospitals(self) -> int:
        return len(self.manifests)

    @property
    def site_files(self) -> list[Path]:
        return [self.sites_dir / f"{number}.yaml" for number in range(self.hospitals)]


def hospital_name(number: int, hospitals: int) -> str:
    """Returns the name of a virtual hospital: `hospital-07` of up to 100, `hospital-007` of more. Names sort as numbers do.

    Args:
        number: from 0.
        hospitals: how many there are.
    """
    return f"hospital-{number:0{max(2, len(str(hospitals - 1)))}d}"


def lay_out(cfg: SimulationConfig, experiment: ExperimentConfig, run_dir: Path, resume: bool) -> Federation:
    """Writes the virtual hospitals into a run folder. Pure in (data, `cfg`, `experiment.seed`): a resumed run gets the same ones.

    Hospitals are numbered from the largest to the smallest, since Flower hands out messages by number and the largest should start
    first.

    Args:
        cfg: data, number of hospitals and how the patients are dealt to them.
        experiment: gives the seed, and whether the hospitals need keys for secure aggregation.
        run_dir: run folder, made if need be.
        resume: whether a run goes on that was started there; it must have been started with the same `cfg`.

    Raises:
        DataError: the data folder is missing or holds nothing usable.
        ConfigError: more hospitals than patients, or a resumed run was started with other hospitals.
    """
    run_dir = run_dir.resolve()
    _check_same_simulation(cfg, run_dir, resume)
    data, external = _find_data(cfg, experiment.seed, run_dir)
    manifest, report = read_kaggle(data)
    check_causes(manifest, experiment.task)
    parts = partition(manifest, cfg.hospitals, cfg.partition, cfg.alpha, derive_seed(experiment.seed, "partition"))
    parts = sorted(parts, key=lambda part: -len(part.records))
    if cfg.partition == "scanner":
        parts = _through_scanners(parts, experiment.seed, run_dir)
    names = [hospital_name(number, len(parts)) for number in range(len(parts))]
    identities = write_identities(run_dir / "identities", names) if experiment.secure_aggregation.enabled else ({}, None)
    for number, part in enumerate(parts):
        _write_site(run_dir, number, part, cfg, identities[0].get(names[number]))
        _write_secret(run_dir / "sites" / names[number], names[number], experiment.seed)
    _write_secret(run_dir, "coordinator", experiment.seed)
    settings = CoordinatorConfig(
        run_dir=str(run_dir), resume=resume, device=cfg.device, key_roster=str(identities[1]) if identities[1] else None
    )
    coordinator = _write_coordinator(data, external, settings)
    return Federation(run_dir / "sites", coordinator, tuple(parts), is_phantom(data), report)


def external_manifest(folder: Path) -> Manifest:
    """Reads the external set in `folder`, which holds a labels.csv or is a CSV file.

    Raises:
        DataError: there is no such table.
    """
    table = folder / "labels.csv" if folder.is_dir() else folder
    if not table.is_file():
        raise DataError(
            f"external set: {table} does not exist; expected a folder with labels.csv, or a CSV with columns path, patient, label"
        )
    manifest, _ = read_csv(table)
    return manifest


def write_identities(folder: Path, names: Sequence[str]) -> tuple[dict[str, Path], Path]:
    """Writes node keys of virtual hospitals and the roster that their certificate authority signs; keys that lie there are kept.

    Args:
        folder: of all identities, made if need be.
        names: of the hospitals.

    Returns:
        The connection file of each hospital by its name, and the roster.
    """
    authority = open_authority(folder / "ca", "simulation", datetime.now(UTC) + AUTHORITY_LIFETIME)
    connections, keys = {}, {}
    for name in names:
        own = folder / "keys" / name
        if not (own / "node").is_file():
            write_node_key(own, name)
        keys[name] = format_public_key(read_private_key(own / "node").public_key(), name)
        connections[name] = own / "connection.yaml"
        paths = {"coordinator": UNUSED_ADDRESS, "key": "node", "ca": str((folder / "ca" / "ca.crt").resolve())}
        connections[name].write_text(yaml.safe_dump(paths), encoding="utf-8")
    roster = folder / "roster.json"
    roster.write_text(issue_roster(authority.federation, keys, 1, authority.key), encoding="utf-8")
    return connections, roster


def _check_same_simulation(cfg: SimulationConfig, run_dir: Path, resume: bool) -> None:
    path = run_dir / "simulation.yaml"
    values = cfg.model_dump()
    if resume and path.exists():
        old: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        different = [f"{key} was {old.get(key)!r}, now {values[key]!r}" for key in values if old.get(key) != values[key]]
        if different:
            raise ConfigError(f"the run to resume was started with other hospitals: {'; '.join(different)}")
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _through_scanners(parts: Sequence[Manifest], seed: int, run_dir: Path) -> list[Manifest]:
    """Each hospital's images as its own scanner would have taken them, in its own archive folder."""
    return [
        render_archive(
            part,
            draw_scanner(number, derive_seed(seed, "scanner")),
            run_dir / "sites" / hospital_name(number, len(parts)) / "archive",
            derive_seed(seed, "scanner noise", number),
        )
        for number, part in enumerate(parts)
    ]


def _write_site(run_dir: Path, number: int, manifest: Manifest, cfg: SimulationConfig, connection: Path | None) -> None:
    name = hospital_name(number, cfg.hospitals)
    folder = run_dir / "sites" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_manifest(manifest, folder / "manifest.csv")
    site = SiteConfig(
        name=name,
        manifest=str(folder / "manifest.csv"),
        work_dir=str(folder),
        device=cfg.device,
        threads=cfg.threads,
        connection=str(connection) if connection else None,
    )
    _write_yaml(run_dir / "sites" / f"{number}.yaml", site)


def _write_secret(folder: Path, party: str, seed: int) -> None:
    """A virtual party's secret for its noise, pure in the seed, so that runs repeat: simulated privacy protects nobody."""
    write_secret(folder / NOISE_KEY_FILE, hashlib.sha256(f"simulated secret of {party}, seed {seed}".encode()).digest())


def _find_data(cfg: SimulationConfig, seed: int, run_dir: Path) -> tuple[Path, Path | None]:
    """The data folder and the external set."""
    if cfg.data is not None:
        return Path(cfg.data).resolve(), Path(cfg.external).resolve() if cfg.external else None
    folder = run_dir / "phantoms"
    write_phantoms(folder, cfg.phantom_patients, derive_seed(seed, "phantoms"))
    return folder, folder / "external"


def _write_coordinator(data: Path, external: Path | None, settings: CoordinatorConfig) -> Path:
    folder = Path(settings.run_dir) / "coordinator"
    folder.mkdir(parents=True, exist_ok=True)
    test, _ = read_kaggle(data, splits=("test",))
    write_manifest(test, folder / "test.csv")
    if external:
        write_manifest(external_manifest(external), folder / "external.csv")
    paths = {
        "test_manifest": str(folder / "test.csv"),
        "external_manifest": str(folder / "external.csv") if external else None,
        "cache_dir": str(folder / "cache"),
    }
    _write_yaml(folder / "coordinator.yaml", settings.model_copy(update=paths))
    return folder / "coordinator.yaml"


def _write_yaml(path: Path, section: Section) -> None:
    path.write_text(yaml.safe_dump(json.loads(section.model_dump_json()), sort_keys=False), encoding="utf-8")
