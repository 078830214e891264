"""The strategies: Flower's own arithmetic, our drawing of sites. FedNova, SCAFFOLD and FedDyn are in
`server.federation.drift`, the median, the trimmed mean and Krum in `server.federation.robust`.

`SiteSampling` takes FedAvg's place at the end of each strategy's chain of `super()` calls, so that FedAdam, FedYogi and the rest
configure and aggregate as Flower wrote them. `ParametersOnly` keeps the server's optimizers away from normalisation statistics:
a running variance is a measurement to be averaged, and Adam would step it below zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from pneumofed.common.config.experiment import StrategyConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.wire.fields import PARAMETERS, pack_values, shared_record
from pneumofed.common.wire.messages import ARRAYS, BUFFERS, METRICS, NUM_EXAMPLES, SITE, ModelArrays, Update
from pneumofed.server.federation.drift import (
    FedDyn,
    FedNova,
    Scaffold,
    SummedCorrections,
    WeightOfRound,
    corrections_state,
    restore_corrections,
)
from pneumofed.server.federation.robust import FedMedian, FedTrimmedAvg, MultiKrum
from pneumofed.server.federation.round_choices import SiteSampling, StartingWeights

logger = logging.getLogger(__name__)

RateOfRound = Callable[[int], float]
"""The sites' mean learning rate in a round, counted from 1."""


class ParametersOnly(flower.FedAvg):
    """Put before a server optimizer: it sees only the parameters; the statistics are averaged by number of images."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Builds the messages as the next strategy does, and remembers the parameters that the round starts from.

        Args:
            server_round: from 1.
            arrays: the global weights, parameters and statistics.
            config: what goes with them.
            grid: Flower's way to the nodes.
        """
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.current_arrays: Any = self._own(arrays)
        return messages

    def _own(self, arrays: ArrayRecord) -> Any:
        return {PARAMETERS: arrays[PARAMETERS].numpy()}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregates the parameters with the server optimizer and averages the statistics by number of images.

        Args:
            server_round: from 1.
            replies: checked ones; their statistics are taken out before the optimizer sees them.

        Returns:
            Arrays and metrics of the round; (None, ...) without replies.
        """
        kept = list(replies)
        statistics = [cast(ArrayRecord, reply.content[ARRAYS]).pop(BUFFERS) for reply in kept]
        weights = [cast(int, cast(MetricRecord, reply.content[METRICS])[NUM_EXAMPLES]) for reply in kept]
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is not None:
            total = np.zeros(statistics[0].shape, np.float64)
            for values, weight in zip(statistics, weights, strict=True):  # one at a time; `np.average` would stack them
                total += values.numpy() * np.float64(weight)
            arrays[BUFFERS] = pack_values(total / sum(weights))
        return arrays, metrics


class FedAvg(SiteSampling):
    """McMahan et al. 2017. FedProx and FedBN differ from it only at the site."""


class FedAvgM(ParametersOnly, flower.FedAvgM, SiteSampling):
    """Hsu, Qi and Brown 2019, with the momentum correction of Goyal et al. 2017, section 3.

    An update is a sum of steps, each as long as the sites' learning rate. So what is remembered of former updates is brought to the
    rate of this round; else a run whose rate falls would end by coasting on updates of its middle, which no site corrects any more.
    """

    def __init__(self, rate: RateOfRound, **settings: Any) -> None:
        super().__init__(**settings)
        self._rate = rate

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Brings the momentum to the learning rate of this round, then aggregates.

        Args:
            server_round: from 1.
            replies: checked ones.

        Returns:
            Arrays and metrics of the round.
        """
        if self.momentum_vector is not None:
            factor = np.float32(self._rate(server_round) / self._rate(server_round - 1))
            self.momentum_vector = [factor * vector for vector in self.momentum_vector]
        return super().aggregate_train(server_round, replies)

    def _own(self, arrays: ArrayRecord) -> Any:
        return shared_record({PARAMETERS: arrays[PARAMETERS]})


class FedExP(StartingWeights):
    """Jhunjhunwala, Wang and Joshi 2023, with numbers of images as weights, as in the authors' code.

    Where the sites' updates point in different directions, their mean is much shorter than each of them, and FedAvg creeps. The mean is
    taken max(1, mean of |update|^2 / (2 (|mean update|^2 + sites tau rate^2))) times therefore; `rate` is the sites' learning rate in
    the round, as a share of its peak, since tau must shrink as updates do. Its iterates swing; evaluate and keep their moving average
    (`strategy.ema_decay`), which takes the place of the authors' mean of the last two. Normalisation statistics are averaged.
    """

    def __init__(self, tau: float, rate: RateOfRound) -> None:
        super().__init__()
        self._tau, self._rate = tau, rate

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages the updates and extrapolates along their mean (see the class).

        Args:
            server_round: from 1.
            replies: checked ones.

        Returns:
            Arrays and metrics of the round.
        """
        kept, start = list(replies), self.current.parameters
        squares = [squared_length(cast(ArrayRecord, reply.content[ARRAYS])[PARAMETERS].numpy() - start) for reply in kept]
        weights = [cast(int, cast(MetricRecord, reply.content[METRICS])[NUM_EXAMPLES]) for reply in kept]
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is not None:
            mean = arrays[PARAMETERS].numpy() - start
            small = len(kept) * self._tau * self._rate(server_round) ** 2
            factor = float(np.average(squares, weights=weights)) / (2.0 * (squared_length(mean) + small))
            logger.info("round %d: the mean update is taken %.2f times", server_round, max(1.0, factor))
            if factor > 1.0:
                arrays[PARAMETERS] = pack_values(start + np.float32(factor) * mean)
        return arrays, metrics


class FedAdam(ParametersOnly, flower.FedAdam, SiteSampling):
    """Reddi et al. 2021, algorithm 2."""


class FedYogi(ParametersOnly, flower.FedYogi, SiteSampling):
    """Reddi et al. 2021, algorithm 2."""


SiteStrategy = FedAvg | FedAvgM | FedExP | FedAdam | FedYogi | FedMedian | FedTrimmedAvg | MultiKrum | FedNova | Scaffold | FedDyn


def build_strategy(
    cfg: StrategyConfig,
    rate: RateOfRound = lambda _: 1.0,
    weight: WeightOfRound = lambda _, images: float(images),
    alpha: float = 0.01,
) -> SiteStrategy:
    """Builds the strategy that `cfg` names, with its settings.

    Args:
        cfg: its name and settings; those of other strategies are ignored.
        rate: the sites' learning rate in a round as a share of its peak: `server.federation.round_choices.LearningRate` for the
            run. FedAvgM and FedExP use it.
        weight: what a site's local steps of a round add up to: `LearningRate.weight` for the run. FedNova and SCAFFOLD use it.
        alpha: of FedDyn: `ExperimentConfig.proximal_mu`.

    Raises:
        ConfigError: no strategy has this name.
    """
    strategy = _build_named(cfg, rate, weight, alpha)
    strategy.weight_by = cfg.weight_by
    return strategy


def _build_named(cfg: StrategyConfig, rate: RateOfRound, weight: WeightOfRound, alpha: float) -> SiteStrategy:
    adaptive: dict[str, Any] = {
        "eta": cfg.server_learning_rate or 0.01,
        "beta_1": cfg.beta_1,
        "beta_2": cfg.beta_2,
        "tau": cfg.tau,
    }
    match cfg.name:
        case "fedavg" | "fedprox" | "fedbn":
            return FedAvg()
        case "fedavgm":
            return FedAvgM(rate, server_learning_rate=cfg.server_learning_rate or 1.0, server_momentum=cfg.server_momentum)
        case "fedexp":
            return FedExP(cfg.tau, rate)
        case "fedadam":
            return FedAdam(**adaptive)
        case "fedyogi":
            return FedYogi(**adaptive)
        case "fedmedian":
            return FedMedian()
        case "fedtrimmedavg":
            return FedTrimmedAvg(beta=cfg.trim_fraction)
        case "krum" | "multikrum":
            return MultiKrum(cfg.malicious_sites, one=cfg.name == "krum")
        case "fednova":
            return FedNova(weight)
        case "scaffold":
            return Scaffold(weight, cfg.server_learning_rate or 1.0)
        case "feddyn":
            return FedDyn(alpha)
    raise ConfigError(f"strategy.name: no strategy is called '{cfg.name}'")


def aggregate(strategy: SiteStrategy, round_number: int, updates: Sequence[Update]) -> ModelArrays:
    """Computes the new global arrays from checked updates, float32.

    Independent of the order of `updates`: they are added in the order of their sites' names, and where they lie on the disk
    (`server.federation.update_spool`) one at a time is in memory.

    Args:
        strategy: as configured for this round.
        round_number: from 1.
        updates: in any order; at least one.

    Raises:
        ConfigError: the strategy gave no arrays.
    """
    replies = [
        _reply(update, strategy.weight_of(update.num_examples))
        for update in sorted(updates, key=lambda update: update.presence.site)
    ]
    arrays, _ = strategy.aggregate_train(round_number, replies)
    if arrays is None:
        raise ConfigError("the strategy gave no arrays for a round with replies")
    return ModelArrays(*(arrays[name].numpy().astype(np.float32) for name in (PARAMETERS, BUFFERS)))


def squared_length(vector: np.ndarray) -> float:
    """Computes the squared Euclidean length of a vector in float64, the same on any number of threads; of a norm of BLAS the last bits
    depend on them."""
    return float(np.sum(np.square(vector), dtype=np.float64))


def strategy_state(strategy: SiteStrategy) -> dict[str, np.ndarray]:
    """Collects what the strategy must remember from round to round: momentum, Adam's and Yogi's moments, or the sum of the sites'
    corrections. Empty for the others."""
    state: dict[str, np.ndarray] = {}
    if isinstance(strategy, SummedCorrections):
        state.update(corrections_state(strategy))
    if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
        state["momentum"] = strategy.momentum_vector[0]
    if isinstance(strategy, FedAdam | FedYogi) and strategy.m_t and strategy.v_t:
        state.update(first_moment=strategy.m_t[PARAMETERS], second_moment=strategy.v_t[PARAMETERS])
    return state


def restore_state(strategy: SiteStrategy, state: dict[str, np.ndarray]) -> None:
    """Sets what `strategy_state` returned, so that a resumed run goes on as an unbroken one.

    Args:
        strategy: newly built, of the same experiment.
        state: by name; empty for strategies that remember nothing.
    """
    if isinstance(strategy, SummedCorrections):
        restore_corrections(strategy, state)
    if isinstance(strategy, FedAvgM) and "momentum" in state:
        strategy.momentum_vector = [state["momentum"]]
    if isinstance(strategy, FedAdam | FedYogi) and "first_moment" in state:
        strategy.m_t, strategy.v_t = {PARAMETERS: state["first_moment"]}, {PARAMETERS: state["second_moment"]}


def _reply(update: Update, weight: int) -> Message:
    """The reply as Flower's aggregation expects it, one record of arrays and one of metrics with the weight, and which site it is of."""
    arrays = shared_record(update.record)  # the arrays themselves are shared: strategies replace them and do not write into them
    site = ConfigRecord({"name": update.presence.site, "images": update.num_examples})
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({NUM_EXAMPLES: weight}), SITE: site})
    return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)
