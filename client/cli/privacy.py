"""`pneumofed privacy`: what a hospital's data has spent, what a run would spend, and whether the ledger holds. Nothing heavy at the top."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pneumofed.common.ops.command_line import FAILURE, Json, Site, console, print_json, say

app = typer.Typer(no_args_is_help=True, help="The privacy budget of a hospital's data.")


@app.command("show")
def privacy_show(site: Site = Path(), json_: Json = False) -> None:
    """Show what was spent of the budget, on which data, by which study and run, what remains, and how many evaluations were answered."""
    from pneumofed.client.federation.evaluations import read_evaluations
    from pneumofed.client.federation.exposure import statistics_sentence
    from pneumofed.client.federation.policy import local_now, policy_of
    from pneumofed.client.privacy.ledger_report import accounts, runs_table
    from pneumofed.client.privacy.spending import open_ledger
    from pneumofed.client.site.folder import SiteFolder

    config = SiteFolder.open(site).config
    limits = policy_of(config)
    found = accounts(open_ledger(config).lineages(), limits)
    if json_:
        print_json([asdict(account) for account in found])
        return
    if not found:
        limit = "no limit is set" if limits.max_epsilon is None else f"the limit is epsilon {limits.max_epsilon:g}"
        say(f"nothing was spent; {limit}")
    for account in found:
        say(account.sentence())
        console.print(runs_table(account))
    say(statistics_sentence(limits))
    for sentence in read_evaluations(Path(config.work_dir)).sentences(local_now()):
        say(sentence)


@app.command("plan")
def privacy_plan(
    experiment: Annotated[Path, typer.Argument(help="YAML file of the experiment.")],
    site: Site = Path(),
    out: Annotated[
        Path | None,
        typer.Option(help="Picture of epsilon over the rounds (PNG).", show_default="epsilon-NAME.png in the work folder"),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what a run would spend here on top of what was spent, and draw it. Reads the images; trains and counts nothing.

    Exit code: 0 all rounds are within the budget, 1 the site would refuse the run or one of its rounds.
    """
    from pneumofed.client.federation.policy import policy_of
    from pneumofed.client.privacy.forecast import forecast
    from pneumofed.client.privacy.forecast_picture import draw_forecast
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.config.experiment import ExperimentConfig
    from pneumofed.common.config.reader import build_config, read_yaml

    config = SiteFolder.open(site).config
    run = build_config(ExperimentConfig, read_yaml(experiment), experiment.name)
    found = forecast(config, run, policy_of(config))
    picture = out or Path(config.work_dir) / f"epsilon-{run.name}.png"
    draw_forecast(found, picture)
    if json_:
        print_json(asdict(found))
    else:
        for sentence in found.sentences():
            say(sentence)
        say(f"picture: {picture}")
    raise typer.Exit(FAILURE if found.refused_from is not None else 0)


@app.command("verify")
def privacy_verify(site: Site = Path(), json_: Json = False) -> None:
    """Check the ledger: each entry as it was written, every epsilon by the other accountant, each answered round counted.

    Exit code: 0 it holds, 1 it does not.
    """
    from pneumofed.client.privacy.ledger_report import verify_ledger
    from pneumofed.client.site.folder import SiteFolder

    report = verify_ledger(SiteFolder.open(site).config)
    if json_:
        print_json({**asdict(report), "intact": report.intact})
    else:
        for problem in report.problems:
            say(problem, style="red")
        say(report.sentence())
    raise typer.Exit(0 if report.intact else FAILURE)
