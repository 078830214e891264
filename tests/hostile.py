"""Damaged files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.types import Image


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """`data` with a few bytes changed or cut out, in one of five cases cut off somewhere."""
    mutated = bytearray(data)
    if generator.random() < 0.2:
        del mutated[generator.integers(1, len(mutated)) :]
    for _ in range(generator.integers(1, 8)):
        position = int(generator.integers(len(mutated)))
        if generator.random() < 0.25 and len(mutated) > 1:
            del mutated[position]
        else:
            mutated[position] = generator.integers(256)
    return bytes(mutated)


def read_or_reason(path: Path) -> Image | SkipReason:
    """The image in `path`, or the reason why there is none; any exception but `ImageError` passes."""
    try:
        return read_image(path)
    except ImageError as error:
        return error.reason
