"""Calibration error of a simulated run's model on its central sets: before, with a temperature, and with a temperature and a bias.

    python -m benchmarks.calibration RUN [--write]

Fitted on the pooled validation statistics of the virtual hospitals, which are computed again from their folders; `--write` keeps them in
RUN/validation.json, which runs since version 0.3 write themselves and `pneumofed export` reads.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from pneumofed.client.federation.judging import evaluate_model
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.config.classes import classes_of
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.model_bundle.calibration import Calibration, Method
from pneumofed.common.models.compute import build_compute
from pneumofed.server.export.export import load_network
from pneumofed.server.export.measures import calibrate, measure_central, measure_validation
from pneumofed.server.export.source import Source, read_finished_run

METHODS: tuple[Method, ...] = ("none", "temperature", "temperature_and_bias")


def pooled_validation(source: Source) -> Statistics:
    """The sum of the virtual hospitals' statistics of the run's kept model."""
    compute = build_compute("cpu", "fp32")
    network = compute.place(load_network(source))
    total = Statistics.zero(len(classes_of(source.experiment.task)))
    for file in sorted((source.run.folder.path / "sites").glob("*.yaml")):
        total = total + evaluate_model(network, load_site(read_site_config(file), source.experiment), source.experiment, compute)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the statistics in RUN/validation.json")
    options = parser.parse_args()
    source = read_finished_run(options.run)
    if source.validation is None:
        pooled = pooled_validation(source)
        source = replace(source, validation=pooled)
        if options.write:
            source.run.folder.write_validation(source.checkpoint.round, pooled)
    for method in METHODS:
        fit = calibrate(source, method) if method != "none" else Calibration()
        found = [*measure_validation(source, fit), *measure_central(source, fit)]
        shown = {one.name: {name: one.metrics[name].model_dump() for name in ("ece", "brier", "log_loss")} for one in found}
        print(json.dumps({"method": method, "temperature": fit.temperature, "intercept": fit.intercept, **shown}))


if __name__ == "__main__":
    main()
