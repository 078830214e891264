"""The virtual hospitals of a simulation below its run folder: a site folder, a manifest and keys each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig, Section
from pneumofed.common.config.parties import CoordinatorConfig, SiteConfig
from pneumofed.common.config.reader import build_config, format_yaml, read_yaml
from pneumofed.common.data.dataset import check_causes
from pneumofed.common.data.manifest import DataReport, Manifest, write_manifest
from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE, write_secret
from pneumofed.common.secure_aggregation.key_agreement import issue_roster
from pneumofed.common.seeds import derive_seed
from pneumofed.common.wire.keys import format_public_key, read_private_key, write_node_key
from pneumofed.server.provisioning.authority import open_authority
from pneumofed.server.runs.records import CENTRAL_SETS
from pneumofed.simulation.hospitals.archive import render_archive
from pneumofed.simulation.hospitals.sources import DIVIDED, SimulationConfig
from pneumofed.simulation.hospitals.study import VirtualStudy, gather, keep_apart
from pneumofed.simulation.phantoms.clinical import give_values
from pneumofed.simulation.phantoms.ct_sets import write_ct_phantoms
from pneumofed.simulation.phantoms.own_classes import write_class_phantoms
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.phantoms.scanners import draw_scanner

UNUSED_ADDRESS = "localhost:1"
"""The coordinator's address in a connection file of which only the keys are read."""
DATA = "data"
MODEL_FOLDER = ".model"
AUTHORITY_LIFETIME = timedelta(days=3650)


@dataclass(frozen=True)
class Federation:
    """Where the files of the virtual hospitals lie, and which images each one holds."""

    sites_dir: Path
    coordinator_file: Path
    names: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    phantom: bool
    """Whether the images are drawn."""
    report: DataReport
    """What the source of the training images found, before they were dealt."""

    @property
    def hospitals(self) -> int:
        return len(self.manifests)

    @property
    def model_dir(self) -> Path:
        """Where all hospitals keep the model that they judged last, once."""
        return self.sites_dir / MODEL_FOLDER

    @property
    def site_files(self) -> list[Path]:
        return [self.sites_dir / f"{number}.yaml" for number in range(self.hospitals)]


def lay_out(
    cfg: SimulationConfig, experiment: ExperimentConfig, run_dir: Path, resume: bool, progress: Progress = NO_PROGRESS
) -> Federation:
    """Writes the virtual hospitals into a run folder. Pure in (data, `cfg`, `experiment.seed`): a resumed run gets the same ones.

    Hospitals are numbered from the largest to the smallest, since Flower hands out messages by number and the largest should start
    first.

    Args:
        cfg: data, number of hospitals and how the patients are dealt to them.
        experiment: gives the seed, and whether the hospitals need keys for secure aggregation.
        run_dir: run folder, made if need be.
        resume: whether a run goes on that was started there; it must have been started with the same `cfg`.
        progress: shows what is being done.

    Raises:
        DataError: the data folder is missing or holds nothing usable.
        ConfigError: more hospitals than patients, a slow one that is not there, or a resumed run was started with other hospitals.
    """
    run_dir = run_dir.resolve()
    _check_same_simulation(cfg, run_dir, resume)
    progress.show(DATA, note="drawing phantoms" if cfg.divides and cfg.data is None else "")
    data, external = _find_data(cfg, experiment, run_dir)
    progress.show(DATA, note="reading folders and tables")
    clinical = [column.name for column in experiment.clinical.columns] if experiment.clinical else []
    study = gather(cfg, data, external, experiment.seed, classes_of(experiment.task), clinical)
    if unknown := sorted(set(cfg.slow) - {hospital.name for hospital in study.hospitals}):
        raise ConfigError(
            f"slow: {unknown[0]} is no hospital; there are {', '.join(hospital.name for hospital in study.hospitals)}"
        )
    if clinical and study.phantom and cfg.divides and cfg.data is None:
        study = _with_clinical_phantoms(study, derive_seed(experiment.seed, "clinical values"))
    sites, cache = run_dir / "sites", run_dir / "coordinator" / "cache"
    caches = {hospital.name: sites / hospital.name / "cache" for hospital in study.hospitals}
    for hospital in study.hospitals:
        check_causes(hospital.manifest, experiment.task)
    progress.show(DATA, note="looking for images of the held-out sets among the hospitals'")
    study = keep_apart(study, {**caches, **{name: cache / name for name in study.held_out}})
    parts = [hospital.manifest for hospital in study.hospitals]
    names = [hospital.name for hospital in study.hospitals]
    if cfg.partition == "scanner":
        parts = _through_scanners(parts, [sites / name / "archive" for name in names], experiment.seed, progress)
    progress.finish(DATA)
    identities = write_identities(run_dir / "identities", names) if experiment.secure_aggregation.enabled else ({}, None)
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        _write_site(run_dir, number, name, part, cfg, identities[0].get(name))
        _write_secret(sites / name, name, experiment.seed)
    _write_secret(run_dir, "coordinator", experiment.seed)
    virtual = cfg.slow if cfg.slow or experiment.strategy.buffer is not None else None
    roster = str(identities[1]) if identities[1] else None
    own = [name for name in study.held_out if name == DIVIDED or name in cfg.hold_out]
    settings = CoordinatorConfig(run_dir=str(run_dir), resume=resume, device=cfg.device, key_roster=roster, slow=virtual)
    coordinator = _write_coordinator({name: source.manifest for name, source in study.held_out.items()}, own, settings)
    return Federation(sites, coordinator, tuple(names), tuple(parts), study.phantom, study.report)


def _with_clinical_phantoms(study: VirtualStudy, seed: int) -> VirtualStudy:
    """Phantom patients get clinical values; every third hospital does not measure CRP."""
    lacking = [("crp",) if number % 3 == 2 else () for number in range(len(study.hospitals))]
    manifests = give_values([hospital.manifest for hospital in study.hospitals], seed, lacking)
    hospitals = tuple(replace(hospital, manifest=one) for hospital, one in zip(study.hospitals, manifests, strict=True))
    held_out = {name: replace(one, manifest=give_values([one.manifest], seed)[0]) for name, one in study.held_out.items()}
    return replace(study, hospitals=hospitals, held_out=held_out)


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
        connections[name].write_text(format_yaml(paths), encoding="utf-8")
    roster = folder / "roster.json"
    roster.write_text(issue_roster(authority.federation, keys, 1, authority.key), encoding="utf-8")
    return connections, roster


def _check_same_simulation(cfg: SimulationConfig, run_dir: Path, resume: bool) -> None:
    path = run_dir / "simulation.yaml"
    values = cfg.model_dump()
    if resume and path.exists():
        old = build_config(SimulationConfig, read_yaml(path), path.name).model_dump()
        different = [f"{key} was {old.get(key)!r}, now {values[key]!r}" for key in values if old.get(key) != values[key]]
        if different:
            raise ConfigError(f"the run to resume was started with other hospitals: {'; '.join(different)}")
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(format_yaml(values), encoding="utf-8")


def _through_scanners(parts: Sequence[Manifest], archives: Sequence[Path], seed: int, progress: Progress) -> list[Manifest]:
    """Each hospital's images as its own scanner would have taken them, in its own archive folder."""
    rendered = []
    for number, (part, archive) in enumerate(zip(parts, archives, strict=True)):
        progress.show(DATA, number, len(parts), f"the scanner of hospital {number + 1} of {len(parts)}")
        scanner = draw_scanner(number, derive_seed(seed, "scanner"))
        rendered.append(render_archive(part, scanner, archive, derive_seed(seed, "scanner noise", number)))
    return rendered


def _write_site(
    run_dir: Path, number: int, name: str, manifest: Manifest, cfg: SimulationConfig, connection: Path | None
) -> None:
    folder = run_dir / "sites" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_manifest(manifest, folder / "manifest.csv")
    site = SiteConfig(
        name=name,
        manifest=str(folder / "manifest.csv"),
        work_dir=str(folder),
        model_dir=str(run_dir / "sites" / MODEL_FOLDER),
        device=cfg.device,
        threads=cfg.threads,
        connection=str(connection) if connection else None,
    )
    _write_yaml(run_dir / "sites" / f"{number}.yaml", site)


def _write_secret(folder: Path, party: str, seed: int) -> None:
    """A virtual party's secret for its noise, pure in the seed, so that runs repeat: simulated privacy protects nobody."""
    write_secret(folder / NOISE_KEY_FILE, hashlib.sha256(f"simulated secret of {party}, seed {seed}".encode()).digest())


def _find_data(cfg: SimulationConfig, experiment: ExperimentConfig, run_dir: Path) -> tuple[Path | None, Path | None]:
    """The set that is divided and the external set."""
    if not cfg.divides or cfg.data is not None:
        return Path(cfg.data).resolve() if cfg.data else None, Path(cfg.external).resolve() if cfg.external else None
    folder, seed = run_dir / "phantoms", derive_seed(experiment.seed, "phantoms")
    if experiment.image.slices:
        if isinstance(experiment.task, tuple):
            raise ConfigError(
                "task: phantoms of own classes are radiographs; take task binary or three_class for CT, or give --data"
            )
        write_ct_phantoms(folder, cfg.phantom_patients, seed, experiment.image.size_px, experiment.image.slices)
    elif isinstance(experiment.task, tuple):
        write_class_phantoms(folder, experiment.task, cfg.phantom_patients, seed)
    else:
        write_phantoms(folder, cfg.phantom_patients, seed)
    return folder, folder / "external"


def _write_coordinator(held_out: Mapping[str, Manifest], reference_sets: Sequence[str], settings: CoordinatorConfig) -> Path:
    folder = Path(settings.run_dir) / "coordinator"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.csv" for name in held_out}
    for name, file in files.items():
        write_manifest(held_out[name], file)
    own = {f"{name}_manifest": str(files[name]) for name in CENTRAL_SETS if name in files}
    others = {name: str(file) for name, file in files.items() if name not in CENTRAL_SETS}
    _write_yaml(
        folder / "coordinator.yaml",
        settings.model_copy(
            update={**own, "held_out": others, "reference_sets": list(reference_sets), "cache_dir": str(folder / "cache")}
        ),
    )
    return folder / "coordinator.yaml"


def _write_yaml(path: Path, section: Section) -> None:
    path.write_text(format_yaml(json.loads(section.model_dump_json())), encoding="utf-8")
