"""FedNova, SCAFFOLD and FedDyn: whole runs against the papers' pseudo code, and what each promises on problems with a known optimum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.site_data import SiteData, class_number, load_site, read_site_config
from pneumofed.client.federation.training import RoundPlan, draw_batches
from pneumofed.common.config.choices import CORRECTED, StrategyName
from pneumofed.common.config.experiment import ExperimentConfig, StrategyConfig
from pneumofed.common.errors import RoundError
from pneumofed.common.imaging.augment import normalize, to_model_input
from pneumofed.common.models.build import build_model, train_mode
from pneumofed.common.models.recipe import build_loss, schedule_factor
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.common.wire.messages import ModelArrays, pack_arrays, unpack_arrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.drift import FedDyn, FedNova, Scaffold, SummedCorrections
from pneumofed.server.federation.round_choices import draw_sites
from pneumofed.server.federation.strategies import aggregate, build_strategy
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.server.federation.updates import small_update, take_identity
from tests.tiny import TinyFederation, draw_manifest, tiny_experiment

SGD = {"optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 1e-3, "momentum": 0.0, "local_epochs": 2}
OFF = {"rotation_deg": 0.0, "shift_fraction": 0.0, "scale_fraction": 0.0, "brightness": 0.0, "contrast": 0.0, "noise_std": 0.0}


def experiment_of(name: StrategyName, **training: Any) -> ExperimentConfig:
    return tiny_experiment(
        rounds=4,
        augmentation=OFF,
        model={"name": "scattering", "norm": "group"},
        strategy={"name": name, "fraction_train": 0.5, "max_update_norm_factor": 1e3},
        training={**SGD, **training},
    )


@dataclass
class Reference:
    """The papers' pseudo code, in double precision where it keeps something, one line a line; sites' sizes are the weights."""

    experiment: ExperimentConfig
    sites: dict[str, SiteData]
    model: nn.Module
    x: np.ndarray
    lost: set[tuple[int, str]]
    """Rounds and sites whose answers were not counted."""
    own: dict[str, np.ndarray] = field(default_factory=dict)
    """c_i, or the gradients g_i."""

    def run(self) -> np.ndarray:
        images = {site: len(data.train.labels) for site, data in self.sites.items()}
        everyone = sum(images.values())
        cfg, self.x = self.experiment, self.x.astype(np.float64)
        self.own = {site: np.zeros_like(self.x) for site in images}
        for number in range(1, cfg.rounds + 1):
            drawn = draw_sites(list(images), cfg.strategy.fraction_train, cfg.seed, number)
            drawn = [site for site in drawn if (number, site) not in self.lost]
            p = {site: images[site] / sum(images[other] for other in drawn) for site in drawn}
            c = np.sum([images[site] / everyone * self.own[site] for site in images], axis=0)
            y, rates = {}, {}
            for site in drawn:
                added = {"scaffold": c - self.own[site], "feddyn": -self.own[site]}.get(cfg.strategy.name, np.zeros_like(self.x))
                y[site], rates[site] = self.local(site, number, added)
            if cfg.strategy.name == "fednova":  # x - tau_eff sum p_i d_i, with d_i the mean gradient along the way
                effective = sum(p[site] * rates[site] for site in drawn)
                self.x = self.x - effective * np.sum([p[site] * (self.x - y[site]) / rates[site] for site in drawn], axis=0)
            elif cfg.strategy.name in ("scaffold", "fedavg"):
                for site in drawn if cfg.strategy.name == "scaffold" else ():
                    self.own[site] = self.own[site] - c + (self.x - y[site]) / rates[site]
                self.x = self.x + np.sum([p[site] * (y[site] - self.x) for site in drawn], axis=0)
            else:
                alpha = cfg.proximal_mu
                for site in drawn:
                    self.own[site] = self.own[site] - alpha * (y[site] - self.x)
                h = np.sum([images[site] / everyone * self.own[site] for site in images], axis=0)
                self.x = np.sum([p[site] * y[site] for site in drawn], axis=0) - h / alpha
        return self.x

    def local(self, site: str, number: int, added: np.ndarray) -> tuple[np.ndarray, float]:
        """y_i after the steps y -= rate (g + added + mu (y - x)), and FedNova's rate times ||a||_1, from the vector a itself."""
        cfg, data = self.experiment, self.sites[site]
        vector = torch.tensor(self.x, dtype=torch.float32)
        torch.nn.utils.vector_to_parameters(vector, self.model.parameters())
        train_mode(self.model, fix_statistics=False)
        loss = build_loss(cfg.loss, data.class_counts(class_number(cfg)))
        order, rates = numpy_generator(*RoundPlan(cfg, number, site).seed_parts(), "batches"), []
        correction, epochs = torch.tensor(added, dtype=torch.float32), cfg.training.local_epochs
        for epoch in range(epochs):
            batches = draw_batches(len(data.train.labels), cfg.training.batch_size, order)
            for position, index in enumerate(batches):
                rows = np.sort(index)
                pixels = to_model_input(torch.from_numpy(data.train.pixels[rows]))
                value = loss(self.model(normalize(pixels, 1)), torch.from_numpy(data.train.labels[rows]))
                gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(self.model.parameters()))])
                y = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()
                rate = cfg.training.learning_rate * schedule_factor(
                    cfg.training, ((number - 1) * epochs + epoch + position / len(batches)) / (cfg.rounds * epochs)
                )
                step = gradient + cfg.training.weight_decay * y + correction + cfg.proximal_mu * (y - vector)
                torch.nn.utils.vector_to_parameters(y - rate * step, self.model.parameters())
                rates.append(rate)
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().double().numpy(), sum(
            rate * math.prod(1 - later * cfg.proximal_mu for later in rates[k + 1 :]) for k, rate in enumerate(rates)
        )


class LosingApp(ClientApp):
    """The real ClientApp, whose answer of one site in one round is spoilt: the site trained, and is not counted."""

    def __init__(self, round_number: int, node: int) -> None:
        super().__init__()
        self.lost = round_number, node

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        asked = message.content.config_records["config"]["round"], context.node_config["partition-id"]
        if message.metadata.message_type == "train" and asked == self.lost:
            arrays = unpack_arrays(reply.content.array_records["arrays"])
            reply.content["arrays"] = pack_arrays(ModelArrays(arrays.parameters * np.float32(np.nan), arrays.statistics))
        return reply


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(("name", "mu"), [("fednova", 0.3), ("scaffold", 0.0), ("feddyn", 0.5)])
def test_a_run_is_the_papers_pseudo_code_with_other_sites_in_each_round(
    tmp_path: Path, name: StrategyName, mu: float, lost: bool
) -> None:
    federation = TinyFederation(tmp_path, sites=0)
    for number, patients in enumerate((4, 8, 14, 6)):
        federation.add_site(number, draw_manifest(tmp_path / f"images-{number}", patients, seed=number))
    experiment = experiment_of(name, proximal_mu=mu)
    drawn = [draw_sites([f"site-{i}" for i in range(4)], 0.5, experiment.seed, number) for number in range(1, 5)]
    again = next(site for site in drawn[1] if any(site in later for later in drawn[2:]))  # lost in round 2, counted later
    number = int(again.removeprefix("site-"))
    federation.run("run", experiment, grid=federation.grid(LosingApp(2, number)) if lost else None)
    sites = {f"site-{i}": load_site(read_site_config(federation.sites / f"{i}.yaml"), experiment) for i in range(4)}
    model = build_model(experiment.model, experiment.task, derive_seed(experiment.seed, "initial weights"))
    start = ArraysLayout.of(model).flatten(model)[0]
    reference = Reference(experiment, sites, model, start, {(2, again)} if lost else set())
    expected = reference.run()
    moved = np.linalg.norm(expected - start)
    found = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").arrays.parameters
    assert np.linalg.norm(found - expected) < 1e-5 * moved
    others = Reference(experiment_of("fedavg", proximal_mu=mu), sites, model, start, reference.lost).run()
    assert np.linalg.norm(others - found) > 0.01 * moved


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", CORRECTED)
def test_the_coordinators_sum_is_that_of_what_the_sites_keep(tmp_path: Path, name: StrategyName, precision: str) -> None:
    federation = TinyFederation(tmp_path)
    experiment = experiment_of(name)
    coded = experiment.strategy.model_copy(update={"update_precision": precision})
    federation.run("run", experiment.model_copy(update={"strategy": coded}), grid=federation.grid(LosingApp(3, 1)))
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").strategy_state
    total = np.zeros_like(state["corrections"], dtype=np.float64)
    for site in ("site-0", "site-1", "site-2"):
        number = int(state[f"counted:{site}"][0])
        (file,) = federation.sites.glob(f"{site}/corrections/*/round-{number:05d}.npy")
        total += int(state[f"images:{site}"][0]) * np.load(file)
    assert np.linalg.norm(total - state["corrections"]) < 1e-5 * np.linalg.norm(state["corrections"])


def test_scaffold_sends_its_variate_down_and_nothing_more_up(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    for name in ("fedavg", "scaffold"):
        federation.run(name, experiment_of(name))
    plain, lines = (RunFolder(tmp_path / name).read_history() for name in ("fedavg", "scaffold"))
    header = 128  # of an array on the wire
    size = header + read_checkpoint(tmp_path / "scaffold" / "checkpoints" / "last.pt").arrays.parameters.nbytes
    assert [line.bytes.up for line in lines] == [line.bytes.up for line in plain]
    more = [line.bytes.down - other.bytes.down for line, other in zip(lines, plain, strict=True)]
    assert more == [0, *[size * len(line.drawn) for line in lines[1:]]]


# --- quadratics: site i has the loss h_i / 2 (w - a_i)^2 ----------------------------------------------------------------------------

CURVATURES, CENTRES = np.array([[4.0, 1.0], [1.0, 3.0], [0.5, 0.5]]), np.array([[1.0, -1.0], [-2.0, 4.0], [6.0, 0.0]])
IMAGES, STEPS, RATE = (10, 20, 30), (5, 20, 40), 0.05
OPTIMUM = np.einsum("i,ij,ij->j", IMAGES, CURVATURES, CENTRES) / np.einsum("i,ij->j", IMAGES, CURVATURES)
"""Where the gradient of the mean loss, weighted by images, is zero."""


def weight_of(_: int, images: int) -> float:
    return STEPS[IMAGES.index(images)] * RATE


def descend(site: int, start: np.ndarray, added: np.ndarray, pull: float = 0.0, steps: int | None = None) -> np.ndarray:
    """Steps of w - RATE * (CURVATURES * (w - CENTRES) + added + pull * (w - start)), as many as asked, in closed form."""
    curvature = CURVATURES[site] + pull
    rest = (CURVATURES[site] * CENTRES[site] - added + pull * start) / curvature
    return rest + (1.0 - RATE * curvature) ** (STEPS[site] if steps is None else steps) * (start.astype(np.float64) - rest)


def play(
    strategy: Any, rounds: int, local: Callable[[int, np.ndarray], np.ndarray], sites: Any = lambda _: range(3)
) -> np.ndarray:
    """The weights after `rounds` rounds in which the sites answer with `local(site, weights)`."""
    take_identity()
    now = ModelArrays(np.zeros(2, np.float32), np.ones(1, np.float32))
    if isinstance(strategy, SummedCorrections):
        strategy.meet({f"site-{i}": IMAGES[i] for i in range(3)})
    for number in range(1, rounds + 1):
        strategy.configure_train(number, pack_arrays(now), ConfigRecord(), None)
        answers = [small_update(f"site-{i}", local(i, now.parameters).tolist(), num_examples=IMAGES[i]) for i in sites(number)]
        now = aggregate(strategy, number, answers)
    return now.parameters


def test_scaffold_reaches_the_optimum_that_fedavg_misses_after_many_local_steps() -> None:
    plain = play(build_strategy(StrategyConfig()), 300, lambda site, w: descend(site, w, np.zeros(2)))
    assert np.abs(plain - OPTIMUM).max() > 0.3
    strategy, own = Scaffold(weight_of, 1.0), {site: np.zeros(2) for site in range(3)}

    def local(site: int, start: np.ndarray) -> np.ndarray:
        c = np.zeros(2) if strategy.variate is None else strategy.variate
        end = descend(site, start, c - own[site])
        own[site] = own[site] - c + (start - end) / (STEPS[site] * RATE)
        return end

    np.testing.assert_allclose(play(strategy, 300, local), OPTIMUM, atol=1e-3)
    assert strategy.total is not None
    np.testing.assert_allclose(strategy.total, sum(IMAGES[i] * own[i] for i in own), atol=1e-3)


@pytest.mark.parametrize("partial", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_feddyn_rests_only_where_the_mean_gradient_is_zero(partial: bool) -> None:
    alpha = 0.5
    own = {site: np.zeros(2) for site in range(3)}

    def local(site: int, start: np.ndarray) -> np.ndarray:
        end = descend(site, start, -own[site], alpha, steps=400)  # the paper's argmin
        own[site] = own[site] - alpha * (end - start)
        np.testing.assert_allclose(
            own[site], CURVATURES[site] * (end - CENTRES[site]), atol=1e-4
        )  # its section 2: g_i = grad L_i(w_i)
        return end

    drawn = (lambda number: [number % 3, (number + 1) % 3]) if partial else (lambda _: range(3))
    np.testing.assert_allclose(play(FedDyn(alpha), 400, local, drawn), OPTIMUM, atol=2e-3)


def test_fednova_weighs_sites_by_images_where_fedavg_weighs_their_steps_too() -> None:
    """With tiny steps both follow a gradient: FedNova's is the mean loss's, FedAvg's that of losses weighted by steps times images."""
    mean = np.average(-CURVATURES * CENTRES, axis=0, weights=IMAGES)
    tilted = np.average(-CURVATURES * CENTRES, axis=0, weights=np.multiply(IMAGES, STEPS))

    def local(site: int, start: np.ndarray) -> np.ndarray:
        return np.asarray(start - 1e-4 * STEPS[site] * CURVATURES[site] * (start - CENTRES[site]))

    for strategy, direction in ((FedNova(weight_of), mean), (build_strategy(StrategyConfig()), tilted)):
        moved = play(strategy, 1, local)
        np.testing.assert_allclose(moved / np.linalg.norm(moved), -direction / np.linalg.norm(direction), atol=1e-4)


def test_fednova_with_equal_steps_is_fedavg() -> None:
    def local(site: int, start: np.ndarray) -> np.ndarray:
        return descend(site, start, np.zeros(2), steps=7)

    equal = play(FedNova(lambda *_: 7 * RATE), 20, local)
    np.testing.assert_allclose(equal, play(build_strategy(StrategyConfig()), 20, local), rtol=1e-5)


def test_a_site_that_comes_later_enters_the_mean_without_moving_what_others_hold() -> None:
    strategy = FedDyn(0.5)
    strategy.meet({"a": 10})
    strategy.total = np.array([10.0], np.float32)
    strategy.meet({"a": 99, "b": 30})
    assert strategy.mean() == np.array([0.25], np.float32)


@pytest.mark.parametrize("name", CORRECTED)
def test_an_update_that_no_float_can_hold_fails_the_round_and_leaves_the_memory(name: StrategyName) -> None:
    take_identity()
    strategy = build_strategy(StrategyConfig(name=name), weight=lambda *_: 1e-6, alpha=10.0)
    assert isinstance(strategy, SummedCorrections)
    strategy.configure_train(1, pack_arrays(ModelArrays(np.zeros(1, np.float32), np.ones(1, np.float32))), ConfigRecord(), None)  # type: ignore[arg-type]
    with pytest.raises(RoundError, match="would not be finite"), np.errstate(over="ignore"):
        aggregate(strategy, 1, [small_update("site", [3e38])])
    assert strategy.total is None
    assert not strategy.counted
