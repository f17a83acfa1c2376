"""Our own CPU kernels for a few tokens in float32, compiled at first use by the user's C++ compiler.

XLA multiplies a weight by one column at memory speed, but is slower from two columns on, which are the products that
verify a block. It also copies whole key/value caches in a 1-token step, and every matrix that it takes out of a stack.
These kernels read weights and caches once for any number of tokens, and sum every output in the same order for any
number.

`DFLASH_NATIVE` says whether they are used: `auto` (the default: if they can be built), `1` (fail if they can't), `0`
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

from dflash.host.device import DeviceError
from dflash.models.mesh import is_split
from dflash.models.native.build import BuildError, library

MAX_COLUMNS = 64
_NOT_SPLIT = "the kernels are for programs that run whole on one"
_lock = threading.Lock()


def status(platform: str = "cpu", devices: int = 1) -> str:
    """What computes float32 steps of a few tokens on this many devices, and why. Builds the kernels if needed."""
    if platform != "cpu":
        return f"XLA: the device is a {platform}"
    if devices > 1:
        return f"XLA: {devices} CPU devices ({_NOT_SPLIT})"
    refusal = _refusal()
    if refusal:
        return f"XLA: {refusal}"
    return f"native kernels {_build()}"


def takes(columns: int, *arrays: Array) -> bool:
    """Whether the kernels suit this many tokens and these operands. Asked while a program is traced, not later.

    Whether they are then used is up to `on_cpu`: the program may be lowered for another platform.
    """
    if not 1 <= columns <= MAX_COLUMNS or is_split():
        return False
    return all(a.dtype == jnp.float32 for a in arrays) and _refusal() is None


def on_cpu(kernel: Callable[..., Array], otherwise: Callable[..., Array]) -> Callable[..., Array]:
    """The kernel in a program that is lowered for a CPU, `otherwise` in one for anything else, wherever that is done.

    Both take arrays, or None, and give the same array.
    """

    def choose(*arrays: Array | None) -> Array:
        return jax.lax.platform_dependent(*arrays, cpu=kernel, default=otherwise)

    return choose


def differentiable_as(reference: Callable[..., Array]) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """A kernel whose derivatives are those of `reference`, the same function in XLA's terms."""

    def wrap(kernel: Callable[..., Array]) -> Callable[..., Array]:
        wrapped = jax.custom_jvp(kernel)
        wrapped.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
        return wrapped

    return wrap


@differentiable_as(lambda x: x)
def kept(x: Array) -> Array:
    """x float32, computed once: XLA would fuse a cheap expression into each of its uses and compute it every time."""
    return jax.ffi.ffi_call(_target("dflash_kept"), jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")(x)


@differentiable_as(lambda weight, x: jnp.matmul(weight, x, precision=jax.lax.Precision.HIGHEST))
def product(weight: Array, x: Array) -> Array:
    """weight float32 [out, in] times x float32 [in, N] -> [out, N]."""
    # Columns of x and of the result are contiguous, so that the kernel's vectors run along a column. XLA gives the
    # neighbouring operations the same layout and copies nothing.
    return jax.ffi.ffi_call(
        _target("dflash_product"),
        jax.ShapeDtypeStruct((weight.shape[0], x.shape[1]), x.dtype),
        input_layouts=[(0, 1), (1, 0)],
        output_layouts=(1, 0),
        vmap_method="sequential",
    )(weight, x)


@differentiable_as(
    lambda stack, which, x: jnp.einsum("noi,in->on", stack[which], x, precision=jax.lax.Precision.HIGHEST)
)
def products_of(stack: Array, which: Array, x: Array) -> Array:
    """Column n of x float32 [in, N] times matrix `which[n]`, int32 [N], of stack float32 [E, out, in] -> [out, N].

    Only matrices that a column names are read, and each of them once.
    """
    return jax.ffi.ffi_call(
        _target("dflash_products_of"),
        jax.ShapeDtypeStruct((stack.shape[1], x.shape[1]), x.dtype),
        input_layouts=[None, None, (1, 0)],
        output_layouts=(1, 0),
        vmap_method="sequential",
    )(stack, which, x)


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
    """Why the kernels are not used; None if they are. Raises if the user requires them."""
    mode = os.environ.get("DFLASH_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise DeviceError(f"DFLASH_NATIVE must be auto, 0 or 1, got {mode[:40]!r}: correct it")
    if mode == "0":
        return "DFLASH_NATIVE=0"
    try:
        _build()
    except BuildError as error:
        if mode == "1":
            raise DeviceError(f"DFLASH_NATIVE=1, but there are no native kernels: {error}") from None
        return str(error)
    return None


@functools.cache
def _registered() -> str | BuildError:
    """The suffix under which XLA knows the kernels, or why there are none; determined once per process."""
    try:
        path = library()
        kernels = ctypes.CDLL(str(path))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the compiled kernels could not be loaded: {error}")
    for name in ("dflash_product", "dflash_products_of", "dflash_attention", "dflash_kept"):
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
