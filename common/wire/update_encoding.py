"""The encoding of an update on the wire: float32 weights, or the difference from the round's global weights in 16 or 8 bits.

The difference, since it is small and centred: 16 bits of a weight of size 1 step by 5e-4, more than many a round moves it, while 16
bits of the difference step by a thousandth of it. Normalisation statistics stay float32: they are a thousandth of the bytes, and a
running variance may be of any size.

    float32   {parameters float32 [P]}                               44.7 MB for ResNet18
    float16   {difference float16 [P]}                               22.3 MB; values beyond +-65504 are refused
    int8      {difference int8 [P], scales float32 [ceil(P / 1024)]}  11.2 MB

The 8-bit code divides each block of 1,024 values by its scale (largest magnitude / 127) and rounds stochastically, so that its
expectation is the value itself and rounding errors of many sites cancel instead of adding up (Alistarh et al. 2017, QSGD, section 3.1).
"""

from __future__ import annotations

import numpy as np

from pneumofed.common.config.experiment import UpdatePrecision
from pneumofed.common.errors import MessageError

PARAMETERS, DIFFERENCE, SCALES = "parameters", "difference", "scales"
BLOCK = 1024
"""Values that share a scale: 0.4 % more bytes, and one outlier spoils no more than these."""
LEVELS = 127


def encode_parameters(
    parameters: np.ndarray, base: np.ndarray, precision: UpdatePrecision, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Encodes parameters for a receiver that has `base`.

    Args:
        parameters: float32 [P].
        base: float32 [P], the round's global parameters.
        precision: number type on the wire.
        generator: of the stochastic rounding of `int8`; is moved on there only.

    Returns:
        The arrays that travel, by name, as the table above has them.

    Raises:
        MessageError: a difference is not finite, or too large for float16.
    """
    if precision == "float32":
        return {PARAMETERS: parameters}
    difference = parameters - base
    if not np.isfinite(difference).all():
        raise MessageError("the update holds values that are not finite")
    if precision == "float16":
        return {DIFFERENCE: _to_float16(difference)}
    codes, scales = _quantise(difference, generator)
    return {DIFFERENCE: codes, SCALES: scales}


def decode_parameters(arrays: dict[str, np.ndarray], base: np.ndarray, precision: UpdatePrecision) -> np.ndarray:
    """Decodes what `encode_parameters` made, up to rounding.

    Args:
        arrays: as they travelled, by name.
        base: float32 [P], the round's global parameters.
        precision: number type on the wire.

    Returns:
        float32 [P].

    Raises:
        MessageError: other names, number types or sizes than the precision has.
    """
    expected = _expected_form(len(base), precision)
    found = {name: (str(values.dtype), values.shape) for name, values in arrays.items()}
    if found != expected:
        raise MessageError(f"expected arrays {_describe_form(expected)}, got {_describe_form(found)}")
    if precision == "float32":
        return arrays[PARAMETERS]
    if precision == "float16":
        return base + arrays[DIFFERENCE].astype(np.float32)
    return base + _dequantise(arrays[DIFFERENCE], arrays[SCALES])


def _expected_form(count: int, precision: UpdatePrecision) -> dict[str, tuple[str, tuple[int, ...]]]:
    if precision == "float32":
        return {PARAMETERS: ("float32", (count,))}
    if precision == "float16":
        return {DIFFERENCE: ("float16", (count,))}
    return {DIFFERENCE: ("int8", (count,)), SCALES: ("float32", (-(-count // BLOCK),))}


def _describe_form(form: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {kind} {list(shape)}" for name, (kind, shape) in sorted(form.items())[:4])


def _to_float16(difference: np.ndarray) -> np.ndarray:
    largest = np.finfo(np.float16).max
    if np.abs(difference).max(initial=0.0) > largest:
        raise MessageError(f"the update moves a weight by more than {largest:g}, which float16 cannot hold")
    return difference.astype(np.float16)


def _quantise(difference: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    blocks = _in_blocks(difference)
    scales = (np.abs(blocks).max(axis=1) / LEVELS).astype(np.float32)
    steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    noise = generator.random(blocks.shape, dtype=np.float32)
    codes = np.clip(np.floor(steps + noise), -LEVELS, LEVELS).astype(np.int8)
    return codes.reshape(-1)[: len(difference)], scales


def _dequantise(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    values = _in_blocks(codes).astype(np.float32) * scales[:, None]
    return values.reshape(-1)[: len(codes)]


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """[ceil(N / BLOCK), BLOCK]; the last block is filled up with zeros."""
    padded = np.zeros(-(-len(values) // BLOCK) * BLOCK, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, BLOCK)
