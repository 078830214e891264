"""A network with two inputs: a radiograph, and the clinical values of its patient, which meet before the classifier.

    image float32 [N, C, S, S]  -> features f [N, D]          the network of the list, without its classifier
    values float32 [N, K]       -> encoded [N, 2K]            standardised, 0 where not known; and 1 where not known, else 0
                                -> h = tanh(A encoded + a)    [N, width]
    concatenate                 f, h side by side             [N, D + width]
    film                        (1 + g) f + b, where g, b = B h + c       Perez et al. 2018, eq. 1
                                -> the classifier             [N, classes]

What is not known is NaN in `values`. Its column of A is the learnt embedding of "missing", so that a missing value is never a number of
another patient, and `network(image)` is `network(image, all missing)`. FiLM's B and c begin with zeros: the network begins as that of the
image. tanh bounds what one value can do, which helps under clipping too (Papernot et al. 2021, "Tempered sigmoid activations").

Mean and deviation are buffers: they travel with the weights, into the bundle and the ONNX graph, which takes values in their own units.
Every layer with parameters is a `Linear` that runs once, so that private training has each image's joint gradient of both inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from pneumofed.common.config.experiment import ClinicalColumn, ClinicalConfig

IMAGE, FUSION, HEAD = "image", "fusion", "head"
"""Names of the parts in the state dict."""


class PassFeatures(nn.Identity):
    """Stands where the image's own classifier was, and says how many features it took."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features


class ClinicalFusion(nn.Module):
    """Clinical values, and how they meet the features of an image; see the head of this module.

    Attributes:
        mean, deviation: float32 [K], by which values are standardised; of yes and no and of codes 0.5 and 0.5.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, schema: ClinicalConfig, features: int) -> None:
        super().__init__()
        mean, deviation = standardization(schema)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.reader = nn.Linear(2 * schema.slots, schema.width)
        self.modulate: nn.Linear | None = None
        self.features = features
        self.out_features = features + schema.width
        if schema.fusion == "film":
            self.modulate = nn.Linear(schema.width, 2 * features)
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)
            self.out_features = features

    def restate(self, schema: ClinicalConfig) -> None:
        """Takes mean and deviation from `schema`, the one that it was built from but for these numbers."""
        mean, deviation = standardization(schema)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def missing(self, rows: int) -> Tensor:
        """Makes the values of `rows` patients of whom nothing is known, float32 [rows, K], all NaN."""
        return torch.full((rows, len(self.mean)), torch.nan, device=self.mean.device)

    def encode(self, values: Tensor) -> Tensor:
        """Standardises values, float32 [N, K] with NaN where not known -> [N, 2K] without NaN."""
        unknown = torch.isnan(values)
        known = (torch.where(unknown, self.mean, values) - self.mean) / self.deviation
        return torch.cat([known, unknown.to(known.dtype)], dim=1)

    def join(self, features: Tensor, encoded: Tensor) -> Tensor:
        """Lets the two meet.

        Args:
            features: of the image, [N, D].
            encoded: of the values, [N, 2K].

        Returns:
            The classifier's input, [N, `out_features`].
        """
        hidden = torch.tanh(self.reader(encoded))
        if self.modulate is None:
            return torch.cat([features, hidden.to(features.dtype)], dim=1)
        scale, shift = self.modulate(hidden).to(features.dtype).chunk(2, dim=1)
        return features * (1.0 + scale) + shift

    def forward(self, features: Tensor, values: Tensor) -> Tensor:
        return self.join(features, self.encode(values))

    def pull_back(self, slope: Tensor, values: Tensor) -> Tensor:
        """Turns the derivative of a number by the classifier's input into that by the image's features.

        Args:
            slope: [N, `out_features`].
            values: [N, K].

        Returns:
            [N, D].
        """
        if self.modulate is None:
            return slope[:, : self.features]
        scale = self.modulate(torch.tanh(self.reader(self.encode(values)))).chunk(2, dim=1)[0]
        return slope * (1.0 + scale)


class ClinicalNetwork(nn.Module):
    """An image's network whose features meet clinical values before the classifier.

    Attributes:
        given: the values of calls that name none; None where these are of an image of which no value is known. See `giving`.
    """

    def __init__(self, image: nn.Module, fusion: ClinicalFusion, classes: int) -> None:
        super().__init__()
        self.image = image
        self.fusion = fusion
        self.head = nn.Linear(fusion.out_features, classes)
        self.given: Tensor | None = None

    def forward(self, image: Tensor, values: Tensor | None = None) -> Tensor:
        features = self.image(image)
        if values is None:
            values = self.fusion.missing(len(features)) if self.given is None else self.given.expand(len(features), -1)
        return self.head(self.fusion(features, values))

    @contextmanager
    def giving(self, values: Tensor | None) -> Iterator[None]:
        """For its time, a call without values takes these, float32 [1, K]: whoever explains an image explains it beside them."""
        self.given = values
        try:
            yield
        finally:
            self.given = None


def fuse(model: nn.Module, schema: ClinicalConfig, classes: int) -> ClinicalNetwork:
    """Gives a network of `build_architecture` its second input; new weights are drawn from torch's global generator.

    Args:
        model: changed in place: its classifier is taken out.
        schema: of the values.
        classes: number of logits.
    """
    architecture = vars(model)["architecture"]
    parent, _, child = architecture.head.rpartition(".")
    features = model.get_submodule(architecture.head).in_features
    assert isinstance(features, int)
    setattr(model.get_submodule(parent), child, PassFeatures(features))
    network = ClinicalNetwork(model, ClinicalFusion(schema, features), classes)
    moved = {
        name: f"{IMAGE}.{found}" for name in ("first", "maps", "finer_maps", "pooled") if (found := getattr(architecture, name))
    }
    last_block = tuple(f"{IMAGE}.{name}" for name in architecture.last_block)
    vars(network)["architecture"] = replace(
        architecture, head=HEAD, last_block=last_block, replaced=f"{IMAGE}.{architecture.replaced}", **moved
    )
    return network


def image_features(network: nn.Module, classifier: nn.Module) -> nn.Module:
    """Returns the module whose first input are the features of the image, [N, D].

    Args:
        network: of `build_model`.
        classifier: of `network`, which it is where there are no clinical values.
    """
    return network.fusion if isinstance(network, ClinicalNetwork) else classifier


def image_state(state: Mapping[str, Tensor], replaced: str) -> dict[str, Tensor]:
    """Names the weights of an image's network, such as ImageNet's, as they are in a `ClinicalNetwork`; its classifier is left out.

    Args:
        state: tensors by name.
        replaced: prefix of the classifier in the `ClinicalNetwork`, `Architecture.replaced`.
    """
    if any(name.startswith(f"{FUSION}.") for name in state):
        return dict(state)
    named = {f"{IMAGE}.{name}": tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(replaced)}


def standardization(schema: ClinicalConfig) -> tuple[Tensor, Tensor]:
    """Computes the mean and deviation of each slot that the schema states, float32 [K] each.

    A number's are its own where they are stated, else the middle and half the width of its range, which no data enter.
    """
    pairs = [pair for column in schema.columns for pair in [_of_column(column)] * column.slots]
    mean, deviation = (torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*pairs, strict=True))
    return mean, deviation


def with_standardization(schema: ClinicalConfig, network: nn.Module) -> ClinicalConfig:
    """States in the schema by what a trained network standardises its numbers, for people and for other tools.

    Args:
        schema: that the network was built from.
        network: a `ClinicalNetwork`.
    """
    assert isinstance(network, ClinicalNetwork)
    columns, slot = [], 0
    for column in schema.columns:
        mean, deviation = float(network.fusion.mean[slot]), float(network.fusion.deviation[slot])
        columns.append(column.model_copy(update={"mean": mean, "deviation": deviation}) if column.kind == "number" else column)
        slot += column.slots
    return schema.model_copy(update={"columns": tuple(columns)})


def _of_column(column: ClinicalColumn) -> tuple[float, float]:
    if column.mean is not None and column.deviation is not None:
        return column.mean, column.deviation
    if column.low is None or column.high is None:
        return 0.5, 0.5
    return (column.low + column.high) / 2.0, (column.high - column.low) / 2.0
