"""EasyDeL 0.3.0 behind one door: whatever its import and its calls change in the process is restored.

Nothing else here imports EasyDeL. Its directories are read without it (`dflash.weights.easydel`).
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from dflash.config import UserError
from dflash.models.families import FAMILIES
from dflash.models.layers import precision
from dflash.models.llama import Llama
from dflash.weights.build import DTYPES, named_weights
from dflash.weights.config_json import read_target_config
from dflash.weights.easydel import HEAD, from_state, to_state
from dflash.weights.snapshot import read_json

VERSION = "0.3.0"
_ENVIRONMENT = {
    # Its settings for XLA, libtpu, NCCL and the recursion limit; starting a cluster; searching for fast kernels.
    "EASYDEL_AUTO": "0",
    "ENABLE_DISTRIBUTED_INIT": "0",
    "EJKERNEL_AUTOTUNE_POLICY": "heuristics",
    # Its compile cache: if a text is given, no directory is made.
    "COMPILE_FUNC_DIR": tempfile.gettempdir(),
    "HF_HUB_OFFLINE": "1",
    "LOGGING_LEVEL_ED": "WARNING",
}
# The modules used. They are imported together, inside `isolated`.
_MODULES = ("easydel", "easydel.layers.rotary", *(f"easydel.modules.{family}" for family in FAMILIES))


class EasyDelError(UserError, RuntimeError):
    """EasyDeL can't be used: what is missing or unsupported, and what to do."""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restores what EasyDeL changes: environment, recursion limit, jax's settings, logging, warnings.

    Its persistent compile cache would falsify every compile time measured later in the process.
    """
    environment, limit, hook = dict(os.environ), sys.getrecursionlimit(), sys.excepthook
    level, handlers = logging.root.level, list(logging.root.handlers)
    settings = dict(jax.config.values)
    os.environ.update(_ENVIRONMENT)
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.setrecursionlimit(limit)
        sys.excepthook = hook
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers
        for name, value in jax.config.values.items():
            if name in settings and settings[name] != value:
                jax.config.update(name, settings[name])
        # The first compilation fixes the directory until the cache is reset.
        compilation_cache.reset_cache()


def load(*more: str) -> ModuleType:
    """The package `easydel`, imported with `more` of its modules.

    Raises EasyDelError unless it is installed in the one known version.
    """
    try:
        installed = metadata.version("easydel")
    except metadata.PackageNotFoundError:
        raise EasyDelError(
            "EasyDeL is not installed: pip install 'dflash-bench[easydel]', into an environment of its own, since it "
            "holds jax at 0.9"
        ) from None
    if installed != VERSION:
        raise EasyDelError(
            f"EasyDeL must be {VERSION}, the version that was examined; got {installed}: install that one"
        )
    with isolated():
        try:
            modules = [import_module(name) for name in (*_MODULES, *more)]
            return modules[0]
        except ImportError as error:
            raise EasyDelError(f"EasyDeL can't be imported ({error}): pip install 'dflash-bench[easydel]'") from error


_AXES = ("dp", "fsdp", "ep", "tp", "sp")


def _settings(dtype: jnp.dtype) -> dict[str, Any]:
    """Its only attention that is right on a CPU (the others ignore sinks, or compute in bfloat16); one device."""
    names = ("attn_dtype", "kvdtype", "attn_softmax_dtype")
    attention = {"attn_mechanism": "vanilla", **dict.fromkeys(names[:2], dtype), names[2]: jnp.float32}
    # Without a mesh it makes one of all devices.
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1, 1, 1), _AXES)
    return attention | {"_hidden_mesh": mesh}


def load_model(directory: Path, dtype: str = "float32") -> Any:
    """EasyDeL's model of a Hugging Face snapshot, read by EasyDeL itself (with torch), on one device."""
    auto = load().AutoEasyDeLModelForCausalLM
    with isolated():
        return auto.from_pretrained(
            str(directory),
            from_torch=True,
            dtype=DTYPES[dtype],
            param_dtype=DTYPES[dtype],
            precision=precision(DTYPES[dtype]),
            # Its default converts every weight to float16 first.
            torch_load_mode="streaming",
            config_kwargs=_settings(DTYPES[dtype]),
            verbose=False,
        )


def to_target(model: Any, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """Our target with the weights of EasyDeL's model (Llama, Qwen or GPT-OSS); see `from_state` for what is shared.

    Drop the model before the target is used, and no weight is held twice. Raises ConfigError or WeightsError.
    """
    config = read_target_config(json.loads(model.config.to_json_string(use_diff=False)), "the model's config")
    # A tied head is a parameter without a value.
    arrays = {path.replace(".", "/"): value for path, value in named_weights(model).items() if value is not None}
    return from_state(config, arrays, dtype, mesh)


def from_target(target: Llama, directory: Path) -> Any:
    """EasyDeL's model with the weights of our target, on one device; `directory` has the target's config.json."""
    load()
    raw = read_json(Path(directory), "config.json")
    family, dtype = target.config.family, target.dtype
    module, name = sys.modules[f"easydel.modules.{family}"], FAMILIES[family].architecture
    with isolated():
        config = getattr(module, f"{name}Config")(**raw | _settings(dtype))
        kind = getattr(module, f"{name}ForCausalLM")
        model = kind.lazy_init(
            config=config, dtype=dtype, param_dtype=dtype, precision=precision(dtype), rngs=nnx.Rngs(0)
        )
        arrays = dict(to_state(target))
        graph, state = nnx.split(model)
        flat = []
        for path, variable in nnx.to_flat_state(state):
            empty, name = variable.get_value(), "/".join(map(str, path))
            # Anything else only counts random draws, of which there are none; a tied head has no weight, as when it
            # loads one.
            other = None if name == HEAD else jnp.zeros(empty.shape, empty.dtype)
            flat.append((path, variable.replace(arrays.pop(name, other))))
        assert not arrays, sorted(arrays)
        return nnx.merge(graph, nnx.from_flat_state(flat))
