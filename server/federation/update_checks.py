"""Every reply is checked before any arithmetic: form, sizes, finite values, counts, and a plausible length of its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from pneumofed.common.config.experiment import StrategyConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.wire.messages import Failure, ModelArrays, Presence, Update, unpack_update
from pneumofed.common.wire.parameter_layout import ArraysLayout, TensorKind


@dataclass
class UpdateChecks:
    """Checks the replies of one round as they arrive. Of each good one it keeps the packed weights, once, and the update's length.

    checks.take(site, message)      one reply
    checks.close()                  (good updates, the reason for each one left out), both by site
    """

    current: ModelArrays
    layout: ArraysLayout
    presences: Mapping[str, Presence]
    cfg: StrategyConfig
    compares: bool = True
    """Whether an update is left out for its length beside the others'. Under central privacy none is: no site may decide on another."""
    updates: dict[str, Update] = field(default_factory=dict)
    left_out: dict[str, Failure] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)

    def take(self, site: str, message: Message) -> bool:
        """Checks one reply and keeps its update; says whether it is good as far as one can say without the others.

        Args:
            site: who was asked.
            message: its reply. A bad one is noted in `left_out`; nothing is raised.
        """
        try:
            update = unpack_update(message.content, self.current, self.cfg.update_precision)
            arrays = update.arrays
            _check_form(site, update, arrays, self.layout, self.presences[site])
        except MessageError as error:
            self.left_out[site] = Failure(site, "MessageError", str(error))
            return False
        self.updates[site] = update
        self.lengths[site] = float(np.linalg.norm(arrays.parameters - self.current.parameters))
        return True

    def close(self) -> tuple[dict[str, Update], dict[str, Failure]]:
        """Compares the lengths of all updates and returns the good ones and the reason for each one left out, both by site."""
        lengths = {site: (length, self.updates[site].num_examples) for site, length in self.lengths.items()}
        for site, reason in implausible(lengths, self.cfg.max_update_norm_factor).items() if self.compares else ():
            self.left_out[site] = Failure(site, "MessageError", reason)
        good = {site: update for site, update in sorted(self.updates.items()) if site not in self.left_out}
        return good, dict(sorted(self.left_out.items()))


def implausible(updates: Mapping[str, tuple[float, int]], factor: float) -> dict[str, str]:
    """Finds the sites whose update is too long beside the others', each with the sentence that says so.

    The length is taken per square root of the number of images: a site with a hundred times the images takes a hundred times the
    steps, and its update grows with them. It is compared with the lower median of the round, which an attacker moves only where
    at least half of the sites are with him. Updates of length zero are plausible.

    Args:
        updates: by site, the length of its update and its number of images.
        factor: how many times the round's median a length may be.
    """
    lengths = {site: length / max(images, 1) ** 0.5 for site, (length, images) in updates.items()}
    if len(lengths) < 2:
        return {}
    median = sorted(lengths.values())[(len(lengths) - 1) // 2]
    limit = factor * median
    return {
        site: f"its update is {length / median:.3g} times as long as the round's median, the limit is {factor:g}"
        for site, length in lengths.items()
        if median > 0 and length > limit
    }


def _check_form(site: str, update: Update, arrays: ModelArrays, layout: ArraysLayout, presence: Presence) -> None:
    if update.presence.site != site:
        raise MessageError("the reply names another site")
    if update.presence.layout != layout.digest:
        raise MessageError("the reply's model has another layout")
    parameters, statistics = arrays.parameters, arrays.statistics
    if len(parameters) != layout.parameter_count or len(statistics) != layout.statistic_count:
        raise MessageError(
            f"expected {layout.parameter_count} parameters and {layout.statistic_count} statistics, "
            f"got {len(parameters)} and {len(statistics)}"
        )
    kinds: tuple[tuple[TensorKind, np.ndarray], ...] = (("parameter", parameters), ("statistic", statistics))
    for kind, values in kinds:
        finite = np.isfinite(values)
        if not finite.all():
            where = layout.name_at(kind, int(np.argmin(finite)))
            raise MessageError(f"{int((~finite).sum())} values are not finite, the first in {where}")
    if (statistics[layout.variances] < 0).any():
        raise MessageError("a running variance is negative")
    announced = int(presence.report.get("train", 0))
    if not 0 < update.num_examples <= announced:
        raise MessageError(f"trained on {update.num_examples} images but announced {announced}")
