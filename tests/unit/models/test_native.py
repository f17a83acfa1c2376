"""The native kernels against XLA and numpy, and every way in which they may not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash.host.device import DeviceError
from dflash.models import native
from dflash.models.layers import Linear, attend, most_likely, multiply
from dflash.models.native import build

STATUS = "from dflash.models import native; print(native.status())"


def _available() -> bool:
    return native.status().startswith("native kernels ")


def _status(**environment: str) -> subprocess.CompletedProcess[str]:
    """`native.status()` of a fresh process with one CPU device."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "DFLASH_NATIVE", "CXX")}
    command = [sys.executable, "-c", STATUS]
    full = {**clean, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, env=full, capture_output=True, text=True, timeout=600, check=False)


def _drawn(rows: int, size: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * 7919 + size * 31 + columns)
    return rng.standard_normal((rows, size), np.float32), rng.standard_normal((size, columns), np.float32)


def _refused() -> bool:
    """Whether there are no kernels here; then the refusal is what is tested: nothing is taken, the reason given."""
    if _available():
        return False
    assert native.status().startswith("XLA: ")
    assert not native.takes(2, jnp.ones((4, 4)))
    return True


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (7, 16), (13, 33), (96, 64), (250, 129), (613, 576)])
def test_product_is_numpys_for_any_shape(rows: int, size: int):
    if _refused():
        return
    for columns in (1, 2, 3, 5, 6, 7, 8, 13, 16, 31, 64):
        w, x = _drawn(rows, size, columns)
        exact = w.astype(np.float64) @ x.astype(np.float64)
        np.testing.assert_allclose(jax.jit(native.product)(w, x), exact, atol=2e-6 * size**0.5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (13, 33), (96, 64), (250, 129)])
@pytest.mark.parametrize(("matrices", "columns"), [(1, 5), (4, 1), (3, 70), (40, 9)])
def test_each_column_meets_the_matrix_that_it_names(matrices: int, columns: int, rows: int, size: int):
    if _refused():
        return
    rng = np.random.default_rng(rows * 7919 + size * 31 + columns)
    stack = rng.standard_normal((matrices, rows, size), np.float32)
    which = rng.integers(0, matrices, columns, np.int32)
    x = rng.standard_normal((size, columns), np.float32)
    ours = jax.jit(native.products_of)(stack, which, x)
    exact = np.stack([stack[e].astype(np.float64) @ x[:, n] for n, e in enumerate(which)], axis=1)
    np.testing.assert_allclose(ours, exact, atol=2e-6 * size**0.5, rtol=1e-5)
    alone = [native.products_of(stack, which[n : n + 1], x[:, n : n + 1]) for n in range(columns)]
    np.testing.assert_array_equal(ours, np.concatenate(alone, axis=1))
    unread = np.isin(np.arange(matrices), which, invert=True)
    stack[unread] = np.nan
    np.testing.assert_array_equal(native.products_of(stack, which, x), ours)


def test_a_matrix_that_is_not_there_is_the_nearest_as_in_xla():
    if _refused():
        return
    stack = np.arange(3, dtype=np.float32)[:, None, None]
    found = native.products_of(stack, np.array([-(2**31), -1, 3, 2**31 - 1], np.int32), np.ones((1, 4), np.float32))
    np.testing.assert_array_equal(found, [[0, 0, 2, 2]])


@pytest.mark.parametrize(("rows", "size"), [(13, 33), (613, 576)])
def test_a_column_is_the_same_to_the_bit_whatever_stands_beside_it(rows: int, size: int):
    if _refused():
        return
    w, x = _drawn(rows, size, 64)
    alone = np.concatenate([native.product(w, x[:, i : i + 1]) for i in range(64)], axis=1)
    for columns in (*range(1, 14), 16, 17, 31, 33, 64):
        np.testing.assert_array_equal(native.product(w, x[:, :columns]), alone[:, :columns])


def test_in_a_loop_and_a_donating_program():
    if _refused():
        return
    w, x = _drawn(48, 48, 3)
    w /= 10

    def steps(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, x: native.product(w, x) + 1, x)

    compiled = jax.jit(steps, donate_argnums=1).lower(w, jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()
    expected = x
    for _ in range(5):
        expected = w @ expected + 1
    np.testing.assert_allclose(compiled(w, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_derivatives_and_batches_are_those_of_a_product():
    if _refused():
        return
    w, x = _drawn(12, 20, 4)
    for argument in (0, 1):
        ours = jax.grad(lambda *a: (native.product(*a) ** 2).sum(), argument)(w, x)
        theirs = jax.grad(lambda *a: ((a[0] @ a[1]) ** 2).sum(), argument)(w, x)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    stack, which = np.stack([w, 2 * w, 3 * w]), np.array([2, 0, 2, 1], np.int32)
    for argument in (0, 2):
        ours = jax.grad(lambda *a: (native.products_of(*a) ** 2).sum(), argument)(stack, which, x)
        theirs = jax.grad(lambda s, e, x: (jnp.einsum("noi,in->on", s[e], x) ** 2).sum(), argument)(stack, which, x)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    stacked = np.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(native.product, (None, 0))(w, stacked), w @ stacked, rtol=1e-4, atol=1e-4)


SHAPES = [(3, 3, 64, 1, 8, 512), (2, 4, 16, 3, 5, 37), (1, 1, 24, 2, 1, 3), (3, 1, 80, 2, 9, 100), (2, 2, 7, 1, 3, 18)]


def _heads(G: int, R: int, D: int, B: int, T: int, S: int) -> tuple[jax.Array, ...]:
    """q, keys, values, visible and sinks; of every query's slots half are seen, and none of the last quarter."""
    rng = np.random.default_rng(S)
    shapes = (G, R, D, B, T), (B, G, D, S), (B, G, S, D), (G, R)
    q, keys, values, sinks = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)
    visible = rng.random((B, T, S)) < 0.5
    visible[:, :, 0], visible[:, :, S * 3 // 4 :] = True, False
    return 3 * q, keys, values, jnp.asarray(visible), sinks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_xlas(shape: tuple[int, ...], with_sinks: bool, monkeypatch: pytest.MonkeyPatch):
    q, keys, values, visible, sinks = _heads(*shape)
    arguments = (keys, values, visible, sinks if with_sinks else None)
    ours = attend(q, *arguments)
    slopes = jax.grad(lambda q: (attend(q, *arguments) ** 2).sum())(q)
    monkeypatch.setenv("DFLASH_NATIVE", "0")
    np.testing.assert_allclose(ours, attend(q, *arguments), atol=3e-6)
    np.testing.assert_allclose(slopes, jax.grad(lambda q: (attend(q, *arguments) ** 2).sum())(q), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_is_the_same_to_the_bit_whatever_stands_beside_it(shape: tuple[int, ...]):
    if _refused():
        return
    q, keys, values, visible, sinks = _heads(*shape)
    together = native.attention(q, keys, values, visible, sinks)
    for t in range(q.shape[4]):
        alone = native.attention(q[..., t : t + 1], keys, values, visible[:, t : t + 1], sinks)
        np.testing.assert_array_equal(together[..., t : t + 1], alone)


def test_attention_reads_nothing_that_no_query_sees():
    q, keys, values, visible, _ = _heads(2, 2, 16, 1, 2, 64)
    hidden = slice(48, None)
    spoilt = keys.at[..., hidden].set(jnp.nan), values.at[:, :, hidden].set(jnp.nan)
    if _refused():
        return
    expected = native.attention(q, keys, values, visible, None)
    np.testing.assert_array_equal(native.attention(q, *spoilt, visible, None), expected)


@pytest.mark.parametrize("entries", [1, 7, 199, 4096, 49152])
def test_most_likely_is_argmax_the_lowest_of_equals(entries: int):
    logits = np.random.default_rng(entries).integers(0, 9, (entries, 5)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(most_likely)(logits), logits.argmax(axis=0))


def test_kept_is_what_it_was_given():
    if _refused():
        return
    x = _drawn(1, 3, 4)[1]
    np.testing.assert_array_equal(jax.jit(native.kept)(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (native.kept(x) ** 2).sum())(x), 2 * x)


def test_xla_keeps_what_the_kernels_are_not_for(monkeypatch: pytest.MonkeyPatch):
    weight = jnp.ones((4, 8))
    assert not native.takes(native.MAX_COLUMNS + 1, weight)
    assert not native.takes(2, weight, jnp.ones((8, 2), jnp.bfloat16))
    assert native.takes(2, weight) == _available()
    monkeypatch.setenv("DFLASH_NATIVE", "0")
    assert not native.takes(2, weight)
    assert native.status() == "XLA: DFLASH_NATIVE=0"


def test_linear_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch):
    from flax import nnx

    layer = Linear(40, 24, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(_drawn(1, 40, 5)[1])
    auto = layer(x)
    monkeypatch.setenv("DFLASH_NATIVE", "0")
    np.testing.assert_allclose(auto, layer(x), rtol=1e-5, atol=1e-5)


def test_a_mode_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFLASH_NATIVE", "yes")
    with pytest.raises(DeviceError, match="auto, 0 or 1, got 'yes'"):
        native.status()


def test_without_a_compiler_the_status_says_so(tmp_path: Path):
    bare = {"PATH": str(tmp_path), "DFLASH_CACHE_DIR": str(tmp_path / "cache")}
    assert re.match(r"XLA: no C\+\+ compiler .*CXX", _status(**bare).stdout)
    insisting = _status(**bare, DFLASH_NATIVE="1")
    assert insisting.returncode == 1
    assert re.search(r"DFLASH_NATIVE=1, .*no C\+\+ compiler", insisting.stderr)


def test_a_compiler_that_fails_is_named(tmp_path: Path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'kernels.cc:1: error: out of ideas' >&2\nexit 3\n")
    broken.chmod(0o755)
    done = _status(CXX=str(broken), DFLASH_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout.startswith("XLA: ")
    assert "broken-c++ failed with exit code 3" in done.stdout
    assert "out of ideas" in done.stdout
    assert list((tmp_path / "cache").rglob("*.tmp")) == []


def test_the_kernels_are_for_one_cpu():
    assert native.status("tpu") == "XLA: the device is a tpu"
    assert native.status("cpu", devices=2).startswith("XLA: 2 CPU devices")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_a_program_has_the_kernels_of_the_platform_it_is_lowered_for(platform: str):
    if _refused():
        return
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 48), (48, 4)))
    text = jax.jit(multiply).trace(w, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("dflash_product" in text) == (platform == "cpu")
    assert ("dot_general" in text) == (platform != "cpu")


@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path: Path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DFLASH_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", STATUS]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (p.communicate(timeout=600)[0].strip() for p in both)
    assert first == second
    assert [p.returncode for p in both] == [0, 0]
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left == ([f"{first.rpartition(' ')[2]}.so"] if _available() else [])


def test_importing_compiles_nothing(tmp_path: Path):
    code = f"import dflash, dflash.models.layers, pathlib; print(list(pathlib.Path({str(tmp_path)!r}).iterdir()))"
    environment = {**os.environ, "DFLASH_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFLASH_CACHE_DIR", str(tmp_path))
    if _refused():
        return
    path = build.library()
    written = path.stat().st_mtime_ns
    assert build.library() == path
    assert path.stat().st_mtime_ns == written


def test_a_library_that_was_cut_short_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if _refused():
        return
    monkeypatch.setenv("DFLASH_CACHE_DIR", str(tmp_path))
    made = []

    def compile_badly(compiler: list[str], flags: list[str], path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x7fELF")
        made.append(path)

    monkeypatch.setattr(build, "_compile", compile_badly)
    assert build.library() == build.library()
    assert len(made) == 2
