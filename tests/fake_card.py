"""A card that is not there: tensors that say they lie on another device, and refuse to meet those of the CPU.

    with FakeCard() as card:
        tensor.to(card.device)

Each tensor of the card wraps one of the CPU, which does the arithmetic; so results are those of the CPU, bit for bit. An operation on
tensors of both devices raises, as CUDA's do. Allowed are what CUDA allows: copies between devices, numbers (0-dimensional tensors of the
CPU), and, as an index, tensors of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "card"
DEVICE = torch.device("privateuseone", 0)
COPIES = {"aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_"}


class CardTensor(torch.Tensor):
    """A tensor of the card; `inner` is the one of the CPU that it wraps."""

    inner: torch.Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CardTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class CardModule(_DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """No generator of its own."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 1 << 30, 1 << 30


class FakeCard(TorchDispatchMode):
    """Within it the device is there. `sent` counts the bytes of each copy from the CPU to the card by number type, `read` those back."""

    device = DEVICE

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[torch.dtype, int]] = []
        self.read: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)), None)
        if func._schema.name in ("aten::_to_copy", "aten::to") and device is not None:
            to_card = device.type == DEVICE.type
            if to_card and not isinstance(args[0], CardTensor):
                self.sent.append((args[0].dtype, args[0].nbytes))
            elif not to_card and isinstance(args[0], CardTensor):
                self.read.append(args[0].inner.nbytes)
        if func._schema.name == "aten::_local_scalar_dense" and isinstance(args[0], CardTensor):
            self.read.append(args[0].inner.nbytes)
        return run(func, args, kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Does on the CPU what is asked of the card.

    Raises:
        RuntimeError: tensors of both devices meet.
    """
    name, given = func._schema.name, [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    cards = [value for value in given if isinstance(value, CardTensor)]
    if cards and name not in COPIES:
        foreign = [value for value in given if not isinstance(value, CardTensor) and value.dim() > 0]
        if foreign:
            raise RuntimeError(f"{name}: expected all tensors on the card, got one of the CPU {list(foreign[0].shape)}")
    wanted = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)), None)
    on_card = wanted.type == DEVICE.type if wanted is not None else bool(cards)
    if name == "aten::copy_":
        on_card = isinstance(args[0], CardTensor)
    if name == "aten::_pin_memory":
        raise RuntimeError("memory is pinned")
    inner_args, inner_kwargs = tree_map(_on_cpu, (args, kwargs))
    wrappers = {id(value.inner): value for value in cards}
    result = func(*inner_args, **inner_kwargs)
    if name == "aten::_local_scalar_dense":
        return result
    return tree_map(lambda value: _wrap(value, wrappers) if on_card else value, result)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, CardTensor) else value


def _wrap(value: Any, known: dict[int, CardTensor]) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, CardTensor):
        return value
    return known[id(value)] if id(value) in known else CardTensor(value)


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=CardModule())  # before the first backward pass of the process
