"""Commands of a site that need another house, which a site by itself has not: the exporter, and the reading room.

`pneumofed site export-personal`: a site's own model of a run (`personal.method`) as a model bundle. The exporter reads run folders, so the
model is put into one, in the site's cache: judged on the site's own validation patients, who also give threshold, calibration and
reference, and removed when the bundle is there. Nothing of it leaves the site's folder.

`pneumofed site data feedback`: from a reading room, or its export, into a site's manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pneumofed.client.cli.archive import exit_codes
from pneumofed.common.errors import ConfigError, EmptySiteError, counted
from pneumofed.common.ops.command_line import Json, Site, note, print_json, say

if TYPE_CHECKING:
    from pneumofed.client.federation.ditto import PersonalModel
    from pneumofed.client.federation.site_data import SiteData
    from pneumofed.common.config.experiment import ExperimentConfig
    from pneumofed.common.config.parties import SiteConfig
    from pneumofed.common.evaluation.statistics import Statistics
    from pneumofed.server.export.export import ExportPlan
    from pneumofed.server.runs.records import Metrics

ROOM = "room.yaml"
"""What makes a folder a reading room."""

VALIDATION_SET = "own-validation"
"""Name of the site's validation patients as the reference of the bundle."""

LEAST_PATIENTS = 4
"""As `common.model_bundle.suitability` asks of a reference."""


def export_personal(
    run: Annotated[
        str, typer.Argument(help="The run's token or its first digits, or its name.", show_default="the only one")
    ] = "",
    site: Site = Path(),
    out: Annotated[
        Path | None, typer.Option(help="Folder of the bundle.", show_default="personal/RUN/bundle-ROUND of the work folder")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Private key that signs.", show_default="personal/key/node, made if missing")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a model bundle of this site's own model, for its own reading room; judged and calibrated on its validation patients."""
    from pneumofed.client.federation.ditto import PersonalModels, find_personal_run
    from pneumofed.common.folder_lock import owned
    from pneumofed.common.wire.keys import read_private_key
    from pneumofed.server.export.export import ExportPlan, export_run

    config = find_own_config(site)
    model = find_personal_run(Path(config.work_dir), run)
    folder = PersonalModels.of(config.work_dir, model.run).folder
    key_file = key or _own_key(config)
    signing = read_private_key(key_file)
    staging = Path(config.work_dir) / "cache" / "own-model-export"  # goes with the cache when a patient withdraws
    plan = ExportPlan(staging, out or folder / f"bundle-{model.round:05d}", signing)
    with owned(folder, "export", "pneumofed site export-personal", "wait for it"):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            judged = write_as_run(model, config, staging, virtual_run(site))
            manifest = export_run(plan, lambda text: note(text, style=None) if json_ else say(text))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    told = _described(plan, model, key_file) | {"threshold": manifest.threshold.value, "validation": judged.to_json()}
    if json_:
        print_json(told)
    else:
        _tell(told, judged)


def _described(plan: ExportPlan, model: PersonalModel, key_file: Path) -> dict[str, Any]:
    from pneumofed.common.wire.keys import key_fingerprint

    return {
        "bundle": str(plan.out),
        "archive": str(plan.archive),
        "run": model.run,
        "round": model.round,
        "signed_by": key_fingerprint(plan.key.public_key()),
        "public_key": str(key_file.with_name(f"{key_file.name}.pub")),
    }


def _own_key(config: SiteConfig) -> Path:
    """The key that signs what the site exports for itself, made on first use."""
    from pneumofed.client.federation.ditto import FOLDER
    from pneumofed.common.wire.keys import write_node_key

    file = Path(config.work_dir) / FOLDER / "key" / "node"
    if not file.exists():
        write_node_key(file.parent, f"pneumofed-personal-{config.name}")
    return file


def _tell(told: Mapping[str, Any], judged: Metrics) -> None:
    from pneumofed.server.report.numbers import approximate

    area = approximate(judged)["auroc"]
    span = f" (95% CI {area.span})" if area.span else ""
    say(
        f"round {told['round']} of run {told['run']}: AUROC {area.number}{span} on {counted(judged.n or 0, 'image')} "
        "of this site's validation patients"
    )
    say(f"bundle: {told['bundle']} and {told['archive']}")
    say(f"signed by {told['signed_by']}; its public key, which the reading room is to trust: {told['public_key']}")


def find_own_config(folder: Path) -> SiteConfig:
    """Finds the configuration of a site folder, or of the folder of a virtual hospital in a simulation's run folder.

    Raises:
        ConfigError: `folder` is neither.
    """
    from pneumofed.client.federation.site_data import read_site_config

    if (folder / "site.yaml").is_file():
        return read_site_config(folder / "site.yaml")
    if virtual_run(folder) is not None:
        for file in sorted(folder.resolve().parent.glob("*.yaml")):
            config = read_site_config(file)
            if Path(config.work_dir) == folder.resolve():
                return config
    raise ConfigError(
        f"{folder} is neither a site folder (with site.yaml) nor RUN/sites/NAME of a simulation; give one with --site"
    )


def virtual_run(folder: Path) -> Path | None:
    """Finds the run folder of the simulation in which `folder` is a virtual hospital; None of a real site."""
    run = folder.resolve().parent.parent
    return run if (run / "simulation.yaml").is_file() and folder.resolve().parent.name == "sites" else None


def write_as_run(model: PersonalModel, config: SiteConfig, path: Path, simulation: Path | None) -> Metrics:
    """Writes the model as the kept one of a finished run of one round and one site, for `export_run`.

    Args:
        model: the site's own.
        config: the site's.
        path: folder to make, in the site's own.
        simulation: run folder of the simulation that the site is a virtual hospital of; None of a real one.

    Returns:
        Metrics on the site's validation patients at the chosen threshold.

    Raises:
        EmptySiteError: the site has too few validation patients for threshold and reference.
    """
    from pneumofed.client.federation.site_data import load_site
    from pneumofed.common.evaluation.metrics import choose_threshold, metrics
    from pneumofed.server.runs.folder import RunFolder
    from pneumofed.server.runs.records import Metrics, RoundRecord, StoredThreshold

    take_study_code(config, model.experiment, simulation)
    site, folder = load_site(config, model.experiment), RunFolder(path)
    if (patients := len(set(site.validation.patients))) < LEAST_PATIENTS:
        raise EmptySiteError(
            f"{config.name}: {patients} validation patients; a bundle's threshold and reference need {LEAST_PATIENTS}"
        )
    experiment = _own_experiment(model, config.name)
    path.mkdir(mode=0o700, parents=True)
    folder.prepare()
    folder.write_config(experiment)
    folder.write_environment()
    statistics = _judge_and_keep(model, experiment, site, folder.best_checkpoint)
    chosen = choose_threshold(statistics, experiment.evaluation.threshold_policy, experiment.evaluation.target)
    judged = Metrics.model_validate(metrics(statistics, chosen.value))
    threshold = StoredThreshold.model_validate(vars(chosen))
    folder.append_history(RoundRecord(round=model.round, drawn=(config.name,), threshold=threshold, validation=judged))
    folder.write_validation(model.round, statistics)
    _write_sets(site, path)
    facts: dict[str, Any] = {"threshold": threshold, "validation": judged, "phantom": None}
    if simulation is not None:
        shutil.copyfile(simulation / "simulation.yaml", path / "simulation.yaml")
        facts["phantom"] = RunFolder(simulation).read_summary().phantom
    _write_summary(model, experiment, site, folder, facts)
    return judged


def take_study_code(config: SiteConfig, experiment: ExperimentConfig, simulation: Path | None) -> None:
    """Makes a study's own network known to this process: of the app bundles that the hospital approves, or of the simulation.

    Args:
        config: the site's.
        experiment: names the network.
        simulation: run folder of the simulation that the site is a virtual hospital of; None of a real one.
    """
    from pneumofed.common.ops.study_code import FOLDER, names_in, remember_folder
    from pneumofed.server.runs.folder import RunFolder

    if not (names := names_in(experiment)):
        return
    if simulation is not None:
        RunFolder(simulation).remember_study_code(experiment)
    elif config.policy is not None:
        from pneumofed.client.federation.policy import require_policy
        from pneumofed.client.site.approval import approved_hashes
        from pneumofed.client.site.code_gate import APPS_FOLDER
        from pneumofed.common.ops.app_bundle import PACKAGE

        work = Path(config.work_dir)
        for app in approved_hashes(require_policy(Path(config.policy)), work):
            remember_folder(work / APPS_FOLDER / app / PACKAGE / FOLDER, names)


def _own_experiment(model: PersonalModel, site: str) -> ExperimentConfig:
    """The experiment as the own model was trained by it, under a name that says whose it is."""
    from pneumofed.client.federation.ditto import plain_experiment

    return plain_experiment(model.experiment).model_copy(update={"name": f"{model.experiment.name}-own-{site}"[:64]})


def _judge_and_keep(model: PersonalModel, experiment: ExperimentConfig, site: SiteData, checkpoint: Path) -> Statistics:
    from pneumofed.client.federation.judging import evaluate_model
    from pneumofed.common.models.build import build_model
    from pneumofed.common.models.compute import build_compute
    from pneumofed.common.wire.parameter_layout import ArraysLayout
    from pneumofed.server.runs.checkpoints import Checkpoint, write_checkpoint

    network = build_model(experiment.model.without_weights(), experiment.task, seed=0)
    write_checkpoint(checkpoint, Checkpoint(experiment, model.run, model.round, model.arrays, {}), network)
    ArraysLayout.of(network).load(network, model.arrays.parameters, model.arrays.statistics)
    compute = build_compute(site.config.device, "fp32", site.config.threads)
    return evaluate_model(compute.place(network), site, experiment, compute)


def _write_sets(site: SiteData, path: Path) -> None:
    """The validation patients as the set that the bundle's reference is made of."""
    from pneumofed.common.config.parties import CoordinatorConfig
    from pneumofed.common.config.reader import format_yaml
    from pneumofed.common.data.manifest import Manifest, write_manifest

    manifest = path / f"{VALIDATION_SET}.csv"
    write_manifest(Manifest(site.validation.records), manifest)
    settings = CoordinatorConfig(run_dir=str(path), held_out={VALIDATION_SET: str(manifest)})
    (path / "coordinator.yaml").write_text(format_yaml(settings.model_dump(exclude_defaults=True)), encoding="utf-8")


def _write_summary(
    model: PersonalModel, experiment: ExperimentConfig, site: SiteData, folder: Any, facts: Mapping[str, Any]
) -> None:
    from pneumofed.common.config.classes import classes_of
    from pneumofed.server.runs.summary_records import RunSummary

    report = {**site.public_report, "train": len(site.train.labels), "validation": len(site.validation.labels)}
    values = {
        "status": "succeeded",
        "name": experiment.name,
        "seed": experiment.seed,
        "classes": classes_of(experiment.task),
        "sites": {site.name: report},
        "rounds_completed": model.round,
        "best_round": model.round,
        "personal_of": site.name,
    }
    folder.write_summary(RunSummary.model_validate({**values, **facts}))


def feedback(
    export: Annotated[
        Path, typer.Argument(help="The reading room's folder, or its export of labels (CSV, or a folder with labels.csv).")
    ],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Take the readers' labels into the manifest: corrections of images that are there, and new cases."""
    with exit_codes(as_json):
        from pneumofed.client.data.feedback import add_feedback
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.audit.log import LABELS_TAKEN

        folder = SiteFolder.open(site)
        with readers_export(export) as table:
            told = add_feedback(folder, table).describe()
        changed = {name: told[name] for name in ("found", "added", "corrected", "confirmed", "set_aside", "total")}
        folder.audit.record(LABELS_TAKEN, **changed)
        if as_json:
            print_json(told, indent=1)
            return
        say(
            f"{told['found']} images read: {told['added']} added, {told['corrected']} labels corrected, "
            f"{told['confirmed']} confirmed, {told['set_aside']} set aside"
        )
        for reason, count in told["skipped"].items():
            say(f"  unchanged: {reason}: {count}")
        share = told["read"] / told["total"] if told["total"] else 0.0
        say(f"manifest: {told['total']} images, {told['read']} of them ({share:.0%}) from readers, who choose their cases")


def readers_export(path: Path) -> AbstractContextManager[Path]:
    """The table of readers' labels: `path` itself, or that of the reading room whose folder it is, for as long as the block lasts.

    Raises:
        ConfigError: the room, its database or the key of its pseudonyms cannot be used.
    """
    if not (path / ROOM).is_file():
        return nullcontext(path)
    from pneumofed.inference.reading_room.labels import export_of_room  # SQLAlchemy, for those only who have a room

    return export_of_room(path)
