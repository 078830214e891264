"""A finished model: `open_bundle(...).predict(...)` needs ONNX Runtime and no torch, `explain` needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import batched
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from client.explain.methods import Method
from client.predict.answers import map_ahead
from common.errors import ArgumentError, ImageError, SkipReason
from common.images import Image
from common.keys import read_public_key
from common.model_bundle.bundle import Bundle
from common.model_bundle.bundle import open_bundle as open_checked
from common.model_bundle.judgement import Judgement
from common.model_bundle.manifest import CARD, BundleManifest
from common.model_bundle.predictor import BATCH, Predictor, prepare
from pneumofed.images import ImageLike, to_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from client.explain.files import ExplainedMap
