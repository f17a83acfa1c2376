"""EasyDeL 0.3.0 behind one door: what its import and its calls change of the process is put back.

Nothing else here imports EasyDeL. Its directories are read without it (`dflash.weights.easydel_target`).
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

from dflash.models.layers import precision
from dflash.models.llama import Llama
from dflash.weights.config_json import read_target_config
from dflash.weights.easydel_target import HEAD, from_state, to_state
from dflash.weights.huggingface import DTYPES
from dflash.weights.snapshot import read_json

VERSION = "0.3.0"
_ENVIRONMENT = {
    # Its settings of XLA, libtpu, NCCL and the recursion limit; its start of a cluster; its search for fast kernels.
    "EASYDEL_AUTO": "0",
    "ENABLE_DISTRIBUTED_INIT": "0",
    "EJKERNEL_AUTOTUNE_POLICY": "heuristics",
    # Its compile cache: a text that is given is not made into a directory.
    "COMPILE_FUNC_DIR": tempfile.gettempdir(),
    "HF_HUB_OFFLINE": "1",
    "LOGGING_LEVEL_ED": "WARNING",
}
# What is used of it. They are imported at once, inside of what puts the process back.
_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt_oss": "GptOss"}
_MODULES = ("easydel", "easydel.layers.rotary", *(f"easydel.modules.{family}" for family in _FAMILIES))


class EasyDelError(RuntimeError):
    """EasyDeL can't be used: what is missing, or what it can't do, and what to do."""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Puts back what EasyDeL changes meanwhile: environment, recursion limit, jax's settings, logging, warnings.

    Its persistent compile cache would falsify every compile time that is measured later in the process.
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
        # Whoever compiled first has chosen the directory for good, until this is said.
        compilation_cache.reset_cache()


def load(*more: str) -> ModuleType:
    """The package `easydel`, imported with `more` of its modules.

    Raises EasyDelError unless it is there in the one version that is known.
    """
    try:
        found = metadata.version("easydel")
    except metadata.PackageNotFoundError:
        raise EasyDelError(
            "EasyDeL is not installed: pip install 'dflash-bench[easydel]', into an environment of its own, since it "
            "holds jax at 0.9"
        ) from None
    if found != VERSION:
        raise EasyDelError(f"EasyDeL must be {VERSION}, the version that was examined; got {found}: install that one")
    with isolated():
        try:
            modules = [import_module(name) for name in (*_MODULES, *more)]
            return modules[0]
        except ImportError as error:
            raise EasyDelError(f"EasyDeL can't be imported ({error}): pip install 'dflash-bench[easydel]'") from error


_AXES = ("dp", "fsdp", "ep", "tp", "sp")


def _settings(dtype: jnp.dtype) -> dict[str, Any]:
    """The one attention of its that is right on a CPU (the others ignore sinks, or compute in bfloat16); one device."""
    names = ("attn_dtype", "kvdtype", "attn_softmax_dtype")
    attention = {"attn_mechanism": "vanilla", **dict.fromkeys(names[:2], dtype), names[2]: jnp.float32}
    # Where none is set it makes one, of every device there is.
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1, 1, 1), _AXES)
    return attention | {"_hidden_mesh": mesh}


def load_model(directory: Path, dtype: str = "float32") -> Any:
    """EasyDeL's model of a Hugging Face snapshot, read as it reads it itself (with torch), on one device."""
    auto = load().AutoEasyDeLModelForCausalLM
    with isolated():
        return auto.from_pretrained(
            str(directory),
            from_torch=True,
            dtype=DTYPES[dtype],
            param_dtype=DTYPES[dtype],
            precision=precision(DTYPES[dtype]),
            # Its default takes every weight through float16.
            torch_load_mode="streaming",
            config_kwargs=_settings(DTYPES[dtype]),
            verbose=False,
        )


def _parameters(model: Any) -> dict[str, nnx.Variable]:
    """The weights of a model by their paths joined with "/"; a tied head has none of its own."""
    parameters = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    return {path: v for path, v in parameters.items() if v.get_value() is not None}


def to_target(model: Any, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """Our target with the weights of EasyDeL's model (Llama, Qwen or GPT-OSS); see `from_state` for what is shared.

    Give the model up before the target is used, and no weight is held twice. Raises ConfigError or WeightsError.
    """
    config = read_target_config(json.loads(model.config.to_json_string(use_diff=False)), "the model's config")
    return from_state(config, {path: v.get_value() for path, v in _parameters(model).items()}, dtype, mesh)


def from_target(target: Llama, directory: Path) -> Any:
    """EasyDeL's model with the weights of our target, on one device; `directory` has the target's config.json."""
    load()
    raw = read_json(Path(directory), "config.json")
    family, dtype = target.config.family, target.dtype
    module, name = sys.modules[f"easydel.modules.{family}"], _FAMILIES[family]
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
            # What is no weight counts random draws, of which there are none; a tied head is none, as when it loads one.
            other = None if name == HEAD else jnp.zeros(empty.shape, empty.dtype)
            flat.append((path, variable.replace(arrays.pop(name, other))))
        assert not arrays, sorted(arrays)
        return nnx.merge(graph, nnx.from_flat_state(flat))
