"""DFlash: lossless speculative decoding with block diffusion, in JAX.

Axis letters, the same everywhere: B rows of a batch, T tokens of one forward, S slots (of a block: its size; of a
cache: its length), H hidden, V vocabulary, L layers, G key/value heads, R query heads per key/value head, D head
dimension, K context features, E experts, I MLP width, N any count. Activations inside the networks are columns:
[H, B*T].

Importing opens no device.
"""

from dflash.config import MODES, ConfigError
from dflash.decoding.decode import DecodeResult, RequestError, decode
from dflash.decoding.script import ScriptedDraft
from dflash.tokenizer import Tokenizer, load_tokenizer
from dflash.weights.huggingface import write_draft
from dflash.weights.load import init_draft, load_draft, load_target
from dflash.weights.snapshot import WeightsError

__all__ = [
    "MODES",
    "ConfigError",
    "DecodeResult",
    "RequestError",
    "ScriptedDraft",
    "Tokenizer",
    "WeightsError",
    "decode",
    "init_draft",
    "load_draft",
    "load_target",
    "load_tokenizer",
    "write_draft",
]
