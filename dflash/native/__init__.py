"""Our own CPU kernel for thin matrix products, compiled at first use by the user's C++ compiler.

XLA multiplies a weight by one column at the speed of the memory; from two columns on it is slower than that, and it
is just those products that verify a block. `kernels.cc` reads the weight once whatever the number of columns, and sums
every output in the same order whatever the number of columns.

`DFLASH_NATIVE` says whether it is used: `auto` (the default: where it can be built), `1` (fail where it can't), `0`
(never). `status` says what is used, and why.
"""

import ctypes
import functools
import os
import threading

import jax
import jax.numpy as jnp
from jax import Array

from dflash.native.build import BuildError, library

MAX_COLUMNS = 64
_lock = threading.Lock()


def status() -> str:
    """What multiplies thin float32 products in this process, and why. Builds the kernel if that is still to do."""
    refusal = _refusal()
    if refusal:
        return f"XLA: {refusal}"
    return f"native kernel {_target()}"


def takes(weight: Array, x: Array) -> bool:
    """Whether `product` is for weight [out, in] and x [in, N]. Asked while a program is traced, not while it runs."""
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        return False
    return weight.dtype == x.dtype == jnp.float32 and _refusal() is None


@jax.custom_jvp
def product(weight: Array, x: Array) -> Array:
    """weight float32 [out, in] times x float32 [in, N] -> [out, N]. Derivatives are XLA's."""
    # Columns of x and of the result lie one after the other, so that the kernel's vectors run along a column. XLA
    # gives its neighbours that layout too, and copies nothing.
    call = jax.ffi.ffi_call(
        _target(),
        jax.ShapeDtypeStruct((weight.shape[0], x.shape[1]), x.dtype),
        input_layouts=[(0, 1), (1, 0)],
        output_layouts=(1, 0),
        vmap_method="sequential",
    )
    return call(weight, x)


@product.defjvp
def _product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    (weight, x), (d_weight, d_x) = primals, tangents
    return exact(weight, x), exact(d_weight, x) + exact(weight, d_x)


def _refusal() -> str | None:
    """Why the kernel is not used, None if it is. An error instead where the user insists on it."""
    mode = os.environ.get("DFLASH_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"DFLASH_NATIVE is auto, 0 or 1, and is {mode!r}")
    if mode == "0":
        return "DFLASH_NATIVE=0"
    if jax.default_backend() != "cpu":
        return f"the device is a {jax.default_backend()}"
    if jax.device_count() > 1:
        return f"{jax.device_count()} CPU devices (the kernel does not know how to multiply a sharded weight)"
    try:
        _target()
    except BuildError as error:
        if mode == "1":
            raise RuntimeError(f"DFLASH_NATIVE=1, but there is no native kernel: {error}") from error
        return str(error)
    return None


@functools.cache
def _outcome() -> str | BuildError:
    """The name under which XLA knows the kernel, or why there is none; found out once per process."""
    try:
        path = library()
        kernel = ctypes.CDLL(str(path)).dflash_product
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the compiled kernel could not be loaded: {error}")
    name = f"dflash_product_{path.stem}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(kernel), platform="cpu")
    return name


def _target() -> str:
    with _lock:
        outcome = _outcome()
    if isinstance(outcome, BuildError):
        raise outcome
    return outcome
