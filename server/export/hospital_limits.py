"""Limits of the suitability check from the hospitals' own patients, where a run asked for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pneumofed.common.model_bundle.suitability import Suitability
from pneumofed.server.export.source import Source


@dataclass(frozen=True, eq=False)
class HospitalLimits:
    """A suitability check with the hospitals' limits, and whom they come from in a sentence."""

    suitability: Suitability
    sentence: str


def find_hospital_limits(source: Source, say: Callable[[str], None]) -> HospitalLimits | None:
    """Finds the hospitals' limits for the kept model; None where the run has none, or of too few patients.

    Args:
        source: the run.
        say: takes a sentence on how many of the hospitals' patients are refused.

    Raises:
        CheckpointError: the run's file is damaged.
    """
    reference = source.run.folder.read_hospital_reference()
    if reference is None or reference.round != source.checkpoint.round:
        return None
    patients = reference.patients()
    if not reference.is_enough:
        say(
            f"the hospitals scored {sum(patients.values())} validation patients, too few for a refusal rate of "
            f"{reference.suitability.refusal_rate:g}: the limits of the suitability check come from the central set"
        )
        return None
    pooled = reference.pooled()
    refused, before = reference.most_refused(pooled.limits), reference.most_refused(reference.suitability.limits)
    total = sum(patients.values())
    by_site = ", ".join(f"{site} {refused[site]} of {count} (before {before[site]})" for site, count in patients.items())
    sentence = (
        f"at most {sum(refused.values())} of {total} cannot be judged ({sum(refused.values()) / total:.1%}); with limits from the "
        f"central set it were at most {sum(before.values())}. By hospital: {by_site}."
    )
    say(f"limits of the suitability check from the hospitals' validation patients: {sentence}")
    return HospitalLimits(pooled, sentence)
