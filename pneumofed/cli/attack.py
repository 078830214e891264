"""`pneumofed privacy attack`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pneumofed.common.ops.command_line import Quiet, say
from pneumofed.simulation.attacks.settings import AttackConfig, attacked_experiment, read_attacks, read_epsilons

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
