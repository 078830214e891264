"""The networks: torchvision's, without any in-place operation, a small one of our own, a linear one on fixed features, and those of CT
volumes (`common.models.volume_networks`).

Per-sample gradients need this: Opacus' hooks hand out views of activations, which torch forbids to be changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pneumofed.common.config.choices import NetworkName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.models.compute import import_torchvision
from pneumofed.common.models.efficientnet_lite import EFFICIENTNET_ROWS, EfficientNetLite0, ImageNetWavelets
from pneumofed.common.models.fusion import fuse
from pneumofed.common.models.layers import (
    Scattering2D,
    group_count,
    standardize_weights,
    wavelet_count,
    wavelet_features,
    zero_classifier,
)
from pneumofed.common.models.study_network import make_study_network, refuse_batch_statistics, trace_layers
from pneumofed.common.models.volume_networks import SliceNetwork, build_densenet121_3d
from pneumofed.common.ops.study_code import StudyCode, find_study_code, is_study_code

_models = import_torchvision().models
_BasicBlock: Any = _models.resnet.BasicBlock
_Bottleneck: Any = _models.resnet.Bottleneck
_DenseNet: Any = _models.densenet.DenseNet
_MBConv: Any = _models.efficientnet.MBConv


@dataclass(frozen=True)
class Architecture:
    """One network of the schema's list, or a study's own as it was traced.

    Attributes:
        build: takes the number of classes and the model section; the network has three input channels and BatchNorm.
        first: name of the first convolution; None where there is none, and any number of channels is taken.
        head: name of the classifier, a linear layer.
        last_block: names of the modules that `last_block` trains besides the classifier.
        imagenet: torchvision's name of the network, for its weights; None where it has none.
        replaced: prefix of all keys in ImageNet's weights that the head here stands for.
        maps: name of the module whose output, averaged over the picture, is the classifier's input; None where there is no such one.
        finer_maps: name of the last module whose output has twice the cells to a side of `maps`; None where `maps` is, or there is none.
        in_channels: of a study's own network, as it was built; None where the first convolution says it.
        pooled: `maps`, or the last maps whose averages go through more layers before the classifier.
    """

    build: Callable[[int, ModelConfig], nn.Module]
    first: str | None
    head: str
    last_block: tuple[str, ...]
    imagenet: str | None
    replaced: str
    maps: str | None
    finer_maps: str | None
    in_channels: int | None = None
    pooled: str | None = None


class BasicBlock(_BasicBlock):
    """ResNet's two-convolution block (He et al. 2016, fig. 5 left) with the sum not in place."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(_Bottleneck):
    """ResNet's three-convolution block (He et al. 2016, fig. 5 right) with the sum not in place."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class DenseNet(_DenseNet):
    """DenseNet (Huang et al. 2017) with the last ReLU not in place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.last_relu(self.features(x)).mean(dim=(2, 3)))


class MBConv(_MBConv):
    """EfficientNet's inverted residual block (Tan & Le 2019) with the sum not in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return self.stochastic_depth(out) + x if self.use_res_connect else out


class VGG16(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015, table 1, column D) with norms, average pooling and one linear layer.

    The classic head flattens a 7 x 7 map into three dense layers: 119 of 134 million parameters, 480 MB in each message, and at
    64 pixels its map is a 2 x 2 one blown up. Global average pooling (Lin et al. 2014, section 3.2) serves every image size.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = _models.vgg.make_layers(_models.vgg.cfgs["D"], batch_norm=True)
        self.classifier = nn.Linear(512, classes)
        _draw_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class SmallCNN(nn.Module):
    """Four stages of 3 x 3 convolution, norm, ReLU and halving, then average pooling: 0.1 million parameters, for trials."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(_stage(before, after) for before, after in pairwise((3, 16, 32, 64, 128))))
        self.head = nn.Linear(128, classes)
        _draw_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean(dim=(2, 3)))


class ScatteringLinear(nn.Module):
    """A linear classifier of fixed scattering features (Tramèr & Boneh 2021, section 2.2): only the classifier is trained.

    The feature map is averaged to 8 x 8 cells, whatever the image's size, and group-normalised, which takes nothing from other images
    and so costs no privacy. The features of all images have one length, so that clipping treats all alike, and mean square 1: were they
    as short as the constant input of the bias, half of what a clipped gradient may hold would go to the bias.
    """

    def __init__(self, classes: int, scale: int) -> None:
        super().__init__()
        self.scattering = Scattering2D(scale)
        self.head = zero_classifier(wavelet_count(self.scattering), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(wavelet_features(self.scattering, x) * self.head.in_features**0.5)


def build_architecture(cfg: ModelConfig, classes: int) -> nn.Module:
    """Builds the network of `cfg` with random weights, drawn from torch's global generator; no operation in it works in place.

    Args:
        cfg: which network; `weights`, `freeze` and what follows them are not looked at.
        classes: number of logits.

    Raises:
        ConfigError: a study's own network is not here, or is none that can be trained.
    """
    code = find_study_code(cfg.name) if is_study_code(cfg.name) else None
    if code:
        model = make_study_network(code, classes, cfg.in_channels)
    else:
        architecture = ARCHITECTURES[cfg.name]
        model = architecture.build(classes, cfg)
        if cfg.in_channels == 1 and architecture.first:
            _take_grey(model, architecture.first)
    if cfg.norm == "group":
        replace_batch_norm(model)
    if cfg.weight_standardization:
        standardize_weights(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            vars(module)["inplace"] = False
    vars(model)["architecture"] = _trace_study(model, code, classes, cfg) if code else architecture
    return model if cfg.clinical is None else fuse(model, cfg.clinical, classes)


def architecture_of(model: nn.Module) -> Architecture:
    """Looks up the row of `ARCHITECTURES` that `build_architecture` built `model` from.

    Raises:
        TypeError: another function built it.
    """
    architecture = vars(model).get("architecture")
    if not isinstance(architecture, Architecture):
        raise TypeError(f"{type(model).__name__}: expected a network of build_model, unwrapped")
    return architecture


def replace_batch_norm(model: nn.Module) -> None:
    """Puts a GroupNorm (Wu & He 2018) of the same channels and epsilon in the place of every BatchNorm2d and BatchNorm3d in `model`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            norm = nn.GroupNorm(group_count(module.num_features), module.num_features, eps=module.eps)
            _replace(model, name, norm)


def _trace_study(model: nn.Module, code: StudyCode, classes: int, cfg: ModelConfig) -> Architecture:
    if cfg.norm == "group":
        refuse_batch_statistics(model, code, cfg.in_channels)
    found = trace_layers(model, code, classes, cfg.in_channels)

    def build(classes: int, cfg: ModelConfig) -> nn.Module:
        return make_study_network(code, classes, cfg.in_channels)

    layers = (), None, f"{found.head}.", found.maps, found.finer_maps
    return Architecture(build, found.first, found.head, *layers, cfg.in_channels, found.pooled)


def _stage(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))


def _draw_convolutions(model: nn.Module) -> None:
    """He et al. 2015, eq. 10, on the fan-out as torchvision's ResNet and VGG do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _take_grey(model: nn.Module, first: str) -> None:
    """Makes the three-channel first convolution a one-channel one with the weights of the first colour."""
    convolution = model.get_submodule(first)
    if not isinstance(convolution, nn.Conv2d):
        raise TypeError(f"{first}: expected a convolution, got {type(convolution).__name__}")
    convolution.in_channels = 1
    convolution.weight = nn.Parameter(convolution.weight.detach()[:, :1].clone())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _resnet(block: type[nn.Module], layers: tuple[int, ...], name: str) -> Architecture:
    def build(classes: int, _: ModelConfig) -> nn.Module:
        return _models.resnet.ResNet(block, list(layers), num_classes=classes)

    return Architecture(build, "conv1", "fc", ("layer4",), name, "fc.", "layer4", "layer3")


def _densenet121(classes: int, cfg: ModelConfig) -> nn.Module:
    model = DenseNet(32, (6, 12, 24, 16), 64, num_classes=classes)
    if cfg.in_channels == 1:  # torchvision draws it by fan-in, of three colours; one alone would be too small by the root of 3
        with torch.no_grad():
            model.features.conv0.weight *= 3**0.5
    return model


def _efficientnet_b0(classes: int, _: ModelConfig) -> nn.Module:
    """Tan & Le 2019, table 1: expansion, kernel, stride, channels in and out, layers; dropout 0.2 as in their section 5.2."""
    config = partial(_models.efficientnet.MBConvConfig, block=MBConv)
    return _models.efficientnet.EfficientNet([config(*row) for row in EFFICIENTNET_ROWS], dropout=0.2, num_classes=classes)


ARCHITECTURES: dict[NetworkName, Architecture] = {
    "resnet18": _resnet(BasicBlock, (2, 2, 2, 2), "resnet18"),
    "resnet34": _resnet(BasicBlock, (3, 4, 6, 3), "resnet34"),
    "resnet50": _resnet(Bottleneck, (3, 4, 6, 3), "resnet50"),
    "densenet121": Architecture(
        _densenet121,
        "features.conv0",
        "classifier",
        ("features.denseblock4", "features.norm5"),
        "densenet121",
        "classifier.",
        "last_relu",
        "features.denseblock3",
    ),
    "efficientnet_b0": Architecture(
        _efficientnet_b0,
        "features.0.0",
        "classifier.1",
        ("features.7", "features.8"),
        "efficientnet_b0",
        "classifier.",
        "features",
        "features.5",
    ),
    "efficientnet_lite0": Architecture(
        lambda classes, _: EfficientNetLite0(classes),
        "features.stem.conv",
        "classifier",
        ("features.block_15", "features.top"),
        None,
        "classifier.",
        "features",
        "features.block_10",
    ),
    "vgg16": Architecture(
        lambda classes, _: VGG16(classes),
        "features.0",
        "classifier",
        tuple(f"features.{index}" for index in range(34, 44)),
        "vgg16_bn",
        "classifier.",
        "features",
        "features.42",
    ),
    "small_cnn": Architecture(
        lambda classes, _: SmallCNN(classes), "stages.0.0", "head", ("stages.3",), None, "head.", "stages", "stages.2"
    ),
    "scattering": Architecture(
        lambda classes, cfg: ScatteringLinear(classes, cfg.scattering_scale), None, "head", (), None, "head.", None, None
    ),
    "imagenet_wavelets": Architecture(
        lambda classes, cfg: ImageNetWavelets(classes, cfg.scattering_scale),
        "features.stem.conv",
        "classifier",
        ("features.block_15", "features.top"),
        None,
        "classifier.",
        None,
        "features.block_10",
        pooled="features",
    ),
    "resnet18_slices": Architecture(
        lambda classes, _: SliceNetwork(_models.resnet.ResNet(BasicBlock, [2, 2, 2, 2]), classes),
        "body.conv1",
        "head",
        ("body.layer4", "attention"),
        None,
        "head.",
        "weighted",
        "body.layer3",
    ),
    "densenet121_3d": Architecture(
        lambda classes, _: build_densenet121_3d(classes),
        None,
        "class_layers.out",
        ("features.denseblock4", "features.norm5"),
        None,
        "class_layers.out.",
        "class_layers.relu",
        "features.denseblock3",
    ),
}
