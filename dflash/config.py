"""What a target, a draft and a decode are: frozen dataclasses. Nothing here touches an array, a device or a file."""

import dataclasses

FAMILIES = ("llama", "qwen2", "qwen3", "gpt_oss")
MODES = ("greedy", "cached_sequential_verify", "cached_block_verify", "recompute")


class ConfigError(ValueError):
    """A configuration that can't be used: the rule, what came, and what to do."""


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
    layer; a causal layer hides later block slots. `block_size` counts the anchor. Drafts of older
    trainers may have what canonical ones don't: a mask vector of their own, biases in fc and MLP, no q/k norm. A DFlash
    2 draft has `conv` and `selector`. `vocabulary`, a bit per token of the target's (`models.draft.pack_tokens`), says
    which ones the draft proposes; None is all of them.
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

    Raises ConfigError when the target has too few layers to tell the features apart.
    """
    if num_features == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    ids = tuple(round(first + i * (last - first) / (num_features - 1)) for i in range(num_features))
    if num_features < 1 or len(set(ids)) != num_features or min(ids) < 0:
        raise ConfigError(
            f"context features must come from different layers; {num_features} of a target with {num_target_layers} "
            f"layers would be {list(ids)}; name them with target_layer_ids"
        )
    return ids


def range_faults(draft: DraftConfig, num_layers: int, vocab_size: int) -> list[str]:
    """What of a draft names a layer or a token that a target of this size has not."""
    faults = []
    beyond = [i for i in draft.target_layer_ids if not 0 <= i < num_layers]
    if beyond:
        faults.append(f"it reads layers {beyond} of a target with layers 0..{num_layers - 1}")
    if not 0 <= draft.mask_token_id < vocab_size:
        faults.append(f"its mask token {draft.mask_token_id} is outside the vocabulary of {vocab_size}")
    return faults


def check_draft(draft: DraftConfig, target: TargetConfig) -> None:
    """Raises ConfigError with every reason why this draft can't propose for this target."""
    faults = []
    if draft.hidden_size != target.hidden_size:
        faults.append(f"its hidden size is {draft.hidden_size}, the target's {target.hidden_size}")
    if draft.vocab_size != target.vocab_size:
        faults.append(f"its vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}")
    faults += range_faults(draft, target.num_layers, target.vocab_size)
    if faults:
        raise ConfigError("the draft does not fit the target: " + "; ".join(faults) + ". Give the draft of this target")
