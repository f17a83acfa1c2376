"""Our own CPU kernels for a few tokens in float32, compiled at first use by the user's C++ compiler.

XLA multiplies a weight by one column at the speed of the memory; from two columns on it is slower than that, and it
is just those products that verify a block. And it copies whole key/value caches in a 1-token step. The kernels read
weights and caches once whatever the number of tokens, and sum every output in one order whatever that number.

`DFLASH_NATIVE` says whether it is used: `auto` (the default: where it can be built), `1` (fail where it can't), `0`
(never). `status` says what is used, and why.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from dflash.native.build import BuildError, library

MAX_COLUMNS = 64
_lock = threading.Lock()


def status() -> str:
    """What computes float32 steps of a few tokens in this process, and why. Builds the kernels if still to do."""
    refusal = _refusal()
    if refusal:
        return f"XLA: {refusal}"
    return f"native kernels {_build()}"


def takes(columns: int, *arrays: Array) -> bool:
    """Whether the kernels are for so many tokens and these operands. Asked while a program is traced, not later."""
    if not 1 <= columns <= MAX_COLUMNS:
        return False
    return all(a.dtype == jnp.float32 for a in arrays) and _refusal() is None


def differentiable_as(reference: Callable[..., Array]) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """A kernel whose derivatives are those of `reference`, the same function in XLA's terms."""

    def wrap(kernel: Callable[..., Array]) -> Callable[..., Array]:
        wrapped = jax.custom_jvp(kernel)
        wrapped.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
        return wrapped

    return wrap


@differentiable_as(lambda x: x)
def kept(x: Array) -> Array:
    """x float32, computed once: XLA fuses what is cheap to describe into every use of it, and computes it each time."""
    return jax.ffi.ffi_call(_target("dflash_kept"), jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")(x)


@differentiable_as(lambda weight, x: jnp.matmul(weight, x, precision=jax.lax.Precision.HIGHEST))
def product(weight: Array, x: Array) -> Array:
    """weight float32 [out, in] times x float32 [in, N] -> [out, N]."""
    # Columns of x and of the result lie one after the other, so that the kernel's vectors run along a column. XLA
    # gives its neighbours that layout too, and copies nothing.
    return jax.ffi.ffi_call(
        _target("dflash_product"),
        jax.ShapeDtypeStruct((weight.shape[0], x.shape[1]), x.dtype),
        input_layouts=[(0, 1), (1, 0)],
        output_layouts=(1, 0),
        vmap_method="sequential",
    )(weight, x)


def attention(q: Array, keys: Array, values: Array, visible: Array, sinks: Array | None) -> Array:
    """`dflash.models.layers.attend` in float32: q [G, R, D, B, T], keys [B, G, D, S], ... -> [G, R, D, B, T]."""
    if sinks is None:
        sinks = jnp.full(q.shape[:2], -jnp.inf, q.dtype)
    by_token = (3, 4, 0, 1, 2)
    return jax.ffi.ffi_call(
        _target("dflash_attention"),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_layouts=[by_token, None, None, None, None],
        output_layouts=by_token,
        vmap_method="sequential",
    )(q, keys, values, visible, sinks)


def _refusal() -> str | None:
    """Why the kernels are not used, None if they are. An error instead where the user insists on it."""
    mode = os.environ.get("DFLASH_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"DFLASH_NATIVE is auto, 0 or 1, and is {mode!r}")
    if mode == "0":
        return "DFLASH_NATIVE=0"
    if jax.default_backend() != "cpu":
        return f"the device is a {jax.default_backend()}"
    if jax.device_count() > 1:
        return f"{jax.device_count()} CPU devices (the kernels know nothing of sharded arrays)"
    try:
        _build()
    except BuildError as error:
        if mode == "1":
            raise RuntimeError(f"DFLASH_NATIVE=1, but there are no native kernels: {error}") from error
        return str(error)
    return None


@functools.cache
def _registered() -> str | BuildError:
    """The suffix under which XLA knows the kernels, or why there are none; found out once per process."""
    try:
        path = library()
        kernels = ctypes.CDLL(str(path))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the compiled kernels could not be loaded: {error}")
    for name in ("dflash_product", "dflash_attention", "dflash_kept"):
        jax.ffi.register_ffi_target(f"{name}_{path.stem}", jax.ffi.pycapsule(getattr(kernels, name)), platform="cpu")
    return path.stem


def _build() -> str:
    with _lock:
        outcome = _registered()
    if isinstance(outcome, BuildError):
        raise outcome
    return outcome


def _target(name: str) -> str:
    return f"{name}_{_build()}"
