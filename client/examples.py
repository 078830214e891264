"""What a round trains on: a site's images, or their features where only the classifier is trained and each image is always the same."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from client.training import Examples, RoundPlan
from common.architectures import architecture_of
from common.compute import Compute
from common.data.dataset import Dataset
from common.features import FeatureSet, has_fixed_body, load_features
from common.torchvision_shim import import_torchvision

logger = logging.getLogger(__name__)


def choose_examples(model: nn.Module, data: Dataset, plan: RoundPlan, compute: Compute, cache_dir: Path) -> Examples:
    """`data`, or its features where they give the weights that the images would give, in a hundredth of the time.

    There is no setting for it, so that none can be wrong. Features are taken exactly where the network below the classifier is the same
    function of the same images in every step: its parameters are frozen in all rounds or there are none, nothing in it is random, no
    augmentation is on, and the images have their full size. Else the images are taken.

    Raises:
        DataError: `cache_dir` cannot be written for another reason than a full disk.
    """
    experiment = plan.experiment
    if not has_fixed_body(model, experiment.model) or _is_random(model) or not len(data):
        return data
    if experiment.augmentation.is_on:
        logger.info("augmentation is on: features of images are computed anew for each view; set it to 0 to compute them once")
        return data
    size_px = experiment.image.size_px
    if experiment.training.size_in_round(plan.round, experiment.rounds, size_px) != size_px:
        return data
    return FeatureSet(load_features(model, data, compute, experiment.model, cache_dir), data.labels, data.patients)


def _is_random(model: nn.Module) -> bool:
    """Whether a layer below the classifier draws at random in training."""
    kinds = (nn.modules.dropout._DropoutNd, import_torchvision().ops.StochasticDepth)
    return any(isinstance(module, kinds) for name, module in model.named_modules() if name != architecture_of(model).head)
