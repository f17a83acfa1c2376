"""What a target, a draft and a decode are: frozen dataclasses. Nothing here touches an array, a device or a file."""

import dataclasses
import itertools
import numbers
import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal


class UserError(Exception):
    """The base of errors that a user can mend: the message, one sentence, says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration that can't be used: the rule, what came, and what to do."""


_MOST_FAULTS = 10


def fault_list(faults: Sequence[str]) -> str:
    """Faults of one file as a clause. Of more than ten, those that differ in numbers alone are counted."""
    faults = [fault if len(fault) <= 300 else f"{fault[:300]}..." for fault in faults]
    if len(faults) > _MOST_FAULTS:
        alike: dict[str, list[str]] = {}
        for fault in faults:
            alike.setdefault(re.sub(r"[0-9]+", "0", fault), []).append(fault)
        kinds: dict[str, list[list[str]]] = {}
        for same in alike.values():
            kinds.setdefault(same[0].split()[0], []).append(same)
        # Round-robin, so that every kind (missing, unexpected) is listed.
        groups = [same for turn in itertools.zip_longest(*kinds.values()) for same in turn if same]
        faults = [same[0] if len(same) == 1 else f"{same[0]} and {len(same) - 1} like it" for same in groups]
        rest = sum(map(len, groups[_MOST_FAULTS:]))
        faults = faults[:_MOST_FAULTS] + ([f"and {rest} more"] if rest else [])
    return "; ".join(faults)


def counted_faults(faults: Sequence[str]) -> str:
    """`fault_list` behind the number of the faults: `(2 faults): a; b`."""
    return f"({len(faults)} fault{'' if len(faults) == 1 else 's'}): {fault_list(faults)}"


# More steps, tokens or rows than this can only be a typo.
MOST = 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The range of a number, stated in its field's type: `lowest` to `most`, excluded if `above` and `below`.

    With `least` it is `lowest`, or from there on.
    """

    lowest: float
    most: float = MOST
    above: bool = False
    below: bool = False
    least: float | None = None

    def rule(self, value: float) -> str:
        """The rule that a number breaks, such as "at least 1"; empty if it lies in the range. NaN lies nowhere."""
        if not (value > self.lowest if self.above else value >= self.lowest):
            return f"{'above' if self.above else 'at least'} {self.lowest}"
        if self.least is not None and self.lowest < value < self.least:
            return f"{self.lowest}, or at least {self.least}"
        if not (value < self.most if self.below else value <= self.most):
            return f"{'below' if self.below else 'at most'} {self.most}"
        return ""


Index = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
BlockSize = Annotated[int, Range(2)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Size = Annotated[float, Range(0)]
# Logits divided by less would not be finite in float32.
Temperature = Annotated[float, Range(0, least=1e-6)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
Mass = Annotated[float, Range(0, 1, above=True)]
Fraction = Annotated[float, Range(0, 1, below=True)]
Computed = Literal["float32", "bfloat16"]
# How many tokens a draft proposes.
DraftVocab = Count | Literal["all"]


class Checked:
    """A dataclass whose fields say in their types what they hold: numbers in a Range, words of a Literal."""

    __slots__ = ()

    def __post_init__(self) -> None:
        self.check()

    def check(self, *faults: str) -> None:
        """Raises ConfigError with these faults and those of every field."""
        every = [*field_faults(self), *faults]
        if every:
            raise ConfigError("; ".join(every))


def option_name(kind: Any) -> str | None:
    """What tyro calls the option of a field of this type, where that is another name than the field's."""
    names = (getattr(part, "name", None) for part in typing.get_args(kind)[1:])
    return next((name for name in names if name and isinstance(name, str)), None)


def field_faults(record: Any) -> list[str]:
    """What the fields of a dataclass hold that their types don't allow, each a clause."""
    hints = typing.get_type_hints(type(record), include_extras=True)
    return [fault for name, kind in hints.items() for fault in _faults(name, kind, getattr(record, name))]


def _faults(name: str, kind: Any, value: Any) -> list[str]:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [part for part in parts if part is not type(None)] if value is not None else []
        return min((_faults(name, part, value) for part in kinds), key=len, default=[])
    if origin is Literal and value not in parts:
        return [f"{name} must be one of {', '.join(map(str, parts))}, got {value!r}"]
    if origin is tuple:
        return [fault for item in value for fault in _faults(name, parts[0], item)]
    if origin is Annotated:
        option = option_name(kind)
        name = f"{name} (--{option})" if option else name
        ranges = [part for part in parts if isinstance(part, Range)]
        if ranges and not isinstance(value, numbers.Integral if parts[0] is int else numbers.Real):
            return [f"{name} must be {'an integer' if parts[0] is int else 'a number'}, got {value!r}"]
        rules = [rule for rule in (r.rule(value) for r in ranges) if rule]
        return [f"{name} must be {rule}, got {value}" for rule in rules] or _faults(name, parts[0], value)
    return []


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding. `kind` is default, linear, llama3 or yarn, as in transformers' `rope_type`."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Routed experts of one MLP: `per_token` of `count` are awake for a token. `limit` clamps SwiGLU (GPT-OSS)."""

    count: int
    per_token: int
    limit: float = 7.0
    alpha: float = 1.702


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """A decoder-only transformer. `windows[i]` is layer i's sliding window in tokens, None for full attention."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    experts: ExpertsConfig | None = None

    @property
    def num_layers(self) -> int:
        return len(self.windows)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TargetShape:
    """What a draft must fit of a target, also of one that we can't run ourselves."""

    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConvConfig:
    """DFlash 2: convolutions over `kernel_size` slots, whose kernels are computed once for `group_size` channels."""

    kernel_size: int
    group_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectorConfig:
    """DFlash 2: a choice among the `top_k` likeliest tokens of a slot, by a product of rank `rank`."""

    rank: int
    top_k: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DraftConfig:
    """A DFlash draft in its canonical form (the conventions of PyPI `dflash==0.1.0`).

    `target_layer_ids[k]` names the target layer whose *output* is context feature k. `windows` and `causal` are per
    layer; a causal layer hides later block slots. `block_size` counts the anchor. Drafts of the
    EasyDeL fork may have what canonical ones don't: a mask vector of their own, biases in fc and MLP, no q/k norm. A
    DFlash 2 draft has `conv` and `selector`. `vocabulary`, a bit per token of the target's
    (`models.draft.pack_tokens`), says which ones the draft proposes; None is all of them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    attention_bias: bool = False
    learned_mask: bool = False
    fc_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    conv: ConvConfig | None = None
    selector: SelectorConfig | None = None
    vocabulary: bytes | None = None

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def num_features(self) -> int:
        return len(self.target_layer_ids)

    @property
    def num_tokens(self) -> int:
        """How many tokens the draft proposes."""
        return self.vocab_size if self.vocabulary is None else int.from_bytes(self.vocabulary, "little").bit_count()


def build_target_layer_ids(num_target_layers: int, num_features: int) -> tuple[int, ...]:
    """Layers whose outputs condition the draft, evenly spread from 1 to L-3 (z-lab's rule, and SpecForge's).

    Raises ConfigError if the target has too few layers for distinct features.
    """
    if num_features == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    ids = tuple(round(first + i * (last - first) / (num_features - 1)) for i in range(num_features))
    if num_features < 1 or len(set(ids)) != num_features or min(ids) < 0:
        raise ConfigError(
            f"context features must come from different layers; {num_features} of a target with {num_target_layers} "
            f"layers would be {list(ids)}: ask for fewer, or name the layers where that can be done (target_layer_ids)"
        )
    return ids


def range_faults(draft: DraftConfig, num_layers: int, vocab_size: int) -> list[str]:
    """The parts of a draft that name a layer or a token beyond a target of this size."""
    faults = []
    beyond = [i for i in draft.target_layer_ids if not 0 <= i < num_layers]
    if beyond:
        faults.append(f"it reads layers {beyond} of a target with layers 0..{num_layers - 1}")
    if not 0 <= draft.mask_token_id < vocab_size:
        faults.append(f"its mask token {draft.mask_token_id} is outside the vocabulary of {vocab_size}")
    return faults


def check_draft(draft: DraftConfig, target: TargetConfig | TargetShape) -> None:
    """Raises ConfigError with every reason why this draft can't propose for this target."""
    faults = []
    if draft.hidden_size != target.hidden_size:
        faults.append(f"its hidden size is {draft.hidden_size}, the target's {target.hidden_size}")
    if draft.vocab_size != target.vocab_size:
        faults.append(f"its vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}")
    if draft.num_target_layers != target.num_layers:
        faults.append(f"it was made for {draft.num_target_layers} layers, the target has {target.num_layers}")
    faults += range_faults(draft, target.num_layers, target.vocab_size)
    if faults:
        raise ConfigError(
            "the draft does not fit the target: " + fault_list(faults) + ". Give the draft of this target"
        )
