"""Where the dossier of a run takes its facts from besides the audit log: the site's ledger, and what the site was handed by others.

    read_budget        the run's own entries, and the account of the data; a ledger that is closed is a fact here and no error
    read_model         a signed model bundle: what its card says of the model's use, and on whom it was judged
    read_attack_bench       `attack.json` of `pneumofed privacy attack`, and in what its models differ from the run's
    read_coordinator_log   the coordinator's audit log: who took part, how the run ended, and whether it holds all heads of this site's log

All but the ledger is what others say, and shown as theirs. No path of these files is kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pneumofed.client.federation.policy_decision import LIMITS
from pneumofed.client.privacy.entries import total_epsilon
from pneumofed.client.privacy.ledger import Lineage, open_ledger
from pneumofed.client.privacy.ledger_file import Recorded
from pneumofed.client.privacy.ledger_report import Account, accounts, verify_ledger
from pneumofed.common.audit.log import COORDINATOR_ACTOR, ROUND_EVENT, RUN_ENDED, read_entries
from pneumofed.common.audit.verify import anchors_in, verify_log
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import ConfigError, PolicyError, printable_line
from pneumofed.common.model_bundle.bundle import open_trusted
from pneumofed.common.model_bundle.manifest import CARD, Measured
from pneumofed.common.model_bundle.population import describe_groups

USE_HEADING = "## Intended use and its limits"
"""Of a bundle's `card.md` (`server/export/templates/card.md`)."""
JUDGED_METRICS = ("auroc", "sensitivity", "specificity")


@dataclass(frozen=True)
class DataAccount:
    """What was spent on data with one budget, by all runs; infinite numbers are None."""

    images: int
    level: str
    delta: float
    epsilon: float | None
    of_run: float | None
    """Of this run by itself, at the account's delta; these do not add up. None where it has no entry here."""
    of_study: float | None
    """Of all runs of this run's study."""
    remaining: float | None
    """None where no limit is set, or where the policy cannot be read."""
    runs: int


@dataclass(frozen=True)
class BudgetFacts:
    """`state` is `closed` where the ledger refuses to be used, `empty` where nothing was ever spent."""

    state: Literal["closed", "empty", "counted"]
    entries: tuple[Mapping[str, Any], ...] = ()
    """Of this run, and of numbers of images with noise under its configuration."""
    accounts: tuple[DataAccount, ...] = ()
    limits: Mapping[str, float | None] | None = None
    """None where the policy cannot be read."""
    problems: int | None = None
    """Of `pneumofed privacy verify`; None where there was nothing to verify."""
    open_rounds: int | None = None
    """Training rounds of all runs that were answered without differential privacy, which no ledger can count."""


def studies_of(config: SiteConfig) -> dict[str, str]:
    """Reads which runs the ledger counted, by token, with the study's name; empty where it cannot be used."""
    return {
        one.entry.run: one.entry.study
        for lineage in _lineages(config) or ()
        for one in lineage.entries
        if one.entry.purpose == "training"
    }


def read_budget(config: SiteConfig, policy: SitePolicy | None, run: str, configs: Sequence[str]) -> BudgetFacts:
    """Reads what was counted of a run and what was spent on its data.

    Args:
        config: the site's own.
        policy: its policy now; None where it cannot be read.
        run: the run's token.
        configs: hashes of the configurations that it asked with, by which noised counts are found.
    """
    limits = {str(limit): getattr(policy, limit) for limit in LIMITS} if policy else None
    lineages = _lineages(config)
    if lineages is None:
        return BudgetFacts("closed", limits=limits)
    if not any(lineage.entries for lineage in lineages):
        return BudgetFacts("empty", limits=limits)
    report = verify_ledger(config)
    used = {account.lineage: account for account in accounts(lineages, policy or SitePolicy())}
    return BudgetFacts(
        "counted",
        tuple(_entry(one) for lineage in lineages for one in lineage.entries if _belongs(one, run, configs)),
        tuple(_account(lineage, used[lineage.number], run, policy) for lineage in lineages if lineage.number in used),
        limits,
        len(report.problems),
        report.open_rounds,
    )


def _lineages(config: SiteConfig) -> list[Lineage] | None:
    try:
        return open_ledger(config).lineages()
    except PolicyError:
        return None


def _belongs(one: Recorded, run: str, configs: Sequence[str]) -> bool:
    return one.entry.run == run or (one.entry.purpose == "counts" and one.entry.experiment in configs)


def _entry(one: Recorded) -> dict[str, Any]:
    entry = one.entry
    plain = {key: getattr(entry, key) for key in ("purpose", "round", "unit", "delta")}
    return {"number": one.number, "time": one.time, **plain, **vars(entry.mechanism)}


def _account(lineage: Lineage, account: Account, run: str, policy: SitePolicy | None) -> DataAccount:
    entries = [one.entry for one in lineage.entries]
    of_run = [entry for entry in entries if entry.run == run]
    of_study = [entry for entry in entries if of_run and entry.study == of_run[0].study]
    run_alone, study = (total_epsilon(some, account.delta, account.level) if some else None for some in (of_run, of_study))
    return DataAccount(
        lineage.images,
        account.level,
        account.delta,
        _finite(account.epsilon),
        _finite(run_alone),
        _finite(study),
        account.remaining if policy else None,
        len({entry.run for entry in entries if entry.purpose == "training"}),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class ModelFacts:
    """What a bundle says of itself. `of_run` is None where it does not say which run it is from."""

    name: str
    digest: str
    signer: str
    signer_trusted: bool
    created: str
    of_run: bool | None
    round: int | None
    use: tuple[str, ...]
    judged: tuple[Mapping[str, Any], ...]
    """Sets with their name, images and patients, and value, low and high of each of `JUDGED_METRICS`."""
    population: Mapping[str, str] | None
    phantom: bool
    virtual: bool
    sites: int
    shares: tuple[float, ...]
    training_images: int | None
    protected: tuple[str, ...] | None
    unprotected: tuple[str, ...] | None


@dataclass(frozen=True)
class AttackFacts:
    """What the attack bench found. It attacks models that it trains itself: `differences` says in what their recipe is not the run's."""

    phantom: bool
    patients: int
    hospitals: int
    models: int
    membership: tuple[Mapping[str, Any], ...]
    canaries: tuple[Mapping[str, Any], ...]
    inversion: tuple[Mapping[str, Any], ...]
    differences: tuple[str, ...]
    compared: bool
    """False where the site's records do not say what the run asked for, so that nothing could be compared."""


@dataclass(frozen=True)
class CoordinatorFacts:
    """What the coordinator's log says of the run. `missing` counts heads of this site's log that it knows and this site's log lacks."""

    intact: bool
    status: str | None
    rounds: int
    participants: tuple[str, ...]
    heads: int
    missing: int


def read_model(path: Path, trusted: Sequence[Path], run: str) -> ModelFacts:
    """Reads what a bundle says of its model.

    Args:
        path: the bundle, a folder or an archive.
        trusted: files of public keys, one of which must have signed it; empty takes any signer.
        run: the token of the run that the dossier is about.

    Raises:
        BundleError: the bundle is damaged or signed by a stranger.
        ConfigError: it says that it is from another run, or a key cannot be read.
    """
    bundle = open_trusted(path, trusted)
    manifest, card = bundle.manifest, bundle.manifest.card
    origin = card.provenance
    if origin is not None and origin.run != run:
        raise ConfigError(
            f"the bundle {manifest.name} is the model of run {printable_line(origin.run)}, and the dossier is about run {run}; "
            "give the bundle of this run, or ask for the dossier of that one"
        )
    privacy, population = card.privacy, manifest.population
    return ModelFacts(
        name=manifest.name,
        digest=bundle.digest,
        signer=bundle.signer,
        signer_trusted=bool(trusted),
        created=manifest.created.strftime("%Y-%m-%d"),
        of_run=None if origin is None else True,
        round=origin.round if origin else None,
        use=_intended_use(bundle.read(CARD).decode("utf-8", "replace")),
        judged=tuple(_judged_set(one) for one in card.measured if "," not in one.name),
        population={kind: describe_groups(kind, population.judged(kind)) for kind in ("age", "sex", "view")}
        if population
        else None,
        phantom=card.phantom,
        virtual=card.virtual,
        sites=card.sites,
        shares=population.mix.shares if population else (),
        training_images=card.training_images,
        protected=privacy.protected if privacy else None,
        unprotected=privacy.unprotected if privacy else None,
    )


def read_attack_bench(path: Path, terms: Mapping[str, Any] | None) -> AttackFacts:
    """Reads what the attack bench found.

    Args:
        path: `attack.json`, or the folder that `pneumofed privacy attack` wrote.
        terms: what the run asked for, as its lines in the audit log have it; None where they do not.

    Raises:
        ConfigError: it is no result of the attack bench.
    """
    file = path / "attack.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        settings, experiment = found["settings"], found["experiment"]
        return AttackFacts(
            bool(found["phantom"]),
            int(settings["patients"]),
            int(settings["hospitals"]),
            int(settings["models"]),
            tuple(row for one in found["membership"] for row in _membership(one)),
            tuple({key: one[key] for key in ("epsilon", "lower", "upper", "delta")} for one in found["canaries"]),
            tuple(
                {
                    "view": str(one["view"]),
                    "epsilon": one["epsilon"],
                    "hits": int(one["identified"]["hits"]),
                    "n": int(one["identified"]["n"]),
                }
                for one in found["inversion"]
            ),
            _differences(experiment, terms),
            compared=terms is not None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no result of the attack bench ({type(error).__name__}); give the folder that "
            "`pneumofed privacy attack --out FOLDER` wrote, or its attack.json"
        ) from error


def read_coordinator_log(path: Path, site_log: Path, site: str, run: str) -> CoordinatorFacts:
    """Reads what the coordinator's log says of the run.

    Args:
        path: the coordinator's audit log.
        site_log: this site's, whose heads it keeps.
        site: this site's name.
        run: the run's token.

    Raises:
        AuditError: it cannot be read.
        ConfigError: it is no log of a coordinator.
    """
    report, entries = verify_log(path), read_entries(path)
    if any(entry.actor != COORDINATOR_ACTOR for entry in entries) or not entries:
        raise ConfigError(f"{path} is not the audit log of a coordinator; ask the coordinator for its state/audit.jsonl")
    own = [entry for entry in entries if entry.facts.get("run") == run]
    rounds = [entry for entry in own if entry.event == ROUND_EVENT]
    names = {printable_line(str(name))[:64] for entry in rounds for name in entry.facts.get("participants", ())}
    ended = [str(entry.facts.get("status")) for entry in own if entry.event == RUN_ENDED]
    heads = anchors_in(path, site)
    missing = verify_log(site_log, heads).missing_heads if site_log.exists() else tuple(heads)
    return CoordinatorFacts(
        report.intact,
        printable_line(ended[-1])[:32] if ended else None,
        len({entry.facts.get("round") for entry in rounds}),
        tuple(sorted(names)),
        len(set(heads)),
        len(set(missing)),
    )


def _intended_use(card: str) -> tuple[str, ...]:
    """The points under `USE_HEADING`; none where the card has no such heading."""
    _, heading, rest = card.partition(f"{USE_HEADING}\n")
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0] if heading else ""
    return tuple(printable_line(point.strip()) for point in re.split(r"^- ", section, flags=re.MULTILINE)[1:])


def _judged_set(one: Measured) -> dict[str, Any]:
    found = {name: vars(one.metrics[name]) for name in JUDGED_METRICS if name in one.metrics}
    return {"name": printable_line(one.name), "images": one.images, "patients": one.patients, **found}


def _membership(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"epsilon": row["epsilon"], "attack": str(name), **{key: found["auroc"][key] for key in ("value", "low", "high")}}
        for name, found in row["attacks"].items()
    ]


def _differences(experiment: Mapping[str, Any], terms: Mapping[str, Any] | None) -> tuple[str, ...]:
    """In what the recipe that was attacked is not the run's, as far as the site's records say what that was."""
    attacked = {
        "network": experiment["model"]["name"],
        "task": task if isinstance(task := experiment["task"], str) else "/".join(task),
        "strategy": experiment["strategy"]["name"],
        "rounds": experiment["rounds"],
    }
    asked = terms or {}
    return tuple(
        f"{key}: {printable_line(str(value))} in the attack, {asked[key]} in the run"
        for key, value in attacked.items()
        if key in asked and asked[key] != value
    )
