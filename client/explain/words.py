"""What the reader is told below a map: what it is, whether to believe it, and where its weight lies."""

from __future__ import annotations

from collections.abc import Mapping

from client.explain.focus import Focus
from client.explain.methods import FACTS, Attribution
from client.explain.sanity import Sanity
from common.model_bundle.judgement import Judgement
from common.model_bundle.manifest import BundleManifest

LIMITS = (
    "The map is about the network and not about the patient: it outlines no disease. Colours are relative to the largest value in this "
    "picture and do not compare between pictures."
)
PHANTOM = "The model was trained on drawn images. Nothing here is about patients."


def headline(judgement: Judgement) -> str:
    """The judgement in a few words, as the title of its pictures."""
    found = judgement.prediction
    if found is None:
        return f"cannot judge ({', '.join(judgement.reasons)})"
    return f"{found.decision}, P = {found.probability:.2f} ({found.low:.2f} to {found.high:.2f})"


def caption_map(
    attribution: Attribution, manifest: BundleManifest, sanity: Sanity | None, focus: Focus, faith: Mapping[str, float]
) -> tuple[str, ...]:
    """The lines below one map; warnings first.

    Args:
        attribution: the map.
        manifest: of the bundle whose network it explains.
        sanity: of the method; None where it was not checked.
        focus: where the map's weight lies.
        faith: areas under its deletion curve, empty where they were not measured.
    """
    facts = FACTS[attribution.method]
    lines = [f"Caution: {warning.value}" for warning in focus.warnings]
    lines.append(f"{facts.title} ({facts.source}) shows {facts.shows}. Evidence for: {_target(attribution, manifest)}.")
    lines.append(sanity.sentence() if sanity else "Whether the map can be believed was not checked.")
    lines += _about_focus(focus) + _about_deletion(attribution, faith)
    return (*lines, LIMITS, *([PHANTOM] if manifest.card.phantom else []))


def _target(attribution: Attribution, manifest: BundleManifest) -> str:
    return attribution.target if isinstance(attribution.target, str) else manifest.classes[attribution.target]


def _about_focus(focus: Focus) -> list[str]:
    if focus.outside != focus.outside:
        return []
    return [
        f"{focus.outside:.0%} of its weight lies outside the lungs; of a map without preference, {focus.outside_area:.0%} would."
    ]


def _about_deletion(attribution: Attribution, faith: Mapping[str, float]) -> list[str]:
    """One sentence from the deletion curve, or why there is none."""
    if "area" in faith:
        better = "faster than" if faith["area"] < faith["random_area"] else "no faster than"
        areas = f"area under the curve {faith['area']:.2f} against {faith['random_area']:.2f}"
        return [f"When what it marks is blurred first, the probability falls {better} in random order ({areas})."]
    if faith.get("empty", 0.0) >= 0.5:
        meaning = "; this map shows only what says more than that" if FACTS[attribution.method].empty else ""
        return [
            f"The network gives even a blurred picture P = {faith['empty']:.2f} (not calibrated): no deletion curve can be drawn{meaning}."
        ]
    return []
