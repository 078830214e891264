"""The layout of a model's weights in the two flat arrays that travel; both sides derive it from the model."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pneumofed.common.errors import MessageError

TensorKind = Literal["parameter", "statistic"]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the state dict.

    Attributes:
        name: in the state dict.
        shape: its own; it lies in the flat array row by row (C order), whatever its memory format is.
        kind: `parameter`, or `statistic` for a buffer of floating point numbers, such as a running mean.
        batch_norm: whether it belongs to a BatchNorm layer.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    batch_norm: bool

    @property
    def size(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class ArraysLayout:
    """The order of a model's tensors in the flat arrays `parameters` float32 [P] and `statistics` float32 [B].

    Integer buffers (`num_batches_tracked`) do not travel: they are no quantity to average, and BatchNorm with a fixed momentum
    does not read them. Frozen parameters do travel, so the layout is the same in every round.
    """

    entries: tuple[TensorEntry, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ArraysLayout:
        """Derives the layout of `model`, in the order of its state dict; does not depend on values, device or what is frozen."""
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _BatchNorm))
        return cls(
            tuple(
                TensorEntry(name, tuple(tensor.shape), "parameter" if name in parameters else "statistic", name.startswith(norms))
                for name, tensor in model.state_dict().items()
                if tensor.is_floating_point()
            )
        )

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of all names, shapes and kinds: equal for equal layouts."""
        text = json.dumps([(entry.name, entry.shape, entry.kind) for entry in self.entries])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def parameter_count(self) -> int:
        """P, the length of `parameters`."""
        return self._size("parameter")

    @property
    def statistic_count(self) -> int:
        """B, the length of `statistics`."""
        return self._size("statistic")

    @cached_property
    def norm_parameters(self) -> np.ndarray:
        """int64: positions in `parameters` of all scales and offsets of BatchNorm layers, ascending."""
        return self._positions("parameter", lambda entry: entry.batch_norm)

    @cached_property
    def norm_statistics(self) -> np.ndarray:
        """int64: positions in `statistics` of all running means and variances of BatchNorm layers, ascending."""
        return self._positions("statistic", lambda entry: entry.batch_norm)

    @cached_property
    def variances(self) -> np.ndarray:
        """int64: positions in `statistics` of all running variances of BatchNorm layers, ascending; none may be negative."""
        return self._positions("statistic", lambda entry: entry.batch_norm and entry.name.endswith("running_var"))

    @cached_property
    def fixed_statistics(self) -> np.ndarray:
        """int64: positions in `statistics` of what clinical values are standardised by, ascending; sites may not change them."""
        return self._positions("statistic", lambda entry: entry.name in ("fusion.mean", "fusion.deviation"))

    def untouched(self, trained: Collection[str], *, fix_norms: bool) -> tuple[np.ndarray, np.ndarray]:
        """Finds what a round leaves as it is, whatever a site sends: all parameters that are not trained, the running statistics of a
        BatchNorm without a trained parameter, and `fixed_statistics`.

        Args:
            trained: names of the parameters that are trained.
            fix_norms: whether the running statistics of every BatchNorm stand still.

        Returns:
            (bool [P] of `parameters`, bool [B] of `statistics`).
        """
        moving = {name.rpartition(".")[0] for name in trained}
        still: dict[TensorKind, list[np.ndarray]] = {"parameter": [np.zeros(0, bool)], "statistic": [np.zeros(0, bool)]}
        for entry in self.entries:
            frozen_norm = entry.batch_norm and (fix_norms or entry.name.rpartition(".")[0] not in moving)
            kept = entry.name not in trained if entry.kind == "parameter" else frozen_norm
            still[entry.kind].append(np.full(entry.size, kept))
        parameters, statistics = (np.concatenate(still[kind]) for kind in ("parameter", "statistic"))
        statistics[self.fixed_statistics] = True
        return parameters, statistics

    def check(self, parameters: np.ndarray, statistics: np.ndarray) -> None:
        """Does nothing where the flat arrays are of this layout; for whoever looks into arrays of a message before `load`.

        Args:
            parameters: expected to be float32 [P].
            statistics: expected to be float32 [B].

        Raises:
            MessageError: an array has another shape or type.
        """
        arrays: dict[TensorKind, np.ndarray] = {"parameter": parameters, "statistic": statistics}
        for kind, array in arrays.items():
            expected = (self._size(kind),)
            if array.dtype != np.float32 or array.shape != expected:
                raise MessageError(f"{kind}s: expected float32 {list(expected)}, got {array.dtype} {list(array.shape)}")

    @torch.no_grad()
    def flatten(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Copies the weights of `model`, tensor by tensor, into (`parameters` float32 [P], `statistics` float32 [B]).

        Raises:
            MessageError: the model has another layout.
        """
        self._require(model)
        state = model.state_dict()
        kinds: tuple[TensorKind, ...] = ("parameter", "statistic")
        arrays = {kind: np.empty(self._size(kind), dtype=np.float32) for kind in kinds}
        for entry, piece in self._pieces(arrays):
            torch.from_numpy(piece).view(entry.shape).copy_(state[entry.name])
        return arrays["parameter"], arrays["statistic"]

    @torch.no_grad()
    def load(self, model: nn.Module, parameters: np.ndarray, statistics: np.ndarray) -> None:
        """Puts flat arrays into a model, in place; values are not looked at.

        `load` after `flatten` gives the same float32 model, bit for bit; `flatten` after `load` the same arrays.

        Args:
            model: of this layout, on any device.
            parameters: float32 [P]; may be read-only.
            statistics: float32 [B]; may be read-only.

        Raises:
            MessageError: the model has another layout, or an array another shape or type; the model is as before then.
        """
        self._require(model)
        self.check(parameters, statistics)
        arrays: dict[TensorKind, np.ndarray] = {"parameter": parameters, "statistic": statistics}
        state = model.state_dict()
        for entry, piece in self._pieces(arrays):
            if (tensor := state[entry.name]).device.type == "cpu" and tensor.dtype is torch.float32:
                np.copyto(tensor.numpy(), piece.reshape(entry.shape))
            else:  # a copy, for arrays out of a message are read-only, which torch cannot express
                tensor.copy_(torch.tensor(piece).view(entry.shape))

    def parameter_tensors(self, parameters: np.ndarray) -> dict[str, torch.Tensor]:
        """Copies a flat array as tensors by the names and with the shapes of the model's parameters.

        Args:
            parameters: expected to be float32 [P], such as a correction of each parameter's gradient; may be read-only.

        Raises:
            MessageError: it has another shape or type.
        """
        self.check(parameters, np.empty(self.statistic_count, np.float32))
        return {entry.name: torch.tensor(piece).view(entry.shape) for entry, piece in self._pieces({"parameter": parameters})}

    def name_at(self, kind: TensorKind, position: int) -> str:
        """Names one value of a flat array for a message about it, e.g. `conv1.weight[3, 0, 2, 2]`.

        Args:
            kind: which array: `parameter` or `statistic`.
            position: in that array, from 0.

        Raises:
            IndexError: the array has no such position.
        """
        entries = self._of_kind(kind)
        ends = list(accumulate(entry.size for entry in entries))
        if not 0 <= position < self._size(kind):
            raise IndexError(f"{kind} {position}: expected 0 to {self._size(kind) - 1}")
        number = bisect_right(ends, position)
        entry = entries[number]
        index = np.unravel_index(position - (ends[number] - entry.size), entry.shape)
        return f"{entry.name}{[int(i) for i in index]}"

    def _require(self, model: nn.Module) -> None:
        other = ArraysLayout.of(model)
        if other.digest != self.digest:
            raise MessageError(
                f"model of layout {other.digest} where {self.digest} is expected: both sides need one model section"
            )

    def _of_kind(self, kind: TensorKind) -> list[TensorEntry]:
        return [entry for entry in self.entries if entry.kind == kind]

    def _size(self, kind: TensorKind) -> int:
        return sum(entry.size for entry in self._of_kind(kind))

    def _pieces(self, arrays: Mapping[TensorKind, np.ndarray]) -> Iterator[tuple[TensorEntry, np.ndarray]]:
        """Each entry with its part of the flat array of its kind, a view."""
        for kind, array in arrays.items():
            start = 0
            for entry in self._of_kind(kind):
                yield entry, array[start : start + entry.size]
                start += entry.size

    def _positions(self, kind: TensorKind, wanted: Callable[[TensorEntry], bool]) -> np.ndarray:
        chosen = [np.full(entry.size, wanted(entry)) for entry in self._of_kind(kind)]
        return np.flatnonzero(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
