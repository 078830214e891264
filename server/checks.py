"""Every reply is checked before any arithmetic: form, sizes, finite values, counts, and a plausible length of its update."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Message

from common.errors import MessageError
from common.layout import ArraysLayout, Kind
from common.messages import Failure, ModelArrays, Presence, Update, unpack_update


def check_updates(
    answers: Mapping[str, Message],
    current: ModelArrays,
    layout: ArraysLayout,
    presences: Mapping[str, Presence],
    norm_factor: float,
) -> tuple[dict[str, Update], dict[str, Failure]]:
    """The good updates and the reason for each one left out, both by site."""
    good: dict[str, Update] = {}
    left_out: dict[str, Failure] = {}
    for site, message in answers.items():
        try:
            update = unpack_update(message.content)
            _check_form(site, update, layout, presences[site])
            good[site] = update
        except MessageError as error:
            left_out[site] = Failure(site, "MessageError", str(error))
    for site, reason in implausible(good, current, norm_factor).items():
        del good[site]
        left_out[site] = Failure(site, "MessageError", reason)
    return good, left_out


def implausible(updates: Mapping[str, Update], current: ModelArrays, factor: float) -> dict[str, str]:
    """Sites whose update is too long, with the sentence that says so.

    The length is taken per square root of the number of images: a site with a hundred times the images takes a hundred times the
    steps, and its update grows with them. It is compared with the lower median of the round, which an attacker moves only where
    at least half of the sites are with him. Updates of length zero are plausible.
    """
    lengths = {
        site: float(np.linalg.norm(update.arrays.parameters - current.parameters)) / max(update.num_examples, 1) ** 0.5
        for site, update in updates.items()
    }
    if len(lengths) < 2:
        return {}
    median = sorted(lengths.values())[(len(lengths) - 1) // 2]
    limit = factor * median
    return {
        site: f"its update is {length / median:.3g} times as long as the round's median, the limit is {factor:g}"
        for site, length in lengths.items()
        if median > 0 and length > limit
    }


def _check_form(site: str, update: Update, layout: ArraysLayout, presence: Presence) -> None:
    if update.presence.site != site:
        raise MessageError("the reply names another site")
    if update.presence.layout != layout.digest:
        raise MessageError("the reply's model has another layout")
    parameters, statistics = update.arrays.parameters, update.arrays.statistics
    if len(parameters) != layout.parameter_count or len(statistics) != layout.statistic_count:
        raise MessageError(
            f"expected {layout.parameter_count} parameters and {layout.statistic_count} statistics, "
            f"got {len(parameters)} and {len(statistics)}"
        )
    kinds: tuple[tuple[Kind, np.ndarray], ...] = (("parameter", parameters), ("statistic", statistics))
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
