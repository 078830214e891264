"""Networks of CT volumes, float32 [N, 1, D, S, S] -> logits [N, classes], D slices from foot to head or the reverse, always the same.

- `SliceNetwork`: 2.5-D, a network of single slices with shared weights, and attention over the slices.
- `build_densenet121_3d`: DenseNet121 with three-dimensional convolutions, MONAI's.

Both end as the networks of radiographs do: maps, their mean over all places, one linear layer. So everything that is made of maps
(class activation maps, features for drift and suitability) is made of theirs in the same way, with one dimension more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pneumofed.common.errors import ConfigError

ATTENTION_WIDTH = 128
"""L of Ilse et al. 2018, eq. 9; 128 as in the authors' own code."""
MONAI_EXTRA = "pneumofed[ct]"


class SliceAttention(nn.Module):
    """Gated attention over slices (Ilse, Tomczak & Welling 2018, eq. 8 and 9): a_k = softmax_k(w (tanh(V h_k) * sigmoid(U h_k))).

    The slices of a volume are a bag of which some show the disease: a mean over slices would dilute one in thirty, and a maximum would
    train one slice at a time. The weights sum to 1 over a volume, whatever the number of slices.

    First weights are Glorot and Bengio's (2010, eq. 16), made for tanh; those of w are zeros, so that a new network takes the plain mean.

    Args:
        features: D_h, of one slice.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.value = nn.Linear(features, ATTENTION_WIDTH)
        self.gate = nn.Linear(features, ATTENTION_WIDTH)
        self.weight = nn.Linear(ATTENTION_WIDTH, 1)
        for layer in (self.value, self.gate):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)

    def forward(self, slices: Tensor, count: int) -> Tensor:
        """Computes the weight of each slice, float32 [N, D]; each row sums to 1.

        Args:
            slices: features, float32 [N * D, D_h], the slices of a volume one after the other.
            count: D, slices of a volume.
        """
        scores = self.weight(torch.tanh(self.value(slices)) * torch.sigmoid(self.gate(slices)))
        return torch.softmax(scores.reshape(-1, count), dim=1)


class SliceNetwork(nn.Module):
    """A network of images over every slice, and attention over the slices ("2.5-D").

    With f_k the maps [C, h, w] of slice k, h_k their mean over the picture and a_k the attention, the classifier sees
    sum_k a_k h_k. It is written as the mean over all D h w places of the maps D a_k f_k (`weighted`), so that the logit is a sum over
    the places of the volume, given the attention: a class activation map shows which slice and where in it.

    Args:
        body: ResNet of torchvision with three input channels; its classifier is taken out.
        classes: number of logits.
    """

    def __init__(self, body: Any, classes: int) -> None:
        super().__init__()
        self.attention = SliceAttention(body.fc.in_features)
        self.head = nn.Linear(body.fc.in_features, classes)
        del body.avgpool, body.fc
        self.body = body
        self.weighted = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[2]
        maps = self._maps(x.transpose(1, 2).flatten(0, 1))
        weights = self.attention(maps.mean(dim=(2, 3)), count)
        maps = maps.unflatten(0, (-1, count)) * (count * weights)[:, :, None, None, None]
        return self.head(self.weighted(maps.transpose(1, 2)).mean(dim=(2, 3, 4)))

    def _maps(self, slices: Tensor) -> Tensor:
        """Of single slices [N * D, C, S, S]; torchvision's `ResNet._forward_impl` up to its average pooling."""
        body = self.body
        found = body.maxpool(body.relu(body.bn1(body.conv1(slices))))
        maps: Tensor = body.layer4(body.layer3(body.layer2(body.layer1(found))))
        return maps


def build_densenet121_3d(classes: int) -> nn.Module:
    """Builds MONAI's DenseNet121 (Huang et al. 2017, table 1) with three-dimensional convolutions, one input channel and BatchNorm.

    First weights are MONAI's own: convolutions as He et al. 2015, eq. 10, on the fan-in, biases zero.

    Args:
        classes: number of logits.

    Raises:
        ConfigError: MONAI is not installed.
    """
    try:
        from monai.networks.nets.densenet import DenseNet121  # seconds to import, and nobody needs it for radiographs
    except ImportError:
        raise ConfigError(
            f"model.name 'densenet121_3d' is MONAI's network, and MONAI is not installed: pip install '{MONAI_EXTRA}', or take "
            "resnet18_slices, which needs nothing more"
        ) from None
    network: nn.Module = DenseNet121(spatial_dims=3, in_channels=1, out_channels=classes)
    return network
