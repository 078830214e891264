"""The attribution methods, and what a map of each one is. Nothing heavy is imported: command lines list them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pneumofed.common.config.classes import positive_word
from pneumofed.common.errors import ConfigError, in_a_row

if TYPE_CHECKING:
    import numpy as np


Method = Literal["grad-cam", "grad-cam++", "integrated-gradients", "gradient-shap", "occlusion", "kernel-shap", "lime"]
METHODS: tuple[Method, ...] = get_args(Method)
Detail = Literal["last-layer", "finer-layer", "larger-input", "several-sizes"]
"""Of class activation maps: at the last feature maps; at an earlier layer with twice the cells to a side; at the last feature maps of an
input 1.75 times as large; or the mean over inputs of 1 to 1.75 times the side (Grad-CAM and Grad-CAM++ only)."""
DETAILS: tuple[Detail, ...] = get_args(Detail)
ACTIVATION_METHODS: tuple[Method, ...] = ("grad-cam", "grad-cam++")
Target = int | Literal["pneumonia"]
"""A position in the task's classes, or `pneumonia`: all but class 0, which is normal."""


@dataclass(frozen=True)
class Facts:
    """What to know of a method.

    Attributes:
        title: its name in pictures.
        shows: one sentence that says what a high value means.
        signed: whether values below zero speak against the target; else the map is zero or more.
        empty: whether it compares with an empty (blurred) image, so that its values mean "more than if nothing were there".
        source: paper and place in it.
    """

    title: str
    shows: str
    signed: bool
    empty: bool
    source: str


FACTS: dict[Method, Facts] = {
    "grad-cam": Facts(
        "Grad-CAM", "where the last feature maps that raise the score are active", False, False, "Selvaraju et al. 2017, eq. 1-2"
    ),
    "grad-cam++": Facts(
        "Grad-CAM++", "as Grad-CAM, with more weight on small active regions", False, False, "Chattopadhay et al. 2018, eq. 19"
    ),
    "integrated-gradients": Facts(
        "Integrated gradients", "which pixels the score owes to their difference from the blurred image", True, True,
        "Sundararajan et al. 2017, eq. 1",
    ),
    "gradient-shap": Facts(
        "SHAP (gradients)", "expected share of each pixel in the score, against blurred, grey and black images", True, True,
        "Lundberg & Lee 2017; Erion et al. 2021, eq. 3",
    ),
    "occlusion": Facts(
        "Occlusion", "how far the score falls where a window of the image is blurred", True, True, "Zeiler & Fergus 2014, section 4.2"
    ),
    "kernel-shap": Facts(
        "SHAP (superpixels)", "estimated Shapley value of each superpixel, against the blurred image", True, True,
        "Lundberg & Lee 2017, theorem 2",
    ),
    "lime": Facts(
        "LIME", "weight of each superpixel in a linear model of the score near this image", True, True, "Ribeiro et al. 2016, eq. 1-2"
    ),
}  # fmt: skip


DETAIL_NOTES: dict[Detail, str] = {
    "last-layer": "",
    "finer-layer": "It is made at an earlier layer, whose features are simpler and whose cells are half as wide.",
    "larger-input": "It is made of the image at 1.75 times the side that the network was trained at; it may point worse for it.",
    "several-sizes": "It is the mean over four sizes of the image, of 1 to 1.75 times the side that the network was trained at.",
}


@dataclass(frozen=True)
class Attribution:
    """A map of evidence for one image, in the coordinates of the network's input.

    Attributes:
        values: float32 [S, S], above zero where the image speaks for the target; finite.
        method: that made it.
        target: what the evidence is for.
        score: log-odds of the target by the network, not calibrated.
        cell_px: side of the smallest thing that the map can show, in pixels of the network's input.
        detail: of a class activation map; None for the other methods.
    """

    values: np.ndarray
    method: Method
    target: Target
    score: float
    cell_px: float
    detail: Detail | None = None


def choose_methods(names: Sequence[str], option: str) -> tuple[Method, ...]:
    """Chooses the methods called `names`, each once, in the order of `METHODS`.

    Args:
        names: as the user gave them.
        option: where, e.g. `--method`.

    Raises:
        ConfigError: there is no such method.
    """
    if unknown := sorted(set(names) - set(METHODS)):
        raise ConfigError(f"{option}: expected one of {', '.join(METHODS)}, got {', '.join(unknown)}")
    return tuple(method for method in METHODS if method in names)


def choose_detail(name: str, methods: Sequence[Method], option: str) -> Detail:
    """Chooses the detail called `name`.

    Args:
        name: as the user gave it.
        methods: that are used; a detail other than the usual one needs a class activation map among them.
        option: where it was given, e.g. `--detail`.

    Raises:
        ConfigError: there is no such detail, or no method has it.
    """
    if name not in DETAILS:
        raise ConfigError(f"{option}: expected one of {', '.join(DETAILS)}, got {name!r}")
    if name != DETAILS[0] and not set(methods) & set(ACTIVATION_METHODS):
        raise ConfigError(f"{option} {name}: only {in_a_row(ACTIVATION_METHODS)} have it, and neither was asked for")
    return next(detail for detail in DETAILS if detail == name)


def choose_target(name: str | None, classes: Sequence[str], option: str) -> Target:
    """Chooses the target called `name`: one of a bundle's `classes`, or what `positive_word` calls all but normal.

    Args:
        name: as the user gave it; None for all but normal.
        classes: of the bundle, in the order of the logits.
        option: where it was given, e.g. `--target`.

    Raises:
        ConfigError: there is no such class.
    """
    together = positive_word(classes)
    if name is None or name == together:
        return "pneumonia"
    if name not in classes:
        raise ConfigError(f"{option}: expected {together} or one of {', '.join(classes)}, got {name!r}")
    return classes.index(name)
