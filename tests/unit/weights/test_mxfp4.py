"""MXFP4: against its definition, exact in eight bits or refused, and each device with its part of the file."""

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dflash.weights.load import load_target
from dflash.weights.mxfp4 import Packed, dequantise_mxfp4, narrow_mxfp4
from dflash.weights.tiny import write_tiny_target

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.tuples(st.integers(0, 252), st.integers(0, 252)))
def test_mxfp4_is_its_definition(data: bytes, scales: tuple[int, int]) -> None:
    """Two values a byte, the low nibble first, sign in the nibble's highest bit, times 2**(scale - 127)."""
    blocks = np.frombuffer(data, np.uint8).reshape(2, 16)
    got = dequantise_mxfp4(blocks, np.array(scales, np.uint8))
    expected = []
    for block, scale in zip(blocks.tolist(), scales, strict=True):
        for byte in block:
            for nibble in (byte % 16, byte // 16):
                sign = -1.0 if nibble >= 8 else 1.0
                expected.append(sign * E2M1[nibble % 8] * 2.0 ** (scale - 127))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(expected, np.float64).astype(np.float32))


def test_mxfp4_scale_255_is_nan() -> None:
    assert np.isnan(dequantise_mxfp4(np.zeros((1, 16), np.uint8), np.array([255], np.uint8))).all()


@pytest.mark.parametrize("exponent", range(-13, 14))
def test_every_value_is_the_same_in_eight_bits(exponent: int) -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    narrow = narrow_mxfp4(blocks, np.full(16, exponent, np.int16))
    wide = dequantise_mxfp4(blocks, np.full(16, exponent + 127, np.uint8))
    np.testing.assert_array_equal(narrow.astype(np.float32), wide)
    np.testing.assert_array_equal(np.signbit(narrow.astype(np.float32)), np.signbit(wide))


def packed(blocks: np.ndarray, scales: np.ndarray, halves: bool = False):
    """A weight of these tensors, and a reader that says how many bytes each call took."""
    E, outputs, N = scales.shape
    taken: list[int] = []

    def read(name: str, index=None) -> np.ndarray:
        found = {"w_blocks": blocks, "w_scales": scales}[name][() if index is None else index]
        taken.append(found.nbytes)
        return found

    return Packed("w", (E, outputs, 32 * N), halves), read, taken


def drawn(low: int, high: int, shape: tuple[int, int, int] = (2, 6, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scales = rng.integers(low, high, (shape[0], shape[1], 1)) + rng.integers(0, 20, shape)
    return rng.integers(0, 256, (*shape, 16), dtype=np.uint8), scales.astype(np.uint8)


@pytest.mark.parametrize(("low", "high"), [(118, 119), (60, 200), (2, 3)])
def test_rows_and_their_factors_are_the_values(low: int, high: int) -> None:
    """Where scales lie elsewhere than e5m2's exponents a row's factor brings them there."""
    blocks, scales = drawn(low, high)
    weight, read, _ = packed(blocks, scales, halves=True)
    factors = weight.factors(read)
    assert factors is not None
    assert (factors == 0).all() == (low == 118)
    held = weight.part(read, (slice(None),) * 3, kind=None, factors=factors)
    assert held.dtype == jnp.float8_e5m2
    wide = dequantise_mxfp4(blocks, scales)
    wide = np.concatenate([wide[:, ::2], wide[:, 1::2]], axis=1)
    np.testing.assert_array_equal(held.astype(np.float64) * np.exp2(factors)[:, :, None], wide)
    np.testing.assert_array_equal(weight.part(read, (slice(None),) * 3, kind=np.float32, factors=None), wide)


def test_values_too_far_apart_in_a_row_do_not_fit_and_blocks_of_zeros_do_not_count() -> None:
    blocks, scales = drawn(118, 119)
    scales[1, 2, :] = 90, 117, 117
    assert packed(blocks, scales)[0].factors(packed(blocks, scales)[1]) is None
    blocks[1, 2, 0] = 0x80  # zero and minus zero
    weight, read, _ = packed(blocks, scales)
    factors = weight.factors(read)
    assert factors is not None
    held = weight.part(read, (slice(None),) * 3, kind=None, factors=factors)
    np.testing.assert_array_equal(
        held.astype(np.float32) * np.exp2(factors)[:, :, None], dequantise_mxfp4(blocks, scales)
    )


def test_a_part_reads_no_more_of_the_file_than_holds_it() -> None:
    blocks, scales = drawn(118, 119, (2, 8, 8))
    weight, read, taken = packed(blocks, scales, halves=True)
    rows = np.array([1, 2, 5, 6])  # of each half the middle
    part = weight.part(read, (slice(None), rows, slice(40, 90)), kind=np.float32, factors=None)
    whole = weight.part(read, (slice(None),) * 3, kind=np.float32, factors=None)
    np.testing.assert_array_equal(part, whole[:, rows, 40:90])
    assert sum(taken[:4]) == 2 * 4 * 2 * 17  # experts, file rows, blocks with their scales


def snapshot(directory: Path, far: bool) -> Path:
    write_tiny_target(directory, "gpt_oss", mxfp4=True, hidden_size=64, intermediate_size=64)
    if far:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.experts.down_proj_scales"][0, 0] = 90, 120
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_bfloat16_target_holds_its_experts_in_eight_bits(tmp_path: Path) -> None:
    directory = snapshot(tmp_path / "t", far=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target, exact = load_target(directory, "bfloat16"), load_target(directory)
    for ours, theirs in zip(target.layers, exact.layers, strict=True):
        for name in ("gate_up", "down"):
            held, factor = getattr(ours.mlp, name)[...], getattr(ours.mlp, f"{name}_scale")[...]
            assert held.dtype == jnp.float8_e5m2
            assert getattr(theirs.mlp, name).dtype == jnp.float32
            np.testing.assert_array_equal(
                held.astype(jnp.float32) * factor.astype(jnp.float32)[:, :, None], getattr(theirs.mlp, name)[...]
            )


def test_what_does_not_fit_stays_bfloat16_and_is_said(tmp_path: Path) -> None:
    directory = snapshot(tmp_path / "t", far=True)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.mlp\.experts\.down_proj.*bfloat16"):
        target = load_target(directory, "bfloat16")
    assert {target.layers[i].mlp.down.dtype for i in range(4)} == {jnp.dtype(jnp.bfloat16)}
    assert target.layers[0].mlp.down_scale is None
