"""Baselines that federation is measured against: training on all images in one place, and in each hospital by itself.

Each baseline is a federation of one (`client.federation.alone`): the same recipe, the same number of passes over its images, the same
loop, the same rule for the best round and the threshold, evaluated on the same central sets. `pooled` joins the sites' training images and
their validation images, so that no patient changes sides. The moving average of the weights is kept as in the federation; what a
strategy adds to the mean over sites (FedAvgM's momentum, FedAdam's step) is left out, since here nothing is averaged over sites.
Baselines of a private run train without privacy, on the same network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

from pneumofed.client.federation.alone import AloneModel, train_alone
from pneumofed.client.federation.clinical_sums import sum_columns
from pneumofed.client.federation.site_data import SiteData, load_site, read_site_config
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig, SiteConfig
from pneumofed.common.config.reader import build_config, experiment_from_json, read_yaml
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import PneumofedError
from pneumofed.common.evaluation.bootstrap import bootstrap_difference, bootstrap_differences
from pneumofed.common.evaluation.metrics import choose_threshold, metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.models.build import build_empty
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.common.ops.study_code import StudyCode, known_codes, remember_all
from pneumofed.common.wire.clinical_sums import standardize
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.after_rounds import first_arrays
from pneumofed.server.federation.central_evaluation import CentralEvaluator, bootstrap_settings, build_central_evaluator
from pneumofed.server.runs.folder import RunFolder, write_text
from pneumofed.server.runs.records import Metrics, StoredThreshold, by_field
from pneumofed.server.runs.summary_records import BaselineLead, BaselineResult, BaselineTable, MetricSpread, Results

POOLED = "pooled"
BASELINES = "baselines"
LOOK_EVERY_SEC = 0.5
_rounds_done: Synchronized[int] | None = None
"""In a worker process: rounds of all baselines so far, each times the number of its sites."""
COMPARED_METRICS = ("auroc", "accuracy", "sensitivity", "specificity")


@dataclass(frozen=True)
class BaselineJob:
    """One baseline: a name, the sites whose images it trains on, and where its result is written. Plain text, to cross processes."""

    name: str
    site_files: tuple[str, ...]
    coordinator_file: str
    experiment: str
    folder: str

    @property
    def result(self) -> Path:
        """The JSON file of the result."""
        return Path(self.folder) / f"{self.name}.json"

    def predictions(self, central_set: str) -> Path:
        """Returns the CSV file of the predictions on `central_set`, a held-out set."""
        return Path(self.folder) / f"{self.name}-{central_set}.csv"


def run_baselines(
    run_dir: Path,
    experiment: ExperimentConfig,
    site_files: Sequence[Path],
    coordinator_file: Path,
    say: Callable[[str], None],
    progress: Progress = NO_PROGRESS,
    workers: int = 1,
) -> BaselineTable:
    """Trains every baseline that has no result yet, and compares all of them with the federated model.

    Args:
        run_dir: run folder of the federation; results lie in its `baselines/`, so that an interrupted call goes on.
        experiment: the recipe.
        site_files: YAML configuration of each site.
        coordinator_file: the coordinator's YAML file, which names the central sets.
        say: takes a sentence as each baseline ends.
        progress: shows how many rounds are done, each weighed by the number of sites that it trains on.
        workers: how many are trained at once, each in a process of its own.
    """
    folder = run_dir / "baselines"
    folder.mkdir(exist_ok=True)
    jobs = _jobs(folder, experiment, site_files, coordinator_file)
    _train_all([job for job in jobs if not job.result.exists()], experiment.rounds, say, progress, workers)
    progress.show(BASELINES, note="comparing them with the federated model, by bootstrap")
    try:
        return compare_baselines(RunFolder(run_dir), jobs, experiment)
    finally:
        progress.finish(BASELINES)


def _train_all(missing: Sequence[BaselineJob], rounds: int, say: Callable[[str], None], progress: Progress, workers: int) -> None:
    """Runs the jobs; each round of each is counted as it ends."""
    workers = min(workers, max(len(missing), 1))
    processes = get_context("spawn")
    counter = processes.Value("L", 0)
    pool = ProcessPoolExecutor(workers, mp_context=processes, initializer=_begin_worker, initargs=(counter, known_codes()))
    total = rounds * sum(len(job.site_files) for job in missing)
    with children_end_with_me(), pool:
        running = {pool.submit(run_job, job): job for job in missing}
        waiting = set(running)
        while waiting:
            trained = len(missing) - len(waiting)
            progress.show(BASELINES, counter.value, total, f"{trained} of {len(missing)} done")
            ended, waiting = wait(waiting, LOOK_EVERY_SEC, FIRST_COMPLETED)
            for done in ended:
                done.result()
                say(f"baseline {running[done].name} is done")


def _begin_worker(counter: Synchronized[int], codes: Sequence[StudyCode]) -> None:
    """Begins a worker process: its rounds are counted in `counter`, and it knows the study's own code."""
    global _rounds_done
    _rounds_done = counter
    remember_all(codes)


def run_job(job: BaselineJob) -> None:
    """Trains and evaluates one baseline and writes its result; a site without usable images gets a result that says so."""
    experiment = experiment_from_json(job.experiment)
    configs = [read_site_config(Path(path)) for path in job.site_files]
    if experiment.training.local_steps is not None:  # pooled images are trained on as often as they are in the federation
        steps = experiment.training.local_steps * len(configs)
        experiment = experiment.model_copy(update={"training": experiment.training.model_copy(update={"local_steps": steps})})
    try:
        site = pool_sites([load_site(config, experiment) for config in configs], job.name)
        result = _train_and_evaluate(job, site, experiment)
    except PneumofedError as error:
        result = BaselineResult(error=f"{type(error).__name__}: {error.public_message}")
    write_text(job.result, json.dumps(result.to_json(), allow_nan=False))


def pool_sites(sites: Sequence[SiteData], name: str) -> SiteData:
    """Makes one site with the images of all; training and validation patients stay apart.

    Args:
        sites: at least one; device, threads and work folder are those of the first.
        name: of the new site; stands in the seeds of its training.
    """
    first = sites[0].config
    config = SiteConfig(name=name, manifest=first.manifest, work_dir=first.work_dir, device=first.device, threads=first.threads)
    return SiteData(config, Dataset.join([site.train for site in sites]), Dataset.join([site.validation for site in sites]), {})


def compare_baselines(folder: RunFolder, jobs: Sequence[BaselineJob], experiment: ExperimentConfig) -> BaselineTable:
    """Collects each baseline's results, their spread over hospitals, and the federated model's lead with its interval.

    Args:
        folder: run folder of the federation, with its predictions on the central sets.
        jobs: all baselines, each of which has a result.
        experiment: gives the bootstrap of the intervals.
    """
    results = {job.name: BaselineResult.model_validate_json(job.result.read_text(encoding="utf-8")) for job in jobs}
    alone = {name: result for name, result in results.items() if name != POOLED}
    names = dict.fromkeys(name for result in results.values() for name in result.results)
    by_name = {name: {site: found for site, result in alone.items() if (found := result.central(name))} for name in names}
    judged = {name: trained for name, trained in by_name.items() if trained}
    table = BaselineTable(pooled=results[POOLED], alone=alone)
    if not judged:
        return table
    return table.updated(
        alone_summary={
            name: {metric: _spread(trained, metric) for metric in COMPARED_METRICS} for name, trained in judged.items()
        },
        lead={name: _leads(folder, jobs, trained, name, experiment) for name, trained in judged.items()},
    )


def _jobs(folder: Path, experiment: ExperimentConfig, site_files: Sequence[Path], coordinator_file: Path) -> list[BaselineJob]:
    """Returns a job for each baseline, the pooled one first: it takes as long as all others together."""
    files = tuple(str(path) for path in site_files)
    names = {read_site_config(Path(path)).name: (path,) for path in files}
    text = experiment.model_dump_json()
    return [
        BaselineJob(name, paths, str(coordinator_file), text, str(folder)) for name, paths in {POOLED: files, **names}.items()
    ]


def _train_and_evaluate(job: BaselineJob, site: SiteData, experiment: ExperimentConfig) -> BaselineResult:
    trained = train_baseline(site, experiment, lambda number: _count_round(len(job.site_files)))
    threshold = choose_threshold(trained.statistics, experiment.evaluation.threshold_policy, experiment.evaluation.target)
    model = build_empty(experiment.model, experiment.task)
    ArraysLayout.of(model).load(model, trained.arrays.parameters, trained.arrays.statistics)
    evaluator = _central_evaluator(job, experiment)
    predictions = evaluator.predict(model)
    for name, found in predictions.items():
        found.write_csv(job.predictions(name))
    return BaselineResult(
        train=len(site.train),
        best_round=trained.round,
        threshold=StoredThreshold.model_validate(vars(threshold)),
        validation=Metrics.model_validate(metrics(trained.statistics, threshold.value)),
    ).updated(**by_field(evaluator.intervals(predictions, threshold.value)))


def train_baseline(site: SiteData, experiment: ExperimentConfig, done: Callable[[int], None] = lambda number: None) -> AloneModel:
    """Trains on the images of `site`, from the weights that the run starts from.

    Args:
        site: a hospital, or all of them joined by `pool_sites`.
        experiment: the recipe.
        done: is called with the number of each round as it ends.
    """
    stated = None
    if experiment.clinical is not None and experiment.asks_clinical_sums:
        stated = standardize(experiment.clinical, [sum_columns(site.train, experiment.clinical)])
    return train_alone(site, experiment, first_arrays(experiment, stated), done)


def _count_round(sites: int) -> None:
    """Counts one round of a baseline in the progress of all, as many times as sites are joined in it."""
    if _rounds_done is not None:
        with _rounds_done.get_lock():
            _rounds_done.value += sites


def _central_evaluator(job: BaselineJob, experiment: ExperimentConfig) -> CentralEvaluator:
    settings = build_config(CoordinatorConfig, read_yaml(job.coordinator_file), job.coordinator_file)
    return build_central_evaluator(experiment, settings.model_copy(update={"threads": 1}))


def _spread(results: Mapping[str, Results], metric: str) -> MetricSpread:
    """Mean, best and worst over hospitals of a metric, and over how many it was defined."""
    values = [value for result in results.values() if (value := result[metric].value) is not None]
    if not values:
        return MetricSpread(mean=None, best=None, worst=None, hospitals=0)
    return MetricSpread(mean=float(np.mean(values)), best=max(values), worst=min(values), hospitals=len(values))


def _leads(
    folder: RunFolder, jobs: Sequence[BaselineJob], trained: Mapping[str, Results], central_set: str, experiment: ExperimentConfig
) -> BaselineLead:
    """AUROC of the federated model minus that of the pooled one and of each hospital alone, by paired bootstrap over patients.

    The best hospital is picked for what it does on this very set, and a reader looks for those that lose: their intervals hold at once.
    """
    best = max(trained, key=lambda name: trained[name]["auroc"].value or 0.0)
    settings = bootstrap_settings(experiment, central_set)
    federated = Predictions.read_csv(folder.predictions(central_set))
    paths = {job.name: job.predictions(central_set) for job in jobs}
    others = {name: Predictions.read_csv(path) for name, path in paths.items() if path.exists()}
    pooled = others.pop(POOLED, None)
    leads = bootstrap_differences(federated, others, settings)
    named = {
        "over_pooled": None if pooled is None else bootstrap_difference(federated, pooled, settings),
        "over_best_alone": leads.get(best),
    }
    known = {key: lead for key, lead in named.items() if lead is not None}
    return BaselineLead.model_validate({"best_alone": best, **known, "over_alone": leads, "simultaneous": True})
