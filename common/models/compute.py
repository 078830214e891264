"""Where and in which number type a model runs: device, precision, memory format, threads (`build_compute`), and what lies there of the
data (`HeldRows`).

`import_torchvision` is how this project imports torchvision: it works also beside a build of torch that torchvision's C extension does
not fit. Neither it nor an optimizer `without_compiler` imports torch's compiler (`torch._dynamo` with sympy and much else), which nothing
here uses: a second of processor time and 65 MB in each process.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from pneumofed.common.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

IMAGE_SHARE = 0.25
"""Of the memory that is free on a card, how much decoded images may take; the rest is for the network, its gradients and activations."""
_ROWS_AT_ONCE = 1024

_NMS_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MISSING_OPERATORS = (f"nms{_NMS_SIGNATURE}", f"qnms{_NMS_SIGNATURE}")
"""Schemas of `torchvision/csrc/ops/nms.cpp` and `ops/quantized/cpu/qnms_kernel.cpp`, which torchvision refers to."""

_libraries: list[torch.library.Library] = []

_COMPILER_UTILS = "torch._dynamo.utils"
_KEPT_FROM_COMPILER = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods of every optimizer that torch keeps out of compiled code, for which they import the compiler."""


@dataclass(frozen=True)
class Compute:
    """A resolved device and number type. `dtype` is None where everything is float32."""

    device: torch.device
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[object]:
        """Opens mixed precision in `dtype`; changes nothing where everything is float32."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    @property
    def needs_scaler(self) -> bool:
        """float16 has five exponent bits: small gradients vanish unless the loss is scaled (Micikevicius et al. 2018, section 3.2)."""
        return self.dtype is torch.float16

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves `model` to the device in channels_last, in which convolutions of these networks run faster."""
        of_volumes = any(parameter.ndim == 5 for parameter in model.parameters())
        return model.to(self.device, memory_format=channels_last(5 if of_volumes else 4))  # type: ignore[call-overload]

    def move(self, images: torch.Tensor) -> torch.Tensor:
        """Moves `images` [N, C, H, W], or volumes [N, C, D, H, W], to the device in channels_last."""
        return images.to(self.device, memory_format=channels_last(images.ndim), non_blocking=True)

    def suited_to(self, model: torch.nn.Module) -> Compute:
        """Returns how `model` is trained here: in float32 where it has three-dimensional convolutions and the device is a CPU.

        There the weight gradients of `Conv3d` in bfloat16 were not finite, drawn input and first weights given (torch 2.13, oneDNN, AMX).
        """
        in_volumes = any(isinstance(module, torch.nn.Conv3d) for module in model.modules())
        return replace(self, dtype=None) if in_volumes and self.device.type == "cpu" else self

    def room_bytes(self) -> int:
        """How many bytes of images may lie on the device: `IMAGE_SHARE` of what is free there, none on a CPU, whose memory they are in."""
        if self.device.type == "cpu" or not hasattr(torch.get_device_module(self.device), "mem_get_info"):
            return 0
        free, total = torch.get_device_module(self.device).mem_get_info(self.device)
        return int(IMAGE_SHARE * min(free, _card_share * total))


def channels_last(dimensions: int) -> torch.memory_format:
    """Returns the memory format with the channels last: of images, 4 dimensions, or of volumes, 5."""
    return torch.channels_last_3d if dimensions == 5 else torch.channels_last


class HeldRows:
    """The rows of an array, which are taken on the device: it lies there as a whole where there is room, else each lot is sent.

    Args:
        rows: [N, ...], may be mapped from disk and read-only; of images the uint8 pixels, a quarter of what their floats would be.
        compute: names the device.
    """

    def __init__(self, rows: np.ndarray, compute: Compute) -> None:
        self._rows, self._device = rows, compute.device
        self._held: torch.Tensor | None = None
        if rows.nbytes <= compute.room_bytes():
            parts = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
            self._held = torch.cat([torch.from_numpy(np.array(part)).to(self._device) for part in parts])

    @property
    def lies_on_device(self) -> bool:
        """Whether a lot is taken there without sending more than its positions."""
        return self._held is not None

    def take(self, index: np.ndarray) -> torch.Tensor:
        """Copies rows on the device.

        Args:
            index: int64 [B], positions in [0, N).
        """
        if self._held is None:
            return torch.from_numpy(self._rows[index]).to(self._device)
        return self._held.index_select(0, torch.from_numpy(index).to(self._device))


_card_share = 1.0


def share_card(share: float) -> None:
    """Sets which share of a card's memory this process may take, as one of several that train on the card at once.

    Without it each process takes what it finds, and the last one to start fails. Nothing changes on a CPU.

    Args:
        share: in (0, 1]; 1/N for N processes.
    """
    global _card_share
    _card_share = share


def build_compute(device: str, precision: Precision, threads: int = 0) -> Compute:
    """Resolves the device and number type that this machine can give.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        precision: `auto` takes bfloat16 where the hardware multiplies it, else float16 on CUDA and float32 on the CPU.
        threads: above 0 fixes torch's CPU threads for the process; 0 leaves them.

    Raises:
        ConfigError: the device or the precision is asked for by name and not there.
    """
    if threads:
        torch.set_num_threads(threads)
    resolved = _resolve_device(device)
    if resolved.type == "cuda" and _card_share < 1.0:
        torch.cuda.set_per_process_memory_fraction(_card_share, resolved)
    return Compute(resolved, _resolve_dtype(resolved, precision))


def import_torchvision() -> ModuleType:
    """Imports `torchvision`, with `torchvision.models` and `torchvision.transforms` usable.

    The wheel's C extension is built against the CUDA build of torch. Beside a CPU-only torch it cannot be loaded, and the import
    stops at `operator torchvision::nms does not exist`. Then the schemas of the missing operators are declared, without a kernel,
    and the import is made again: models and transforms need none of these operators. Where torchvision loads normally nothing
    is declared. After the first call a plain `import torchvision` by another library works too.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: its import fails for another reason than the missing operators.
    """
    with _compiler_left_out():
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error) or _libraries:
                raise
        _forget_torchvision()
        _declare_operators()
        return importlib.import_module("torchvision")


@cache
def without_compiler(optimizer: type[torch.optim.Optimizer]) -> type[Any]:
    """Makes the class of an optimizer whose every step is that of `optimizer` to the bit, and that imports no compiler.

    `Optimizer.step` and some of its other methods keep themselves out of what `torch.compile` makes faster, and import it to say so. What
    is made here is not to be compiled itself; the network may be.

    Args:
        optimizer: of `torch.optim`, not differentiable.
    """
    plain = {name: inspect.unwrap(getattr(optimizer, name)) for name in _KEPT_FROM_COMPILER}
    return type(optimizer.__name__, (optimizer,), {**plain, "step": torch.no_grad()(inspect.unwrap(optimizer.step))})


class _LaterUtils(ModuleType):
    """Stands for the compiler's module while torchvision is imported, which takes one function of it for later. Who asks for anything else
    has begun to import the compiler itself, and gets the real one."""

    def __init__(self) -> None:
        super().__init__(_COMPILER_UTILS)
        self.is_compile_supported = lambda device: importlib.import_module(_COMPILER_UTILS).is_compile_supported(device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as __file__, which `inspect` reads of every module
            raise AttributeError(name)
        if sys.modules.get(_COMPILER_UTILS) is self:
            del sys.modules[_COMPILER_UTILS]
        return getattr(importlib.import_module(_COMPILER_UTILS), name)


@contextmanager
def _compiler_left_out() -> Iterator[None]:
    later = _LaterUtils()
    if sys.modules.setdefault(_COMPILER_UTILS, later) is not later:
        yield
        return
    try:
        yield
    finally:
        if sys.modules.get(_COMPILER_UTILS) is later:
            del sys.modules[_COMPILER_UTILS]


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got '{name}'") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device '{name}' is not here: torch sees {torch.cuda.device_count()} CUDA devices; use device=auto or cpu"
        )
    return device


def _resolve_dtype(device: torch.device, precision: Precision) -> torch.dtype | None:
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp16":
        if device.type == "cpu":
            raise ConfigError("training.precision fp16 needs a CUDA device; use auto, fp32 or bf16 on a CPU")
        return torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else None


def _cpu_multiplies_bf16() -> bool:
    """Whether bfloat16 products run in the CPU's own instructions; emulated ones are slower than float32."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _MISSING_OPERATORS:
        library.define(schema)
    _libraries.append(library)  # the declarations end with the life of the object
