"""DFlash: lossless speculative decoding with block diffusion, in JAX.

Axis letters, the same everywhere: B rows of a batch, T tokens of one forward, S slots (of a block: its size; of a
cache: its length), H hidden, V vocabulary, L layers, G key/value heads, R query heads per key/value head, D head
dimension, K context features, E experts, I MLP width, N any count. Activations inside the networks are columns:
[H, B*T].

Importing opens no device, and takes no time: a name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dflash.config import ConfigError
    from dflash.decoding.decode import DecodeResult, RequestError, decode, stream
    from dflash.decoding.modes import MODES
    from dflash.decoding.script import ScriptedDraft
    from dflash.text.prompts import load_prompts
    from dflash.text.tokenizer import Tokenizer, load_tokenizer
    from dflash.weights.huggingface import write_draft
    from dflash.weights.load import init_draft, load_draft, load_target
    from dflash.weights.snapshot import WeightsError

__version__ = "0.1.0"

__all__ = [
    "MODES",
    "ConfigError",
    "DecodeResult",
    "RequestError",
    "ScriptedDraft",
    "Tokenizer",
    "WeightsError",
    "__version__",
    "decode",
    "init_draft",
    "load_draft",
    "load_prompts",
    "load_target",
    "load_tokenizer",
    "stream",
    "write_draft",
]

_PLACES = {
    "config": ("ConfigError",),
    "decoding.decode": ("DecodeResult", "RequestError", "decode", "stream"),
    "decoding.modes": ("MODES",),
    "decoding.script": ("ScriptedDraft",),
    "text.prompts": ("load_prompts",),
    "text.tokenizer": ("Tokenizer", "load_tokenizer"),
    "weights.huggingface": ("write_draft",),
    "weights.load": ("init_draft", "load_draft", "load_target"),
    "weights.snapshot": ("WeightsError",),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            value = getattr(importlib.import_module(f"dflash.{place}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'dflash' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
