"""The bench as a whole, at a size that shows only that it works; and its settings, page and command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from pneumofed.cli.studies import attack
from pneumofed.client.federation.requests import describe_terms
from pneumofed.client.site.dossier_sources import read_attack_bench
from pneumofed.common.config.choices import CORRECTED
from pneumofed.common.config.reader import merge
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.evaluation.bootstrap import Bootstrap
from pneumofed.common.models.compute import build_compute
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.simulation.attacks.bench import Bench, Membership, build_bench
from pneumofed.simulation.attacks.inversion_bench import Inversion
from pneumofed.simulation.attacks.membership import draw_halves, judge_scores
from pneumofed.simulation.attacks.report import AttackFindings, as_json, render_page, run_attacks, write_findings
from pneumofed.simulation.attacks.settings import AttackConfig, at_epsilon, attacked_experiment, read_attacks, read_epsilons
from pneumofed.simulation.attacks.victims import Victim, margins_of, run_all, train_victim

SMALL: dict[str, Any] = {"patients": 20, "models": 4, "canaries": 10, "images": 2, "iterations": 3, "workers": 1}
SHORT: dict[str, Any] = {"rounds": 1, "training": {"local_epochs": 1}, "evaluation": {"bootstrap_samples": 50}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    out = tmp_path_factory.mktemp("bench")
    return build_bench(AttackConfig(**SMALL), attacked_experiment(None, SHORT), (math.inf, 3.0), out)


def _findings() -> AttackFindings:
    members = draw_halves(4, 20, 0)
    generator = np.random.default_rng(0)
    verdict = judge_scores(generator.random(members.shape), members, Bootstrap(resamples=20))
    share = verdict.true_positive_rates[0]
    images = generator.random((2, 32, 32))
    rows = [Inversion(view, math.inf, images, 20.0, 0.5, 0.9, 0.4, share, 30, None) for view in ("plain", "mean", "masked")]
    rows.append(Inversion("private", 3.0, images, 8.0, math.nan, 0.1, 0.4, share, 30, share))
    canary = {
        "epsilon": math.inf,
        "upper": math.inf,
        "lower": 1.2,
        "delta": 0.01,
        "guesses": {"canaries": 10, "made": 4, "right": 3},
    }
    accuracy = {"members": 0.9, "others": 0.8}
    return AttackFindings([Membership(math.inf, None, {"loss": verdict, "lira": verdict}, accuracy)], [canary], images, rows)


def test_site_and_canaries_share_no_patient(bench: Bench) -> None:
    assert not set(bench.site.patients) & set(bench.spare.patients)
    assert (len(set(bench.site.patients)), len(set(bench.spare.patients))) == (20, 10)
    assert bench.phantom


def test_too_few_patients_are_refused(tmp_path: Path, bench: Bench) -> None:
    cfg = AttackConfig(**{**SMALL, "data": str(_data_folder(bench, tmp_path)), "patients": 200})
    with pytest.raises(ConfigError, match="take fewer"):
        build_bench(cfg, bench.experiment, bench.epsilons, tmp_path / "out")


def _data_folder(bench: Bench, tmp_path: Path) -> Path:
    from pneumofed.simulation.phantoms.phantom import write_phantoms

    write_phantoms(tmp_path / "phantoms", 30, 0, 64)
    return tmp_path / "phantoms"


def test_victims_repeat_bit_for_bit_and_differ_by_name_and_by_privacy(bench: Bench) -> None:
    private = bench.at(3.0)
    first, again = (margins_of(Victim("a", private, bench.site, bench.spare, bench.cache_dir)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, margins_of(Victim("b", private, bench.site, bench.spare, bench.cache_dir)))
    assert not np.array_equal(first, margins_of(Victim("a", bench.at(math.inf), bench.site, bench.spare, bench.cache_dir)))


def test_the_bench_writes_numbers_and_page(bench: Bench, tmp_path: Path) -> None:
    said: list[str] = []
    page = run_attacks(bench, ("membership", "canaries", "inversion"), tmp_path, said.append)
    values = json.loads((tmp_path / "attack.json").read_text())
    assert [row["epsilon"] for row in values["membership"]] == ["inf", 3.0]
    assert [row["upper"] == "inf" for row in values["canaries"]] == [True, True, False, False]
    assert values["canaries"][2]["upper"] <= 3.0 < values["canaries"][3]["upper"]
    assert [row["view"] for row in values["inversion"]] == ["plain", "private", "mean", "masked"]
    assert page.read_text().count("<img") == 1 + 2 * 5
    assert said


def test_one_hospital_among_others_trains_the_mean_of_all_by_images(bench: Bench) -> None:
    compute = build_compute("cpu", "fp32", 1)
    one_step = {"privacy": {"mechanism": "none"}, "rounds": 1}
    experiment = attacked_experiment(None, merge(SHORT, one_step))
    parts = bench.site, bench.spare

    def weights(train: Dataset, others: tuple[Dataset, ...], name: str) -> np.ndarray:
        model = train_victim(Victim(name, experiment, train, bench.spare, bench.cache_dir, others), compute)
        return ArraysLayout.of(model).flatten(model)[0]

    together = weights(parts[0], (parts[1],), "a")
    alone = [weights(parts[0], (), "a"), weights(parts[1], (), "a/1")]
    assert np.allclose(together, np.average(alone, axis=0, weights=[len(part) for part in parts]), atol=1e-6)


def test_the_released_model_is_that_of_the_experiment_s_strategy(bench: Bench) -> None:
    compute, parts = build_compute("cpu", "fp32", 1), (bench.site, bench.spare)

    def weights(strategy: str) -> np.ndarray:
        values = {"privacy": {"mechanism": "none"}, "rounds": 1, "strategy": {"name": strategy}}
        victim = Victim("a", attacked_experiment(None, merge(SHORT, values)), parts[0], bench.spare, bench.cache_dir, parts[1:])
        return ArraysLayout.of(model := train_victim(victim, compute)).flatten(model)[0]

    assert not np.allclose(weights("fedavg"), weights("fedmedian"), atol=1e-6)


def test_fedbn_releases_no_single_model_to_attack(tmp_path: Path) -> None:
    experiment = attacked_experiment(None, {"strategy": {"name": "fedbn"}, "model": {"norm": "batch"}})
    with pytest.raises(ConfigError, match="hospitals=1"):
        build_bench(AttackConfig(**{**SMALL, "hospitals": 2}), experiment, (math.inf,), tmp_path)


@pytest.mark.parametrize("name", CORRECTED)
def test_strategies_whose_hospitals_keep_corrections_are_not_attacked(tmp_path: Path, name: str) -> None:
    values = {"strategy": {"name": name}, "training": {"optimizer": "sgd"}, "privacy": {"mechanism": "none"}}
    with pytest.raises(ConfigError, match="take fedavg"):
        build_bench(AttackConfig(**{**SMALL, "hospitals": 2}), attacked_experiment(None, values), (math.inf,), tmp_path)


def test_a_federation_gives_each_hospital_patients_of_its_own(tmp_path: Path) -> None:
    cfg = AttackConfig(**{**SMALL, "hospitals": 3})
    bench = build_bench(cfg, attacked_experiment(None, SHORT), (3.0,), tmp_path)
    sets = [set(data.patients) for data in (bench.site, bench.spare, *bench.others)]
    assert [len(names) for names in sets] == [cfg.patients, cfg.canaries, cfg.patients, cfg.patients]
    assert sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.slow
def test_processes_answer_as_one_does_and_in_order(bench: Bench) -> None:
    jobs = [
        Victim(name, bench.at(epsilon), bench.site, bench.spare, bench.cache_dir)
        for name, epsilon in (("a", 3.0), ("b", math.inf))
    ]
    for alone, together in zip(run_all(margins_of, jobs, 1), run_all(margins_of, jobs, 2), strict=True):
        assert np.array_equal(alone, together)


def test_epsilon_sets_the_mechanism() -> None:
    experiment = attacked_experiment(None, {"privacy": {"noise_multiplier": 9.0}})
    assert at_epsilon(experiment, math.inf).privacy.mechanism == "none"
    private = at_epsilon(experiment, 3.0).privacy
    assert (private.mechanism, private.target_epsilon, private.noise_multiplier) == ("dp_sgd", 3.0, None)


def test_lists_of_the_command_line() -> None:
    assert read_epsilons("1, inf 6,6") == (math.inf, 6.0, 1.0)
    assert read_attacks("inversion,membership") == ("membership", "inversion")
    for text in ("", "0", "-1", "three", "nan"):
        with pytest.raises(ConfigError, match="epsilons"):
            read_epsilons(text)
    with pytest.raises(ConfigError, match="attack"):
        read_attacks("membership,guessing")


def test_the_page_says_whose_images_it_shows_and_needs_no_other_file(bench: Bench) -> None:
    page = render_page(bench, _findings())
    assert "All images here were drawn by a program." in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "no privacy" in page and "ε = 3" in page


def test_the_page_leaves_out_attacks_that_were_not_asked_for(bench: Bench) -> None:
    page = render_page(bench, AttackFindings())
    assert "<img" not in page
    assert "What this does not prove" in page


def test_numbers_hold_no_image_and_no_nan(bench: Bench, tmp_path: Path) -> None:
    write_findings(bench, _findings(), tmp_path)
    text = (tmp_path / "attack.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert "reconstructions" not in text
    assert as_json(bench, _findings())["inversion"][3]["ssim"] is None


def test_a_hospitals_dossier_reads_what_the_bench_found(bench: Bench, tmp_path: Path) -> None:
    findings = _findings()
    write_findings(bench, findings, tmp_path)
    asked = describe_terms(bench.experiment)
    read = read_attack_bench(tmp_path, asked)
    (row,) = findings.membership
    assert (read.phantom, read.patients, read.hospitals, read.models) == (True, 20, 1, 4)
    assert [(one["attack"], one["epsilon"], one["value"]) for one in read.membership] == [
        (name, "inf", verdict.auroc["value"]) for name, verdict in row.attacks.items()
    ]
    assert [(one["lower"], one["upper"]) for one in read.canaries] == [(1.2, "inf")]
    assert [one["view"] for one in read.inversion] == [one.view for one in findings.inversions]
    assert (read.differences, read.compared) == ((), True)
    other = read_attack_bench(tmp_path / "attack.json", {**asked, "network": "resnet18"}).differences
    assert other == (f"network: {bench.experiment.model.name} in the attack, resnet18 in the run",)
    assert not read_attack_bench(tmp_path, None).compared


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(attack)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--epsilons", "none"])
    assert isinstance(result.exception, ConfigError)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--size", "modles=3"])
    assert isinstance(result.exception, ConfigError)
