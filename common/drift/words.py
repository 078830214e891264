"""What the quantities are called, and what it means that one moved, for people who know radiographs."""

from __future__ import annotations

from common.drift.bets import CORRECTIONS, REFUSALS
from common.drift.evidence import Direction
from common.drift.looks import EMBEDDING
from common.drift.reference import COMPONENT, LIKENESS, PROBABILITY

TITLES = {
    "mean": "Mean grey",
    "deviation": "Contrast",
    "quantile_01": "Darkest 1 %",
    "quantile_10": "Darkest 10 %",
    "quantile_25": "Lower quartile of grey",
    "quantile_50": "Median grey",
    "quantile_75": "Upper quartile of grey",
    "quantile_90": "Brightest 10 %",
    "quantile_99": "Brightest 1 %",
    "black_share": "Black area",
    "white_share": "White area",
    "entropy_bits": "Grey levels in use",
    "gradient": "Sharpness",
    "laplacian": "Noise and fine detail",
    "left_right_difference": "Left against right",
    "border_mean": "Grey of the border",
    PROBABILITY: "Model's probability",
    LIKENESS: "Likeness to the reference",
    EMBEDDING: "Model's view of the image",
    CORRECTIONS: "Corrections by readers",
    REFUSALS: "Images that cannot be judged",
}
_MEANINGS = {
    "mean": ("images are brighter", "images are darker"),
    "deviation": ("contrast is higher", "contrast is lower"),
    "quantile_01": ("blacks are lifted", "blacks are deeper"),
    "quantile_10": ("dark parts (air) are brighter", "dark parts (air) are darker"),
    "quantile_25": ("the darker half is brighter", "the darker half is darker"),
    "quantile_50": ("middle greys are brighter", "middle greys are darker"),
    "quantile_75": ("the brighter half is brighter", "the brighter half is darker"),
    "quantile_90": ("bright parts (bone, heart) are brighter", "bright parts (bone, heart) are darker"),
    "quantile_99": ("whites are brighter", "whites are greyer"),
    "black_share": ("more of the image is black: collimation, padding or air", "less of the image is black"),
    "white_share": ("more of the image is white: saturation, markers or a white border", "less of the image is white"),
    "entropy_bits": ("more grey levels are in use", "fewer grey levels are in use: stronger contrast curve or fewer bits"),
    "gradient": ("images are sharper, or noisier", "images are blurred, or smoothed"),
    "laplacian": ("more noise, or edge enhancement", "less noise: smoothing, blur or lower resolution"),
    "left_right_difference": ("the left half is brighter than usual", "the right half is brighter than usual"),
    "border_mean": ("the border is brighter", "the border is darker: collimation, padding or vignetting"),
    PROBABILITY: ("the model says pneumonia more often", "the model says pneumonia less often"),
    LIKENESS: ("images are closer to the typical one", "the model sees images unlike the reference"),
    CORRECTIONS: ("readers change more verdicts than the calibration expects", ""),
    REFUSALS: ("more images cannot be judged than allowed", ""),
}
_SPREADS = {"wider": "values vary more than in the reference", "narrower": "values vary less than in the reference"}


def title(quantity: str) -> str:
    """`Contrast`; the name itself where it has no title."""
    if quantity.startswith(COMPONENT):
        return f"Network's features, {quantity}"
    return TITLES.get(quantity, quantity[:1].upper() + quantity[1:].replace("_", " "))


def meaning(quantity: str, direction: Direction) -> str:
    """What it means that `quantity` moved in `direction`, as a clause."""
    if direction in _SPREADS:
        return _SPREADS[direction]
    if quantity.startswith(COMPONENT):
        return "the network sees something else"
    higher, lower = _MEANINGS.get(quantity, ("values are higher", "values are lower"))
    return higher if direction == "higher" else lower
