"""Strategies for hospitals that differ so much that their local steps drift apart: FedNova, SCAFFOLD, FedDyn.

Each is its paper's algorithm with the weights of `strategy.weight_by`, as FedAvg has them; where all sites weigh the same, it is the
paper's own. FedNova needs nothing of the sites. Under the other two each site adds a correction to its gradients
(`client.federation.correction`), which follows from its own updates and lies in its own folder. The coordinator keeps only the sum over
all sites, and with each request says in which round the site's update was last counted: that round's correction is the one to go on from,
however many later rounds failed, came too late, or are repeated. Nothing more than the update goes up; SCAFFOLD sends its server variate
down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from pneumofed.common.errors import RoundError
from pneumofed.common.models.recipe import variate_change
from pneumofed.common.wire.fields import PARAMETERS, pack_values
from pneumofed.common.wire.instructions import pack_variate
from pneumofed.common.wire.messages import ARRAYS, CONFIG, SITE, VARIATE, unpack_arrays
from pneumofed.server.federation.round_choices import StartingWeights
from pneumofed.server.federation.update_spool import DerivedArray

WeightOfRound = Callable[[int, int], float]
"""`common.models.recipe.gradient_weight` of a run: of the round, counted from 1, and a site's number of images."""


class FedNova(StartingWeights):
    """Wang et al. 2020, eq. 6 and section 4: each update is divided by what its own steps add up to, and their mean is multiplied by the
    weighted mean of these, so that a site counts by its weight and not by its steps once more.

    For SGD, with momentum and with a proximal term, by `weight`. With equal numbers of steps it is FedAvg. Statistics are averaged.
    """

    def __init__(self, weight: WeightOfRound) -> None:
        super().__init__()
        self._weight = weight

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Brings each update to the mean number of steps, then averages.

        Args:
            server_round: from 1.
            replies: checked ones; their parameters are replaced.

        Returns:
            Arrays and metrics of the round.
        """
        kept, start = list(replies), self.current.parameters
        steps = [self._weight(server_round, _images(reply)) for reply in kept]
        effective = np.average(steps, weights=[self.weight_of(_images(reply)) for reply in kept])
        for reply, own in zip(kept, steps, strict=True):
            record = cast(ArrayRecord, reply.content[ARRAYS])
            scaled = partial(_scale, record[PARAMETERS], start, np.float32(effective / own))
            record[PARAMETERS] = DerivedArray(scaled, record[PARAMETERS])
        return super().aggregate_train(server_round, kept)


class SummedCorrections(StartingWeights):
    """What the coordinator must know where each site corrects its gradients by something of its own.

    Attributes:
        images: of each site that was ever there its weight in the mean over all sites: the images that it announced first, or 1
            (`strategy.weight_by`). A site whose update was not counted yet has a correction of zero.
        counted: by site, the last round whose update was counted; absent where none was.
        total: float32 [P], the sum over sites of images times the site's correction; None before the first round.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self.total: np.ndarray | None = None

    def meet(self, announced: Mapping[str, int]) -> None:
        """Takes new sites into the mean.

        Args:
            announced: training images by site; of sites that are known already nothing changes.
        """
        for site, count in announced.items():
            self.images.setdefault(site, self.weight_of(count))

    def mean(self) -> np.ndarray | None:
        """The weighted mean of all sites' corrections, float32 [P]; None where it is zero."""
        return None if self.total is None else self.total / np.float32(sum(self.images.values()))

    def _count(self, server_round: int, replies: Iterable[Message], change: Callable[[np.ndarray, int], np.ndarray]) -> None:
        """Adds each site's `change(its weights, its images)` to the sum, and notes that its round was counted.

        Raises:
            RoundError: the sum would no longer be finite.
        """
        total = np.zeros_like(self.current.parameters) if self.total is None else self.total.copy()
        rounds: dict[str, int] = {}
        for reply in replies:
            site = str(cast(ConfigRecord, reply.content[SITE])["name"])
            self.meet({site: _images(reply)})
            own = cast(ArrayRecord, reply.content[ARRAYS])[PARAMETERS].numpy()
            total += np.float32(self.images[site]) * change(own, _images(reply))
            rounds[site] = server_round
        if not np.isfinite(total).all():
            raise RoundError(f"round {server_round}: an update is so long that the sites' corrections would not be finite")
        self.total = total
        self.counted |= rounds


class Scaffold(SummedCorrections):
    """Karimireddy et al. 2020, algorithm 1 with option II: sites step along g - c_i + c, where c_i is the mean gradient of the site's
    last counted round and c the mean of all c_i. The mean update is taken `server_learning_rate` times. Statistics are averaged.
    """

    def __init__(self, weight: WeightOfRound, server_learning_rate: float) -> None:
        super().__init__()
        self._weight, self._rate = weight, server_learning_rate

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Builds the messages with the server variate beside the weights, once there is one.

        Args:
            server_round: from 1.
            arrays: the global weights.
            config: what goes with them.
            grid: Flower's way to the nodes.
        """
        self.current, self.variate = unpack_arrays(arrays), self.mean()
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        if self.variate is not None:
            content[VARIATE] = pack_variate(self.variate)
        return self._construct_messages(content, self.drawn_nodes, MessageType.TRAIN)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages the updates, and moves the sum of the sites' variates by what each site's own moved.

        Args:
            server_round: from 1.
            replies: checked ones.

        Returns:
            Arrays and metrics of the round.
        """
        kept, start = list(replies), self.current.parameters

        def change(own: np.ndarray, images: int) -> np.ndarray:
            return variate_change(start, own, self.variate, self._weight(server_round, images))

        self._count(server_round, kept, change)
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is not None and self._rate != 1.0:
            arrays[PARAMETERS] = pack_values(start + np.float32(self._rate) * (arrays[PARAMETERS].numpy() - start))
        return arrays, metrics


class FedDyn(SummedCorrections):
    """Acar et al. 2021, algorithm 1: a site minimises its loss - <g_i, w> + alpha/2 |w - w_global|^2, where g_i, the gradient of its loss
    at its last counted weights, moves by -alpha (w_i - w_global); the coordinator takes mean(w_i) - mean(g_i) / alpha.

    The paper's h is the mean of all g_i. At a fixed point all w_i agree and the mean gradient is zero. Statistics are averaged.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self._alpha = np.float32(alpha)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages the weights, and takes the mean of all sites' gradients over alpha away.

        Args:
            server_round: from 1.
            replies: checked ones.

        Returns:
            Arrays and metrics of the round.
        """
        kept, start = list(replies), self.current.parameters
        self._count(server_round, kept, lambda own, _: -self._alpha * (own - start))
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is not None and (mean := self.mean()) is not None:
            arrays[PARAMETERS] = pack_values(arrays[PARAMETERS].numpy() - mean / self._alpha)
        return arrays, metrics


def corrections_state(strategy: SummedCorrections) -> dict[str, np.ndarray]:
    """Collects what the coordinator remembers of the sites' corrections, by name."""
    state = {} if strategy.total is None else {"corrections": strategy.total}
    for kind, numbers in (("images", strategy.images), ("counted", strategy.counted)):
        state |= {f"{kind}:{site}": np.array([number], np.int64) for site, number in sorted(numbers.items())}
    return state


def restore_corrections(strategy: SummedCorrections, state: Mapping[str, np.ndarray]) -> None:
    """Sets what `corrections_state` returned.

    Args:
        strategy: newly built, of the same experiment.
        state: by name.
    """
    strategy.total = state.get("corrections")
    for name, values in state.items():
        kind, _, site = name.partition(":")
        if site:
            {"images": strategy.images, "counted": strategy.counted}[kind][site] = int(values[0])


def _scale(array: Array, start: np.ndarray, factor: np.float32) -> np.ndarray:
    return np.asarray(start + factor * (array.numpy() - start))


def _images(reply: Message) -> int:
    return cast(int, cast(ConfigRecord, reply.content[SITE])["images"])
