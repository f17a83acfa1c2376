"""MXFP4 experts (OCP Microscaling Formats v1.0): read part by part, and held in float8_e5m2 where that is exact.

32 values of an output row share a scale, a power of two; each value has four bits, two values lie in a byte.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 32
# Its 16 values, the sign bit highest (table 5).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BIAS = 127
# A block's scale, as an exponent of two, with which float8_e5m2 holds all its values as normal numbers.
_LOWEST, _HIGHEST = -13, 13
# Output rows that are unpacked at once: what they need fits a core's cache.
_ROWS = 128


def dequantise_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., N, 16] (two values a byte, low nibble first), scales uint8 [..., N] -> float32 [..., N * 32].

    Exact: value = e2m1 * 2**(scale - 127) has two significant bits. Scale 255 is NaN in the format.
    """
    pairs = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    values = np.ldexp(pairs, scales.astype(np.int32)[..., None] - _BIAS)
    values[scales == 255] = np.nan
    return values.reshape(*blocks.shape[:-2], -1)


def narrow_mxfp4(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., N, 16], exponents int [..., N] of their scales, -13 to 13 -> float8_e5m2 [..., N * 32], exact.

    Two values at once, in the halves of 16 bits: e5m2 of a nibble c times 2**s is 2c + 4s + 56 for 1 and more, 4s + 56
    for a half, and 0 for 0; blocks of zeros may have any exponent.
    """
    wide = blocks.astype(np.uint16)
    pair = (wide | wide << 4) & 0x0F0F
    sign, code = (pair & 0x0808) << 4, pair & 0x0707
    above_half = ((code >> 1) | (code >> 2)) & 0x0101
    no_zero = (above_half | (code & 0x0101)) * 0xFF
    exponent = ((4 * exponents + 56) & 0xFF).astype(np.uint16) * 0x0101
    bits = ((code & (above_half * 0xFF)) << 1) + (no_zero & exponent[..., None]) | sign
    return bits.astype("<u2").view(ml_dtypes.float8_e5m2).reshape(*blocks.shape[:-2], -1)


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """One weight of all experts [E, outputs, inputs] in two tensors of a file, `name`_blocks and `name`_scales.

    `halves`: the file has rows of gate and up in turn, the weight all gates and then all ups.
    """

    name: str
    shape: tuple[int, int, int]
    halves: bool = False
    kinds = ("U8",)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        E, outputs, inputs = self.shape
        scales = (E, outputs, inputs // BLOCK)
        return {f"{self.name}_blocks": (*scales, BLOCK // 2), f"{self.name}_scales": scales}

    @property
    def _file_rows(self) -> np.ndarray:
        """Where the weight's rows are in the file, int [outputs]."""
        rows = np.arange(self.shape[1])
        return rows.reshape(-1, 2).T.reshape(-1) if self.halves else rows

    def factors(self, read: Callable[..., np.ndarray]) -> np.ndarray | None:
        """Exponents of each row's factor, a power of two, int [E, outputs]: float8_e5m2 holds all values without it.

        None where a row has no such factor. Blocks of zeros don't count.
        """
        exponents = read(f"{self.name}_scales").astype(np.int16) - _BIAS
        lowest, highest = exponents, exponents
        if exponents.min() < _LOWEST or exponents.max() > _HIGHEST:
            empty = ~(read(f"{self.name}_blocks") & 0x77).any(axis=-1)
            lowest, highest = np.where(empty, 255, exponents), np.where(empty, -255, exponents)
        low, high = lowest.min(axis=-1), highest.max(axis=-1)
        if (high - low).max() > _HIGHEST - _LOWEST or high.max() > 254 - _BIAS:
            return None
        factors = np.maximum(high - _HIGHEST, 0) + np.minimum(np.where(low == 255, 0, low) - _LOWEST, 0)
        return factors[:, self._file_rows]

    def part(
        self, read: Callable[..., np.ndarray], entries: tuple[Any, ...], *, kind: Any, factors: np.ndarray | None
    ) -> np.ndarray:
        """The entries [E, some outputs, some inputs] in `kind`; no more of the file is read than holds them.

        With `factors` in float8_e5m2, each row divided by its own. Several threads, some rows at a time.
        """
        experts, rows, inputs = (np.arange(size)[some] for size, some in zip(self.shape, entries, strict=True))
        file_rows = self._file_rows[rows]
        first, first_block = file_rows.min(), inputs[0] // BLOCK
        index = (slice(first, file_rows.max() + 1), slice(first_block, inputs[-1] // BLOCK + 1))
        kept = inputs - BLOCK * first_block
        out = np.empty((len(experts), len(rows), len(inputs)), ml_dtypes.float8_e5m2 if factors is not None else kind)

        def of_expert(e: int) -> None:
            blocks, scales = (read(f"{self.name}_{n}", (int(experts[e]), *index)) for n in ("blocks", "scales"))
            for start in range(0, len(rows), _ROWS):
                some = slice(start, start + _ROWS)
                places = file_rows[some] - first
                if factors is None:
                    values = dequantise_mxfp4(blocks[places], scales[places])
                else:
                    shift = factors[experts[e], rows[some]] + _BIAS
                    values = narrow_mxfp4(blocks[places], scales[places].astype(np.int16) - shift[:, None])
                out[e, some] = values[:, kept[0] : kept[-1] + 1]

        with ThreadPoolExecutor() as pool:
            list(pool.map(of_expert, range(len(experts))))
        return out


def factors_of(plan: Mapping[str, Any], read: Callable[..., np.ndarray]) -> dict[str, np.ndarray] | None:
    """Factors of the rows of every MXFP4 weight of a plan, by its path; None for a plan without any.

    None, with a warning, where one does not fit float8_e5m2.
    """
    by_path: dict[str, np.ndarray] = {}
    for path, source in plan.items():
        if isinstance(source, Packed):
            factors = source.factors(read)
            if factors is None:
                warnings.warn(
                    f"{source.name} holds values too far apart for float8_e5m2: all experts are held in bfloat16, "
                    "in twice the memory",
                    stacklevel=2,
                )
                return None
            by_path[path] = factors
    return by_path or None
