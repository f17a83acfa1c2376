"""EasyDeL 0.3.0 behind one door: what its import and its calls change of the process is put back.

Nothing else here imports EasyDeL. Its directories are read without it (`dflash.weights.easydel_target`).
"""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from types import ModuleType

import jax
from jax.experimental.compilation_cache import compilation_cache

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
_MODULES = ("easydel", "easydel.layers.rotary", "easydel.modules.gpt_oss", "easydel.modules.llama")


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


def load() -> ModuleType:
    """The package `easydel`, imported. Raises EasyDelError unless it is there in the one version that is known."""
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
            return [import_module(name) for name in _MODULES][0]
        except ImportError as error:
            raise EasyDelError(f"EasyDeL can't be imported ({error}): pip install 'dflash-bench[easydel]'") from error
