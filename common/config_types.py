"""What all configurations are made of: the base of their sections, ranges of numbers, and the names that a setting may have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]

TaskName = Literal["binary", "three_class"]
ModelName = Literal["resnet18", "resnet34", "resnet50", "densenet121", "efficientnet_b0", "vgg16", "small_cnn", "scattering"]
StrategyName = Literal[
    "fedavg", "fedprox", "fedavgm", "fedexp", "fedadam", "fedyogi", "fedbn", "fedmedian", "fedtrimmedavg", "krum", "multikrum"
]
ROBUST: tuple[StrategyName, ...] = ("fedmedian", "fedtrimmedavg", "krum", "multikrum")
"""They compare single updates, and none of them is the weighted mean."""
NEEDS_SINGLE_UPDATES: tuple[StrategyName, ...] = (*ROBUST, "fedexp")
"""They cannot be had of a sum of updates; `fedexp` needs their lengths."""
UpdatePrecision = Literal["float32", "float16", "int8"]
PrivacyUnit = Literal["image", "patient"]
Withheld = Literal["data_report", "training_metrics", "validation_statistics"]
ThresholdPolicyName = Literal["half", "youden", "sensitivity", "specificity"]


class Section(BaseModel):
    """A part of a configuration: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
