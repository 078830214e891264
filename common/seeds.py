"""Randomness as a pure function of what it is for: (seed, round, site, purpose) -> generator.

A resumed run draws as an unbroken one, since no generator's state outlives a round.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A number in [0, 2**63) that depends on every part, with types and order told apart."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(*parts))


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator; random parameters are drawn on the CPU so that every device draws the same."""
    import torch  # who only names seeds must not wait for it

    return torch.Generator().manual_seed(derive_seed(*parts))
