"""What the report says of privacy: what was protected and how, what was spent, and what left the hospitals unprotected."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import ExperimentConfig
from common.config_types import Withheld
from server.report_numbers import count, number
from server.report_run import Run

WITHHELD: dict[Withheld, str] = {
    "data_report": "what was found and left out of their data",
    "training_metrics": "loss, accuracy and steps of training",
    "validation_statistics": "their validation statistics, so that the pooled ones are of the others",
}


@dataclass(frozen=True)
class Privacy:
    """Sentences on what is protected; each thing that left without noise and without masks; epsilon by hospital, at its last round."""

    protected: list[str]
    unprotected: list[str]
    spent: dict[str, float]


def describe_privacy(run: Run) -> Privacy | None:
    """What the run's configuration and history tell; None where the configuration is missing."""
    if run.experiment is None:
        return None
    spent = _spent(run)
    return Privacy(_protected(run, run.experiment, spent), _unprotected(run.experiment), spent)


def _spent(run: Run) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in run.history:
        for name, epsilon in line.epsilons.items():
            found[name] = max(epsilon, found.get(name, 0.0))
    return dict(sorted(found.items()))


def _protected(run: Run, cfg: ExperimentConfig, spent: dict[str, float]) -> list[str]:
    texts = []
    if cfg.privacy.mechanism != "none":
        delta = f"{cfg.privacy.delta:g}" if cfg.privacy.delta else "1 / training patients of each hospital"
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
            texts.append(f"{count(dropped, 'time')} a hospital dropped out of a sum, which was completed without it.")
    return texts + _by_policy(run)


def _by_policy(run: Run) -> list[str]:
    """What hospitals kept back, or noised, by their own policy."""
    texts = [
        f"By their own policy, these hospitals kept back {words}: {', '.join(names)}."
        for kind, words in WITHHELD.items()
        if (names := run.kept_back(kind))
    ]
    if noised := run.kept_back("count_noise"):
        texts.append(f"These hospitals told their numbers of images with noise, which their ledgers count: {', '.join(noised)}.")
    return texts


def _central(run: Run, cfg: ExperimentConfig) -> str:
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


def _unprotected(cfg: ExperimentConfig) -> list[str]:
    private, secret = cfg.privacy.mechanism != "none", cfg.secure_aggregation.enabled
    whose = "summed over the hospitals" if secret else "of each hospital"
    noised = " to the coordinator" if cfg.central_privacy.enabled else ""
    found = [] if private else [f"the change of the model's weights in each round, {whose}{noised}"]
    if not private or cfg.privacy.open_metrics:
        found.append(f"loss and accuracy in training, {whose}")
    found.append(f"numbers of images and of each class, {whose}")
    found.append(f"validation statistics (how many images of each class have which score) in each round, {whose}")
    found.append("the threshold, which is chosen from those statistics")
    if not secret:
        found.append("the seconds that a round took at each hospital")
    return found
