"""What a researcher runs over many settings: `pneumofed sweep`, a study's settings and seeds with the choice on validation and the held-out
sets at the end, and `pneumofed privacy attack`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pneumofed.common.errors import counted
from pneumofed.common.ops.command_line import Quiet, console, exit_when_stopped, note, print_json, say
from pneumofed.server.cli.track import Track
from pneumofed.simulation.attacks.settings import AttackConfig, attacked_experiment, read_attacks, read_epsilons

if TYPE_CHECKING:
    from pneumofed.simulation.sweep import Spread, SweepTable

Out = Annotated[Path, typer.Option(help="Folder for attack.html, attack.json and what is drawn and decoded.")]
Data = Annotated[Path | None, typer.Option(help="Folder in the Kaggle layout. Without it, phantoms are drawn.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of the experiment to attack. Without it, a small one that leaks.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any key of the experiment, as in `simulate`. May stand more than once.")
]
Epsilons = Annotated[str, typer.Option(help="Target epsilons with commas between; inf is no privacy.")]
Attacks = Annotated[str, typer.Option("--attack", help="Which attacks, with commas between.")]
Size = Annotated[
    list[str] | None,
    typer.Option(
        "--size", help="Any size of the attacks: --size models=32, patients, canaries, images, iterations, restarts, ..."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 is one a CPU.")]


def sweep_command(
    study: Annotated[Path, typer.Argument(help="YAML file: config, simulation, settings, grid, seeds.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; the same again goes on.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many hospitals of a run work at once.", show_default="one a CPU")
    ] = None,
    track: Track = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress: the table and errors only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The table as JSON on standard output.")] = False,
) -> None:
    """Run one study under several settings and seeds, choose on validation, and open the held-out sets once at the end."""
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.server.tracking.targets import read_targets
    from pneumofed.simulation.sweep import plan_sweep, read_sweep, run_sweep

    plan = plan_sweep(read_sweep(study), out, workers, read_targets(track))
    with open_progress(quiet=quiet, results_piped=as_json) as progress:
        tell = partial(note if as_json else say, style=None) if not quiet else lambda _: None
        with exit_when_stopped(lambda: f"pneumofed: stopped; the same command goes on in {out}"):
            table = run_sweep(plan, tell, progress)
    if as_json:
        print_json(table.to_json())
    else:
        show_table(table)
    if table.done < table.runs:
        raise typer.Exit(1)


def show_table(table: SweepTable) -> None:
    """Prints the table and, once all runs are done, what was chosen and its held-out results."""
    shown = Table("Setting", "Validation AUROC", "Seeds", "Failed", box=None, pad_edge=False)
    for name, found in table.settings.items():
        failed = "; ".join(f"seed {seed}: {reason}" for seed, reason in found.failed.items())
        shown.add_row(name, _spell(found.validation), str(len(found.by_seed)), failed)
    console.print(shown)
    if table.chosen is None:
        console.print(f"{table.done} of {table.runs} runs are done; held-out sets stay closed until all are")
        return
    console.print(f"chosen on validation: {table.chosen}")
    if table.lead is not None:
        told_apart = table.lead.low is not None and table.lead.low > 0
        verdict = "ahead" if told_apart else "not to be told apart over these seeds"
        console.print(f"against the next, {table.next}: {_spell(table.lead)}, {verdict}")
    for name, spread in table.held_out.items():
        console.print(f"{name}: AUROC {_spell(spread)}")


def _spell(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    interval = "" if spread.low is None else f" ({spread.low:.3f} to {spread.high:.3f} over {counted(spread.seeds, 'seed')})"
    return f"{spread.mean:.3f}{interval}"


def attack(
    out: Out,
    data: Data = None,
    config: ConfigFile = None,
    set_: Set = None,
    epsilons: Epsilons = "inf,6,3,1",
    attacks: Attacks = "membership,canaries,inversion",
    size: Size = None,
    seed: Seed = 0,
    workers: Workers = 0,
    quiet: Quiet = False,
) -> None:
    """Attack models and updates of a simulated hospital, with and without privacy, and write a report."""
    from pneumofed.common.config.reader import build_config, merge, parse_overrides

    values: dict[str, Any] = {"seed": seed, "workers": workers, **({"data": str(data)} if data else {})}
    cfg = build_config(AttackConfig, merge(values, parse_overrides(size or [])), "the attack's sizes")
    experiment = attacked_experiment(config, merge({"seed": seed}, parse_overrides(set_ or [])))
    asked, chosen = read_epsilons(epsilons), read_attacks(attacks)

    from pneumofed.common.ops.progress import open_progress, show_sentences
    from pneumofed.simulation.attacks.bench import build_bench
    from pneumofed.simulation.attacks.report import run_attacks

    with (
        open_progress(quiet=quiet) as progress,
        show_sentences(progress, "attacks", lambda text: None if quiet else say(text)) as told,
    ):
        bench = build_bench(cfg, experiment, asked, out)
        page = run_attacks(bench, chosen, out, told)
    say(f"report: {page}")
