"""Backup and restore of a site folder, such that no restore gives spent privacy back.

A backup is older than what it replaces: rounds that the site answered afterwards are not in its ledger, and their answers cannot be taken
back. So a restore asks for `Since`, evidence of what was spent after the backup, and counts the most that it leaves open:

    former             the folder that was there before, whose ledger goes on from the backup's: the longer one counts
    coordinator_log    each round that the coordinator's audit log shows and the restored ledger does not hold, and one more for each
                       run that was going on: what was under way left no line
    rounds             so many, by who answers for the data; 0 says that none was answered

A lost round counts on each lineage of the data as the dearest round that the lineage has had (its mechanism composed so often, in an
entry of the run `restored`), and as one evaluation and one begun round each. Left out of every backup are caches, and the key of the
noise: what was paid for once is paid for again under a new one (`client.privacy.ledger.noise_paid_once`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pneumofed.client.federation.evaluations import EVALUATIONS_FILE, count_lost_answers
from pneumofed.client.federation.policy import count_lost_rounds, local_now
from pneumofed.client.federation.survey import SURVEYS_FOLDER
from pneumofed.client.privacy.entries import LedgerEntry, level_of, total_epsilon
from pneumofed.client.privacy.ledger import Ledger, Lineage, judged_delta, open_ledger
from pneumofed.client.privacy.ledger_file import Recorded, append_entry, connect, ledger_errors, read_all, transaction, write_mark
from pneumofed.client.site.folder import SiteFolder
from pneumofed.client.site.init import KINDS
from pneumofed.client.site.service import running_process
from pneumofed.common.audit.log import (
    COORDINATOR_ACTOR,
    RESTORED_EVENT,
    ROUND_EVENT,
    RUN_ENDED,
    RUN_STARTED,
    SURVEY_EVENT,
    AuditEntry,
    read_entries,
)
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import write_file
from pneumofed.common.imaging.dicom_header import KEY_FILE
from pneumofed.common.ops.backup import (
    BackupLabel,
    BackupWritten,
    files_to_back_up,
    snapshot_database,
    unpack_backup,
    write_backup,
)
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE

KEYS = ("keys/node", "keys/client.key", f"*/{KEY_FILE}")
"""What `--without-keys` leaves out, below the site folder: who has them acts as the site, or can tell whose a pseudonym is."""
MADE_ANEW = (
    *("cache", "flower", "gate", "apps", "supernode.json", "installed_app.json", "held-model-*.npy", "ledger.mark"),
    *("secure_sum/session.json", NOISE_KEY_FILE),
)  # fmt: skip
"""Of the work folder: what the next start makes anew, and the secrets of a sum that goes on, which must not be taken up again."""
RESTORED_RUN = "restored"


@dataclass(frozen=True)
class Since:
    """Evidence of what was spent after the backup; one of the three is given."""

    former: Path | None = None
    coordinator_log: Path | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class SiteRestored:
    """What a restore did."""

    label: BackupLabel
    lost_rounds: int
    """Counted on top of the ledger of the backup."""
    ledger_of: str
    """`backup`, or `former` where that one had gone on."""
    epsilons: tuple[float, ...]
    """Of each lineage now."""
    missing: tuple[str, ...]
    """Keys that the backup does not hold."""


def backup_site(folder: SiteFolder, out: Path, passphrase: str | None, *, images: bool = True) -> BackupWritten:
    """Writes a backup of the site folder; the site may run meanwhile.

    Args:
        folder: the site's; manifest and work folder must lie in it.
        out: the archive, outside the folder.
        passphrase: encrypts it; None leaves the keys out.
        images: whether copies that the site imported from an archive (`data/images`) go along.

    Raises:
        ConfigError: a folder or `out` is in the wrong place, or cannot be read or written.
    """
    work, data = _inside(folder, folder.work, "work_dir"), _inside(folder, folder.data, "manifest")
    if out.resolve().is_relative_to(folder.path):
        raise ConfigError(f"{out} lies in the site folder; keep a backup on another disk")
    left = ("software", *(f"{work}/{name}" for name in MADE_ANEW), *(() if images else (f"{data}/images",)))
    found = (path for key in KEYS for path in sorted(folder.path.glob(key)))
    without = () if passphrase else tuple(path.relative_to(folder.path).as_posix() for path in found)
    names = files_to_back_up(folder.path, (*left, *without), last=(f"{work}/{EVALUATIONS_FILE}", f"{work}/rounds.json"))
    label = BackupLabel("site", folder.config.name, str(folder.path), version("pneumofed"), without=without)
    return write_backup(out, label, folder.path, names, passphrase)


def restore_site(archive: Path, path: Path, passphrase: str | None, since: Since) -> SiteRestored:
    """Puts a backup back as the site folder `path`, and counts what may have been spent since.

    Args:
        archive: the backup.
        path: the new site folder; empty, or not there.
        passphrase: of an encrypted backup.
        since: evidence.

    Raises:
        ConfigError: the backup is not taken (`unpack_backup`), its log or ledger does not hold, or the evidence is missing or unfit.
    """
    if sum(given is not None for given in (since.former, since.coordinator_log, since.rounds)) != 1:
        raise ConfigError(
            "what the site spent after the backup is not in it: give one of --coordinator-log FILE (the coordinator's state/audit.jsonl), "
            "--former FOLDER (what is left of the site folder), or --rounds-since N (0: no private round was answered since)"
        )
    with unpack_backup(archive, "site", path, passphrase, "site.yaml") as (staging, label):
        folder = SiteFolder.open(staging)
        if label.name != folder.config.name:
            raise ConfigError(f"the backup says that it is of {label.name}, and holds the site {folder.config.name}")
        if passphrase is None and (staging / "start.sh").exists():
            KINDS["start.sh"]((staging / "start.sh").read_bytes(), "start.sh of the backup, which nobody signed,")
        _check_log(folder)
        ledger = open_ledger(folder.config)
        ledger_of = "backup" if since.former is None else _take_longer_books(SiteFolder.open(since.former), folder)
        known = _read_ledger(ledger)
        lost = since.rounds or 0
        if since.coordinator_log is not None:
            lost = count_unknown_rounds(since.coordinator_log, folder, known)
        _count(folder, ledger, lost)
        epsilons = tuple(_spent(one, folder.policy) for one in ledger.lineages())
        missing = tuple(key for key in label.without if not (staging / key).exists())
        folder.audit.record(RESTORED_EVENT, made=label.created, ledger=ledger_of, lost_rounds=lost)
    return SiteRestored(label, lost, ledger_of, epsilons, missing)


def count_unknown_rounds(path: Path, folder: SiteFolder, known: Sequence[Recorded]) -> int:
    """Counts what the coordinator asked of this site after the site's log ends, as far as the ledger does not hold it; an upper bound.

    Args:
        path: the coordinator's audit log.
        folder: the restored site.
        known: entries of its ledger.

    Raises:
        ConfigError: it is no intact log of a coordinator.
        AuditError: it cannot be read.
    """
    entries = read_entries(path)
    if not verify_log(path).intact or not entries or any(entry.actor != COORDINATOR_ACTOR for entry in entries):
        raise ConfigError(f"{path} is not an unbroken audit log of a coordinator; ask the coordinator for its state/audit.jsonl")
    site, own = (
        folder.config.name,
        {entry.hash for entry in read_entries(folder.audit.path)} if folder.audit.path.exists() else set(),
    )
    ends = [number for number, entry in enumerate(entries) if _heads(entry).get(site) in own]
    last, counted = ends[-1] if ends else -1, {(one.entry.run, one.entry.round) for one in known}
    lost, going = 0, set()
    for number, entry in enumerate(entries):
        run, facts = entry.facts.get("run"), entry.facts
        if entry.event == RUN_STARTED:
            lost += number > last and run in going
            going.add(run)
        elif entry.event == RUN_ENDED:
            lost += number > last and facts.get("status") != "succeeded"
            going.discard(run)
        elif entry.event == ROUND_EVENT and number >= last and site in _asked(entry):
            lost += (run, facts.get("round")) not in counted
        elif entry.event == SURVEY_EVENT and number > last:
            lost += site in facts.get("sites", ())
    return lost + len(going)


def _heads(entry: AuditEntry) -> dict[str, str]:
    found = entry.facts.get("heads")
    return found if isinstance(found, dict) else {}


def _asked(entry: AuditEntry) -> set[str]:
    return {*_heads(entry), *(name for key in ("participants", "failures", "left_out") for name in entry.facts.get(key, ()))}


def _inside(folder: SiteFolder, path: Path, key: str) -> str:
    try:
        return path.resolve().relative_to(folder.path).as_posix()
    except ValueError:
        raise ConfigError(
            f"{key} ({path}) lies outside the site folder, whose backup would not hold it; move it into the folder"
        ) from None


def _check_log(folder: SiteFolder) -> None:
    if folder.audit.path.exists() and not (report := verify_log(folder.audit.path)).intact:
        raise ConfigError(
            f"the audit log of the backup does not hold: line {report.line} was {report.damage}; take another backup"
        )


def _read_ledger(ledger: Ledger) -> list[Recorded]:
    """All entries, each checked, and a mark of how far they come; none where nothing was ever spent."""
    if not ledger.path.exists():
        return []
    with ledger_errors(ledger.path), closing(connect(ledger.path)) as connection:
        known, _ = read_all(connection)
        write_mark(ledger.path, known)
    return known


def _take_longer_books(former: SiteFolder, folder: SiteFolder) -> str:
    """Takes ledger, log and counts of the former folder where they go on from those of the backup."""
    if running_process(former) is not None:
        raise ConfigError(f"the site runs in {former.path}; stop it first (pneumofed site stop)")
    if former.config.name != folder.config.name:
        raise ConfigError(f"{former.path} is the folder of another site, {former.config.name}")
    _check_log(former)
    logs = [[entry.hash for entry in read_entries(one.audit.path)] if one.audit.path.exists() else [] for one in (former, folder)]
    ledgers = [open_ledger(one.config) for one in (former, folder)]
    entries = [[one.hash for one in _read_ledger(ledger)] for ledger in ledgers]
    for what, (before, restored) in (("audit log", logs), ("privacy ledger", entries)):
        shorter = min(len(before), len(restored))
        if before[:shorter] != restored[:shorter]:
            raise ConfigError(
                f"the {what} of {former.path} and of the backup went different ways, so neither holds all that was spent; "
                "restore with --coordinator-log or --rounds-since, after asking who answers for the data"
            )
    if len(entries[0]) > len(entries[1]):
        ledgers[1].path.unlink(missing_ok=True)
        ledgers[1].path.touch(mode=0o600)
        snapshot_database(ledgers[0].path, ledgers[1].path)
    if len(logs[0]) >= len(logs[1]):
        for name in _books(former):
            (folder.work / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(folder.work / name, (former.work / name).read_bytes())
    return "former" if len(entries[0]) > len(entries[1]) else "backup"


def _books(former: SiteFolder) -> list[str]:
    names = ("audit.jsonl", EVALUATIONS_FILE, "rounds.json", "split.json", "split.key", f"{SURVEYS_FOLDER}/*.json")
    return [str(path.relative_to(former.work)) for name in names for path in sorted(former.work.glob(name)) if path.is_file()]


def _count(folder: SiteFolder, ledger: Ledger, lost: int) -> None:
    """Counts `lost` rounds, each as the dearest that its data has had."""
    if lost < 0:
        raise ConfigError(f"--rounds-since must be 0 or more, got {lost}")
    if not lost:
        return
    policy, lineages = folder.policy, ledger.lineages() if ledger.path.exists() else []
    if policy.max_epsilon is not None and not lineages:
        raise ConfigError(
            f"{lost} rounds were lost, and the ledger of the backup has none whose cost they could be counted with; lower max_epsilon "
            "by what they spent (`pneumofed privacy plan` of their run says it), then restore with --rounds-since 0"
        )
    with ledger_errors(ledger.path):
        for lineage in lineages:
            with closing(connect(ledger.path)) as connection, transaction(connection):
                known, _ = read_all(connection)
                append_entry(connection, _lost_entry(lineage, lost, policy, len(known) + 1), known)
        if lineages:
            _read_ledger(ledger)
    now = local_now()
    count_lost_rounds(folder.work, lost, now)
    surveyed = sorted(path for path in (folder.work / SURVEYS_FOLDER).glob("*.json") if not path.stem.endswith("-told"))
    for path in (folder.work / EVALUATIONS_FILE, *surveyed):
        count_lost_answers(path, lost, now)


def _lost_entry(lineage: Lineage, lost: int, policy: SitePolicy, number: int) -> Recorded:
    entries = [one.entry for one in lineage.entries]
    delta, level = judged_delta(entries, policy, lineage.patients), level_of(entries, policy.min_unit)
    dearest = max(dict.fromkeys(entries), key=lambda entry: total_epsilon([entry], delta, level))
    mechanism = replace(dearest.mechanism, steps=dearest.mechanism.steps * lost)
    entry: LedgerEntry = replace(dearest, run=RESTORED_RUN, round=0, mechanism=mechanism)
    total = total_epsilon([*entries, entry], delta, level)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return Recorded(number, time, lineage.entries[-1].dataset, entry, total if total < float("inf") else None, delta, level)


def _spent(lineage: Lineage, policy: SitePolicy) -> float:
    entries = [one.entry for one in lineage.entries]
    return total_epsilon(entries, judged_delta(entries, policy, lineage.patients), level_of(entries, policy.min_unit))
