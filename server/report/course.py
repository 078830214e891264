"""The course of a run as the report shows it: what protected the hospitals, what went wrong, how it ended, how to run it again.

`describe_privacy` lists what was protected and how, what was spent, and what left the hospitals without protection. `describe_course` and
`incidents` say how many rounds were completed and which replies are missing. `describe_ending` says how the run ended, never better
than it did, and what to do about it. `environment_rows` and `reproducing_command` say on what it ran and how to repeat it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pneumofed.common.config.choices import Withheld
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import counted
from pneumofed.server.report.numbers import DASH, number
from pneumofed.server.report.read_run import STATUS_WORDS, StoredRun
from pneumofed.server.runs.records import RoundRecord

WITHHELD_WORDS: dict[Withheld, str] = {
    "data_report": "what was found and left out of their data",
    "training_metrics": "loss, accuracy and steps of training",
    "validation_statistics": "their validation statistics, so that the pooled ones are of the others",
}
NO_ENDING = "The run folder records no end: the run is still going on, or its process was killed."
BETWEEN_SITES = re.compile(r"; (?=(?:node )?[A-Za-z0-9][\w.-]*: )")
"""Between the sites that a `RoundError` names."""
ROUND_PREFIX = re.compile(r"round (\d+): ")


@dataclass(frozen=True)
class PrivacySection:
    """Sentences on what is protected; each thing that left without noise and without masks; epsilon by hospital, at its last round."""

    protected: list[str]
    unprotected: list[str]
    spent: dict[str, float]


def describe_privacy(run: StoredRun) -> PrivacySection | None:
    """Describes what the run's configuration and history show; None where the configuration is missing."""
    if run.experiment is None:
        return None
    spent = _spent(run)
    return PrivacySection(
        _protected(run, run.experiment, spent), [*_unprotected(run, run.experiment), *_trained_alone(run)], spent
    )


def _spent(run: StoredRun) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in run.history:
        for name, epsilon in line.epsilons.items():
            found[name] = max(epsilon, found.get(name, 0.0))
    return dict(sorted(found.items()))


def _protected(run: StoredRun, cfg: ExperimentConfig, spent: dict[str, float]) -> list[str]:
    texts = []
    if cfg.privacy.mechanism != "none":
        delta = f"{cfg.privacy.delta:g}" if cfg.privacy.delta else "n^-1.1 of each hospital's n patients (0.001 at most)"
        texts.append(
            f"Each hospital trained with differential privacy (DP-SGD) that protects one {cfg.privacy.unit}, at delta {delta}. "
            + (f"The most that one spent in this run is epsilon {number(max(spent.values()))}." if spent else _planned(cfg))
        )
        if run.virtual:
            texts.append("The noise of a simulation is drawn from its seed: it shows what privacy costs, and protects nobody.")
    if cfg.central_privacy.enabled:
        texts.append(_central(run, cfg))
    if cfg.secure_aggregation.enabled:
        texts.append(
            "Updates, counts and validation statistics were added up under masks: the coordinator saw sums over the hospitals and no "
            "single hospital's."
        )
        dropped = sum(len(set(line.drawn) - set(line.secure_sum.summed if line.secure_sum else ())) for line in run.history)
        if dropped:
            texts.append(f"{counted(dropped, 'time')} a hospital dropped out of a sum, which was completed without it.")
    return texts + _by_policy(run)


def _by_policy(run: StoredRun) -> list[str]:
    """What hospitals kept back, or noised, by their own policy."""
    texts = [
        f"By their own policy, these hospitals kept back {words}: {', '.join(names)}."
        for kind, words in WITHHELD_WORDS.items()
        if (names := run.kept_back(kind))
    ]
    if noised := run.kept_back("count_noise"):
        texts.append(
            f"These hospitals reported their numbers of images with noise, which their ledgers count: {', '.join(noised)}."
        )
    return texts


def _central(run: StoredRun, cfg: ExperimentConfig) -> str:
    spent = max((line.central_epsilon for line in run.history if line.central_epsilon is not None), default=0.0)
    return (
        "The coordinator, whom the hospitals trusted with their updates, clipped each and added noise to their sum: the model is "
        f"differentially private with respect to each whole hospital, with epsilon {number(spent)} at delta "
        f"{cfg.central_privacy.delta:g} over the rounds so far."
    )


def _planned(cfg: ExperimentConfig) -> str:
    if cfg.privacy.noise_multiplier is not None:
        return f"The noise multiplier is {cfg.privacy.noise_multiplier:g}; each hospital's ledger has the epsilon."
    return f"The rounds planned spend epsilon {cfg.privacy.target_epsilon:g} at each hospital."


def _unprotected(run: StoredRun, cfg: ExperimentConfig) -> list[str]:
    private, secret = cfg.privacy.mechanism != "none", cfg.secure_aggregation.enabled
    whose = "summed over the hospitals" if secret else "of each hospital"
    noised = " to the coordinator" if cfg.central_privacy.enabled else ""
    found = [] if private else [f"the change of the model's weights in each round, {whose}{noised}"]
    if not private or cfg.privacy.open_metrics:
        found.append(f"loss and accuracy in training, {whose}")
    found.append(f"numbers of images and of each class, {whose}")
    judged = sum(line.validation is not None for line in run.history)
    rounds = "in each round" if judged == len(run.history) else f"in {judged} of {counted(len(run.history), 'round')}"
    found.append(f"validation statistics (how many images of each class have which score) {rounds}, {whose}")
    if cfg.personal.is_on and not secret and (not private or cfg.privacy.open_metrics):
        found.append("the same statistics of each hospital's own model, which itself never left")
    found.append("the threshold, which is chosen from those statistics")
    if not secret:
        found.append("the seconds that a round took at each hospital")
    return found


def _trained_alone(run: StoredRun) -> list[str]:
    """What left of models that hospitals trained by themselves."""
    found = ["validation statistics of the model that each trained alone"] if run.summary.alone else []
    if (matrix := run.summary.cross_site) and matrix.own:
        owners = ", ".join(sorted(matrix.own))
        found.append(f"the models that these hospitals trained alone, which the other hospitals got to judge: {owners}")
        found.append("validation statistics of each of these models at each hospital")
    return found


@dataclass(frozen=True)
class Incident:
    """What went wrong at one site, and in which rounds."""

    site: str
    what: str
    reason: str
    rounds: str


def describe_course(run: StoredRun) -> str:
    """Describes how many rounds were run of how many, and why not all, in a sentence or two."""
    planned = run.experiment.rounds if run.experiment else None
    troubled = [line.round for line in run.history if line.trouble]
    text = (
        f"{run.completed} of {planned} rounds were completed" if planned else f"{counted(run.completed, 'round')} were completed"
    )
    if run.status == "succeeded" and planned and run.completed < planned:
        text += ": the run stopped early, since validation AUROC no longer grew"
    if not run.completed:
        return text + "."
    if troubled:
        text += f". Not every hospital replied well in {_rounds(troubled)}."
    else:
        text += ", and every hospital that was asked replied well."
    return text + _describe_buffer(run)


def _describe_buffer(run: StoredRun) -> str:
    """How asynchronous rounds were made; empty for synchronous ones."""
    buffer = run.experiment.strategy.buffer if run.experiment else None
    if buffer is None:
        return ""
    return (
        f" Rounds were asynchronous (FedBuff): each took the first {counted(buffer, 'good update')} that came. Those of older weights were "
        "scaled by 1 / sqrt(1 + their age in rounds), and only hospitals that were not at work were in the validation of a round."
    )


def _rounds(numbers: Sequence[int]) -> str:
    return f"round{'' if len(numbers) == 1 else 's'} {spans(numbers)}"


def incidents(history: Iterable[RoundRecord]) -> list[Incident]:
    """Lists every failure and left-out reply, one row for each site and reason."""
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for line in history:
        for reasons, what in ((line.failures, "no answer"), (line.left_out, "reply left out")):
            for site, reason in reasons.items():
                rounds.setdefault((site, what, reason), []).append(line.round)
    return [Incident(*key, rounds=spans(numbers)) for key, numbers in sorted(rounds.items())]


def spans(numbers: Sequence[int]) -> str:
    """Formats rounds: `3, 5–7` for rising numbers 3, 5, 6, 7."""
    groups: list[list[int]] = []
    for n in numbers:
        if groups and n == groups[-1][-1] + 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}{DASH}{group[-1]}" for group in groups)


def environment_rows(run: StoredRun) -> list[tuple[str, str]]:
    """Lists what the coordinator ran on."""
    environment = run.environment
    rows = {
        "Python": environment.get("python"),
        "System": environment.get("platform"),
        "CPU": _cpu(environment),
        "Accelerator": environment.get("accelerator"),
    }
    rows |= dict((environment.get("packages") or {}).items())
    return [(name, str(value)) for name, value in rows.items() if value]


def _cpu(environment: Mapping[str, Any]) -> str:
    parts = [
        environment.get("cpu"),
        environment.get("cpus") and counted(environment["cpus"], "CPU"),
        environment.get("cpu_capability"),
    ]
    return ", ".join(str(part) for part in parts if part)


def reproducing_command(run: StoredRun) -> str:
    """Builds the command line that lays out the same virtual hospitals; empty where the run does not say how."""
    settings, divided = run.simulation, bool(run.simulation.get("data") or not run.simulation.get("sources"))
    if settings.get("command") or not settings:
        return str(settings.get("command") or "")
    by_column = str(settings.get("partition")).startswith("column:")  # which says how many hospitals there are
    dealt = {"hospitals": None if by_column else settings.get("hospitals"), "partition": settings.get("partition")}
    dealt |= {"alpha": settings.get("alpha"), "phantoms": None if settings.get("data") else settings.get("phantom_patients")}
    options = {"data": settings.get("data"), "external": settings.get("external"), **(dealt if divided else {})}
    pairs = {"hospital": "sources", "hold-out": "hold_out", "test": "held_out", "slow": "slow"}
    parts = ["pneumofed", "simulate", "--config", str(run.folder.config.name)]
    parts += [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]
    for option, key in pairs.items():
        parts += [text for name, value in (settings.get(key) or {}).items() for text in (f"--{option}", f"{name}={value}")]
    parts += ["--threads", str(settings["threads"])] if "threads" in settings else []
    parts += ["--baselines"] if run.summary.baselines else []
    return shlex.join([*parts, "--out", "NEW-FOLDER"])


@dataclass(frozen=True)
class Ending:
    """A badge, and for a run that did not succeed the reason, the sites named, and what to do."""

    status: str
    badge: str
    reason: str = ""
    sites: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def describe_ending(run: StoredRun) -> Ending:
    """Describes the ending as the summary records it; a run whose summary records none counts as unfinished."""
    if run.status == "succeeded":
        return Ending(run.status, STATUS_WORDS[run.status])
    error = run.summary.error or NO_ENDING
    badge = f"{STATUS_WORDS.get(run.status, 'Not finished')}, {_when(run, error)}"
    reason, separator, named = ROUND_PREFIX.sub("", error, count=1).partition("(strategy.min_sites). ")
    sites = tuple(BETWEEN_SITES.split(named)) if named else ()
    text = reason + separator.strip()
    return Ending(run.status, badge, text[0].upper() + text[1:], sites, tuple(_advice(run, sites)))


def _when(run: StoredRun, error: str) -> str:
    in_round = ROUND_PREFIX.match(error)
    if in_round:
        return f"in round {in_round[1]}"
    if any(run.is_final(name) for name in run.sets):
        return "after the last round"
    return f"after round {run.completed}" if run.completed else "before the end of the first round"


def _advice(run: StoredRun, sites: tuple[str, ...]) -> list[str]:
    advice = []
    if sites:
        advice.append(
            "Look into the log of each site named above (site.log in its own work folder): the details stand only there."
        )
        advice.append("If fewer sites are enough, lower strategy.min_sites; that is another experiment and needs a new run.")
    if (run.folder.path / "flower.log").exists():
        advice.append("flower.log in the run folder holds what Flower itself said.")
    if run.completed:
        advice.append(f"The {run.completed} completed rounds are kept: --resume goes on after them.")
    else:
        advice.append("No round was completed, so there is nothing to resume: start anew in an empty folder.")
    return advice
