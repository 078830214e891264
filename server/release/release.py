"""A release from its evidence to its records: held-out sets compared, sites' verdicts read, the decision signed and written.

`Sets` and `compare_on_sets` are the coordinator's own evidence, `read_verdicts` the sites'; `server.release.gate` decides. `publish` writes
the signed record, its page in Markdown (`write_release_page`) and the mark beside a released bundle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pneumofed.common.audit.log import COORDINATOR_ACTOR, RELEASE_EVENT, AuditLog
from pneumofed.common.config.parties import CentralSets, central_manifests, foreign_names
from pneumofed.common.data.clinical import with_clinical
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.errors import ConfigError, ReleaseError
from pneumofed.common.evaluation.class_comparison import AUROC_MACRO, ClassesComparison, class_lower_ends
from pneumofed.common.evaluation.comparison import AUROC, ModelComparison, NonInferiority
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.evaluate import compare_bundles
from pneumofed.common.models.compute import build_compute
from pneumofed.common.ops.render import render
from pneumofed.common.release import ReleaseRecord, mark_of, read_verdict, write_signed
from pneumofed.common.wire.keys import PrivateKey, PublicKey, read_public_key
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.release.gate import METRIC_NAMES
from pneumofed.server.runs.folder import RunFolder, write_text

RECORD_FILE, PAGE_FILE = "release.json", "release.md"
DASH = "–"


@dataclass(frozen=True)
class Sets:
    """The coordinator's held-out sets and where they are decoded."""

    manifests: Mapping[str, Path]
    cache: Path
    device: str = "auto"
    threads: int = 0
    foreign: Sequence[str] = ()
    """Names of those of other hospitals than the ones that train."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Those that must be compared before a release: all, and one of other hospitals at least."""
        return (*self.manifests, *(() if self.foreign else ("external",)))

    @classmethod
    def of_run(cls, run: Path) -> Sets:
        """Finds those that the run in the folder `run` was evaluated on.

        Raises:
            ConfigError: it is no run folder.
        """
        settings = RunFolder(run).read_coordinator()
        if settings is None:
            raise ConfigError(f"{run} is no run folder: it holds no coordinator.yaml")
        return cls(
            _given(settings),
            Path(settings.cache_dir or run / "cache"),
            settings.device,
            settings.threads,
            foreign_names(settings),
        )

    @classmethod
    def of_coordinator(cls, place: CoordinatorFolder) -> Sets:
        """Finds those of the coordinator folder."""
        settings = place.settings()
        manifests = {name: place.path / path for name, path in _given(settings).items()}
        return cls(manifests, place.path / settings.cache_dir, settings.device, settings.threads, foreign_names(settings))


def _given(settings: CentralSets) -> dict[str, Path]:
    return {name: Path(path) for name, path in central_manifests(settings).items()}


def read_verdicts(
    files: Iterable[Path], keys: Mapping[str, PublicKey], models: tuple[Bundle, Bundle]
) -> dict[str, ModelComparison]:
    """Reads the sites' comparisons of two models, by site.

    Args:
        files: verdicts; a folder stands for the JSON files in it.
        keys: public node keys of the sites that may take part, by site.
        models: the old and the new one.

    Raises:
        ReleaseError: one is not signed by its site, is of other models, or a site sent two.
    """
    found: dict[str, ModelComparison] = {}
    for file in (inner for path in files for inner in (sorted(path.glob("*.json")) if path.is_dir() else [path])):
        verdict = read_verdict(file, keys)
        if (verdict.old, verdict.new) != (models[0].digest, models[1].digest):
            raise ReleaseError(f"{file}: {verdict.site} compared other models; ask it for a verdict on these two")
        if verdict.site in found:
            raise ReleaseError(f"{file}: there is another verdict of {verdict.site}; keep one")
        found[verdict.site] = verdict.comparison
    return found


def site_keys(place: CoordinatorFolder) -> dict[str, PublicKey]:
    """Reads the public node keys of the sites that may take part."""
    return {name: read_public_key(path) for name, path in place.site_keys().items()}


def sites_of_run(run: Path) -> list[str]:
    """Lists the sites that took part in the run, by its summary."""
    return sorted(RunFolder(run).read_summary().sites)


def publish(
    record: ReleaseRecord, bundle: Path, key: PrivateKey, folders: Sequence[Path], audit: AuditLog | None = None
) -> list[Path]:
    """Writes the signed record and its page into each of `folders`, and beside the bundle and its archive the mark if it is released.

    A mark that lies there already is removed if the model is refused now. Returns the files that were written.

    Args:
        record: the decision.
        bundle: the new model, a folder or an archive.
        key: signs the record.
        folders: where record and page are written.
        audit: the coordinator's audit log, if one is kept.

    Raises:
        ReleaseError: a file cannot be written.
    """
    written = []
    for folder in folders:
        write_signed(folder / RECORD_FILE, record, key)
        write_text(folder / PAGE_FILE, write_release_page(record))
        written += [folder / RECORD_FILE, folder / PAGE_FILE]
    mark = mark_of(bundle)
    if record.released:
        write_signed(mark, record, key)
        written.append(mark)
    else:
        mark.unlink(missing_ok=True)
    if audit is not None:
        digest = hashlib.sha256(record.model_dump_json().encode()).hexdigest()
        old = record.old.digest if record.old else None
        audit.record(RELEASE_EVENT, decision=record.decision, new=record.new.digest, old=old, record=digest)
    return written


def audit_of(place: CoordinatorFolder) -> AuditLog:
    """Opens the audit log of the coordinator folder."""
    return AuditLog(place.state / "audit.jsonl", COORDINATOR_ACTOR)


def compare_on_sets(
    old: Bundle, new: Bundle, manifests: Mapping[str, Path], cache: Path, device: str = "auto", threads: int = 0
) -> dict[str, ModelComparison]:
    """Compares two models on the coordinator's held-out sets, by set; of more than two classes each is a `ClassesComparison`.

    Args:
        old: the released model.
        new: the one that is to be released.
        manifests: of the sets, by `test` and `external`.
        cache: folder that images are decoded through.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads; 0 leaves torch's choice.

    Raises:
        DataError, ConfigError: a set cannot be used.
    """
    compute = build_compute(device, "fp32", threads)
    found = {}
    for name, path in manifests.items():
        manifest = read_manifest(path)
        datasets = tuple(
            with_clinical(
                load_dataset(
                    manifest, bundle.manifest.task, bundle.manifest.preprocessing.image, cache / name, keep_duplicates=True
                ),
                bundle.manifest.model.clinical,
            )
            for bundle in (old, new)
        )
        found[name] = compare_bundles(old, new, (datasets[0], datasets[1]), compute, by_class=True)
    return found


def write_release_page(record: ReleaseRecord) -> str:
    """Writes the page: the decision, why, and every comparison with its bound."""
    names = {"names": METRIC_NAMES, "values": _values}
    return render(__package__, "release.md", {"signed": _signed}, record=record, class_rows=_class_rows(record), **names)


def _class_rows(record: ReleaseRecord) -> list[list[str]]:
    """Each class of each set against the rest: set, class, patients, AUROC of both models, lower end of the new one's interval."""
    rows = []
    for place in record.places:
        if isinstance(place.comparison, ClassesComparison):
            ends = class_lower_ends(place.comparison)
            for name, one in place.comparison.classes.items():
                numbers = [_number(value) for value in (one.area.old, one.area.new, ends[name][1])]
                rows.append([place.name, name, " / ".join(map(str, one.patients)), *numbers])
    return rows


def _values(comparison: ModelComparison, metric: str) -> tuple[str, str]:
    if metric == AUROC:
        return _number(comparison.auroc.old), _number(comparison.auroc.new)
    if metric == AUROC_MACRO and isinstance(comparison, ClassesComparison):
        return _number(comparison.macro.old), _number(comparison.macro.new)
    rates = getattr(comparison, metric)
    return (f"{rates.old}/{rates.images}", f"{rates.new}/{rates.images}") if rates.images else (DASH, DASH)


def _number(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:+.3f}"


def summary_lines(record: ReleaseRecord) -> list[str]:
    """Writes a few lines for the terminal."""
    checks = [check for place in record.places for check in place.checks]
    passed = sum(check.verdict is NonInferiority.NOT_WORSE for check in checks)
    if record.old is None:
        lines = [f"{record.new.name}: {record.decision} as a first model"]
    else:
        lines = [
            f"{record.new.name}: {record.decision}; {passed} of {len(checks)} comparisons passed on {len(record.places)} sets"
        ]
    return [*lines, *(f"  {reason}" for reason in record.reasons)]
