"""A site's private work against its ledger: what is counted before a round trains, and what can be refused before data is read."""

from __future__ import annotations

from pathlib import Path

from pneumofed.client.federation.site_data import SiteData
from pneumofed.client.privacy.entries import DataUnits, LedgerEntry
from pneumofed.client.privacy.ledger import Ledger, Spent
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.audit.log import hash_experiment
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy


def open_ledger(config: SiteConfig) -> Ledger:
    """Opens the site's ledger; no file is made before its first entry."""
    return Ledger(Path(config.work_dir) / "ledger.sqlite")


def spend_round(
    run: str, round_number: int, experiment: ExperimentConfig, site: SiteData, plan: SitePlan, policy: SitePolicy
) -> Spent:
    """Counts the training of one round, which may begin once this has returned. To be called for each attempt, a repeated one too.

    Args:
        run: the run's token.
        round_number: from 1.
        experiment: of the run.
        site: the site's data.
        plan: what the round does.
        policy: the site's, as it stood when the message came.

    Raises:
        PolicyError, BudgetError: policy or ledger refuse the round (see `Ledger.spend`); it must not train.
    """
    units = DataUnits.of(site)
    entry = round_entry(run, round_number, experiment, units, plan)
    return open_ledger(site.config).spend(entry, units, policy)


def round_entry(run: str, round_number: int, experiment: ExperimentConfig, units: DataUnits, plan: SitePlan) -> LedgerEntry:
    """Makes the entry of one training round.

    Args:
        run: the run's token.
        round_number: from 1.
        experiment: of the run.
        units: the site's data.
        plan: what the round does.
    """
    return LedgerEntry(
        run,
        round_number,
        experiment.name,
        hash_experiment(experiment),
        "training",
        plan.unit,
        units.images_per_patient,
        plan.round_mechanism(),
        plan.delta,
    )


def check_budget(config: SiteConfig, policy: SitePolicy, experiment: ExperimentConfig, run: str) -> None:
    """Refuses a later round of a private run that the ledger is sure to refuse, before any data is read.

    The first round of a run is refused by `spend_round`, once the data is known and before it trains.

    Args:
        config: the site's own.
        policy: the site's, as it stood when the message came.
        experiment: of the run.
        run: the run's token.

    Raises:
        PolicyError, BudgetError: as `Ledger.spend`.
    """
    open_ledger(config).foresee(run, hash_experiment(experiment), policy)
