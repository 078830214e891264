"""The names that a run may choose among, and what groups of networks and strategies have in common."""

from __future__ import annotations

from typing import Literal, get_args

ModelName = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_lite0",
    "vgg16",
    "small_cnn",
    "scattering",
    "imagenet_wavelets",
]
IMAGENET_PACKAGE: tuple[ModelName, ...] = ("efficientnet_lite0", "imagenet_wavelets")
"""Networks whose ImageNet weights are those of the extra `imagenet`."""
VolumeModelName = Literal["resnet18_slices", "densenet121_3d"]
"""Networks of CT volumes; those of `ModelName` take radiographs."""
NetworkName = Literal[ModelName, VolumeModelName]
VOLUME_NETWORKS: tuple[VolumeModelName, ...] = get_args(VolumeModelName)
LEAST_SLICES_3D = 32
"""Of `densenet121_3d`, which halves the volume five times in each direction."""
StrategyName = Literal[
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedexp",
    "fedadam",
    "fedyogi",
    "fedbn",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "fednova",
    "scaffold",
    "feddyn",
]
ROBUST: tuple[StrategyName, ...] = ("fedmedian", "fedtrimmedavg", "krum", "multikrum")
"""Strategies that compare single updates; none of them is the weighted mean."""
COUNTS_STEPS: tuple[StrategyName, ...] = ("fednova", "scaffold")
"""Strategies that compute from each site's number of images what its local steps add up to."""
CORRECTED: tuple[StrategyName, ...] = ("scaffold", "feddyn")
"""Strategies under which each site keeps a correction of its gradients, which follows from its own updates."""
NEEDS_SINGLE_UPDATES: tuple[StrategyName, ...] = (*ROBUST, "fedexp", "fednova", *CORRECTED)
"""Strategies that a sum of updates is not enough for; `fedexp` needs their lengths."""
UpdatePrecision = Literal["float32", "float16", "int8"]
PrivacyUnit = Literal["image", "patient"]
Withheld = Literal["data_report", "training_metrics", "validation_statistics"]
ThresholdPolicyName = Literal["half", "youden", "sensitivity", "specificity"]
