"""A release from its evidence to its traces: decided, signed, written, recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.audit import AuditLog
from common.audit_events import COORDINATOR, RELEASE
from common.config_reader import build_config, read_yaml
from common.errors import ConfigError, ReleaseError
from common.evaluation.comparison import Comparison
from common.keys import PrivateKey, PublicKey, read_public_key
from common.model_bundle.bundle import Bundle
from common.party_config import CoordinatorConfig
from common.release.record import ReleaseRecord, mark_of, write_record
from common.release.verdict import read_verdict
from server.release.page import write_page
from server.run_folder import RunFolder, write_text
from server.settings import CoordinatorFolder

RECORD, PAGE = "release.json", "release.md"


@dataclass(frozen=True)
class Sets:
    """The coordinator's held-out sets and where they are decoded."""

    manifests: Mapping[str, Path]
    cache: Path
    device: str = "auto"
    threads: int = 0

    @classmethod
    def of_run(cls, run: Path) -> Sets:
        """Those that the run in the folder `run` was judged on.

        Raises:
            ConfigError: it is no run folder.
        """
        files = [run / "coordinator.yaml", run / "coordinator" / "coordinator.yaml"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ConfigError(f"{run} is no run folder: it holds no coordinator.yaml")
        told = build_config(CoordinatorConfig, read_yaml(file), str(file))
        return cls(
            _given(told.test_manifest, told.external_manifest), Path(told.cache_dir or run / "cache"), told.device, told.threads
        )

    @classmethod
    def of_coordinator(cls, place: CoordinatorFolder) -> Sets:
        """Those of the coordinator folder."""
        told = place.settings()
        manifests = {name: place.path / path for name, path in _given(told.test_manifest, told.external_manifest).items()}
        return cls(manifests, place.path / told.cache_dir, told.device, told.threads)


def _given(test: str | None, external: str | None) -> dict[str, Path]:
    return {name: Path(path) for name, path in (("test", test), ("external", external)) if path}


def read_verdicts(files: Iterable[Path], keys: Mapping[str, PublicKey], models: tuple[Bundle, Bundle]) -> dict[str, Comparison]:
    """The sites' comparisons of `models` (old, new), by site; a folder stands for the JSON files in it.

    Raises:
        ReleaseError: one is not signed by its site, is of other models, or a site told twice.
    """
    found: dict[str, Comparison] = {}
    for file in (inner for path in files for inner in (sorted(path.glob("*.json")) if path.is_dir() else [path])):
        verdict = read_verdict(file, keys)
        if (verdict.old, verdict.new) != (models[0].digest, models[1].digest):
            raise ReleaseError(f"{file}: {verdict.site} compared other models; ask it for a verdict on these two")
        if verdict.site in found:
            raise ReleaseError(f"{file}: there is another verdict of {verdict.site}; keep one")
        found[verdict.site] = verdict.comparison
    return found


def site_keys(place: CoordinatorFolder) -> dict[str, PublicKey]:
    """The public node keys of the sites that may take part."""
    return {name: read_public_key(path) for name, path in place.site_keys().items()}


def sites_of_run(run: Path) -> list[str]:
    """Names of the sites that took part in the run, by its summary."""
    return sorted(RunFolder(run).read_summary().sites)


def publish(
    record: ReleaseRecord, bundle: Path, key: PrivateKey, folders: Sequence[Path], audit: AuditLog | None = None
) -> list[Path]:
    """Writes the signed record and its page into each of `folders`, and beside the bundle and its archive the mark if it is released.

    A mark that lies there already is removed if the model is refused now. Returns the files that were written.

    Raises:
        ReleaseError: a file cannot be written.
    """
    written = []
    for folder in folders:
        write_record(folder / RECORD, record, key)
        write_text(folder / PAGE, write_page(record))
        written += [folder / RECORD, folder / PAGE]
    mark = mark_of(bundle)
    if record.released:
        write_record(mark, record, key)
        written.append(mark)
    else:
        mark.unlink(missing_ok=True)
    if audit is not None:
        told = hashlib.sha256(record.model_dump_json().encode()).hexdigest()
        old = record.old.digest if record.old else None
        audit.record(RELEASE, decision=record.decision, new=record.new.digest, old=old, record=told)
    return written


def audit_of(place: CoordinatorFolder) -> AuditLog:
    return AuditLog(place.state / "audit.jsonl", COORDINATOR)
