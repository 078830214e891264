"""What a researcher runs around a study. Nothing heavy is imported before a command runs.

pneumofed check-model       what the study's own network can do, before it starts
pneumofed sweep             many settings and seeds, the choice on validation, the held-out sets opened once at the end
pneumofed privacy attack    what models and updates would give away
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pneumofed.common.errors import counted
from pneumofed.common.ops.command_line import Json, Quiet, console, exit_when_stopped, note, print_json, say
from pneumofed.server.cli.track import Track
from pneumofed.simulation.attacks.settings import AttackConfig, attacked_experiment, read_attacks, read_epsilons

if TYPE_CHECKING:
    from pneumofed.common.config.experiment import ExperimentConfig
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


def check_model(
    model: Annotated[str, typer.Argument(help="FILE.py:FUNCTION, or a network of the list.")],
    loss: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION, a study's own loss, or one of the list.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of the study, or a name: kaggle, private, ...")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=32, max=1024, help="Side of the input in pixels.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any key of the experiment. May stand more than once.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Also write the app bundle (.fab) that hospitals read and approve.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Try what pneumofed does with a network: training, privacy, export, explanations, bytes.

    Exit code: 0 it can do what the study asks for, 2 it cannot, or it is no network.
    """
    from pneumofed.common.config.reader import load_experiment, merge, parse_overrides
    from pneumofed.simulation.network_checks import check_network, refuse_unable

    shortcuts: dict[str, Any] = {"model": {"name": model}}
    shortcuts |= {"loss": {"name": loss}} if loss else {}
    shortcuts |= {"image": {"size_px": image_size}} if image_size else {}
    experiment = load_experiment(config, merge(shortcuts, parse_overrides(set_ or [])))
    findings = check_network(experiment)
    if as_json:
        print_json([found._asdict() for found in findings])
    else:
        _show_findings([(found.answer, found.name, found.text) for found in findings])
    refuse_unable(findings)
    if bundle:
        _write_bundle(bundle, experiment)


def _show_findings(rows: list[tuple[str, str, str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _write_bundle(path: Path, experiment: ExperimentConfig) -> None:
    from pneumofed.common.errors import ConfigError
    from pneumofed.common.files import write_file
    from pneumofed.common.ops.app_bundle import build_bundle, hash_bundle
    from pneumofed.common.ops.study_code import study_codes_of

    content = build_bundle(study_codes_of(experiment))
    try:
        write_file(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    say(f"{path}: the app with the study's own code, SHA-256 {hash_bundle(content)}")
    say(
        f"a hospital reads it (unzip -p {path} 'pneumofed/study_code/*') and lets it run by `pneumofed site approve --bundle {path}`"
    )


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
