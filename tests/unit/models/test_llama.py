"""Targets against transformers in torch: float32 logits and every hidden state, on tiny random snapshots."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash.weights.load import load_target
from dflash.weights.tiny import write_tiny_target

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-truncated": ("llama", {"rope_scaling": YARN | {"truncate": True}}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {}),
    "gpt_oss": ("gpt_oss", {}),
}
TOLERANCE = 1e-4


@dataclasses.dataclass
class Pair:
    ours: Any
    theirs: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, list[np.ndarray]]]


def reference(directory: Path, dtype: str = "float32") -> Callable[..., tuple[np.ndarray, list[np.ndarray]]]:
    """transformers in torch, eager: logits and the output of every layer, the last one before the final norm."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    last: list[Any] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))

    def forward(tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        last.clear()
        with torch.no_grad():
            out = model(torch.tensor(tokens), position_ids=torch.tensor(np.array(positions)), output_hidden_states=True)
        hidden = [*out.hidden_states[1:-1], last[0]]
        return out.logits.float().numpy(), [h.float().numpy() for h in hidden]

    return forward


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, changes = CASES[request.param]
    directory = write_tiny_target(tmp_path_factory.mktemp(request.param), family, **changes)
    return Pair(ours=load_target(directory), theirs=reference(directory))


def tokens_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 199, (rows, length))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("length", [60, 100], ids=["native-kernels", "xla"])
@pytest.mark.parametrize("end", [None, 131072], ids=["at-0", "to-131071"])
def test_logits_and_every_hidden_state(pair: Pair, length: int, end: int | None) -> None:
    """60 tokens run in the CPU kernels where they can be built, 100 in XLA; both are past several windows."""
    tokens = tokens_of(1, length)
    start = 0 if end is None else end - length
    positions = np.arange(start, start + length)[None]
    logits, hidden = pair.ours.forward(tokens, positions=positions)
    expected_logits, expected_hidden = pair.theirs(tokens, positions)
    assert len(hidden) == len(expected_hidden) == pair.ours.config.num_layers
    for layer, (ours, theirs) in enumerate(zip(hidden, expected_hidden, strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0, err_msg=f"layer {layer}")
    np.testing.assert_allclose(logits, expected_logits, atol=TOLERANCE, rtol=0)
    # A model that always says the same would make this check worthless.
    assert len(set(np.asarray(logits).argmax(-1).ravel())) >= 15


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_rows_of_unequal_length(pair: Pair) -> None:
    tokens = tokens_of(3, 50, seed=1)
    lengths = [50, 7, 31]
    for row, n in enumerate(lengths):
        tokens[row, n:] = 0
    logits, hidden = pair.ours.forward(tokens)
    for row, n in enumerate(lengths):
        expected_logits, expected_hidden = pair.theirs(tokens[row : row + 1, :n], np.arange(n)[None])
        np.testing.assert_allclose(logits[row, :n], expected_logits[0], atol=TOLERANCE, rtol=0)
        for ours, theirs in zip(hidden, expected_hidden, strict=True):
            np.testing.assert_allclose(ours[row, :n], theirs[0], atol=TOLERANCE, rtol=0)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_bfloat16_is_as_far_from_float32_as_torch_is(family: str, tmp_path: Path) -> None:
    directory = write_tiny_target(tmp_path, family)
    tokens, positions = tokens_of(1, 40), np.arange(40)[None]
    exact, _ = load_target(directory).forward(tokens)
    ours, _ = load_target(directory, dtype="bfloat16").forward(tokens)
    theirs, _ = reference(directory, "bfloat16")(tokens, positions)
    exact = np.asarray(exact)
    mine, torchs = (np.abs(np.asarray(x) - exact).mean() for x in (ours, theirs))
    assert 0 < mine <= 1.5 * torchs


def test_forward_defaults_to_positions_from_zero(tmp_path: Path) -> None:
    target = load_target(write_tiny_target(tmp_path))
    tokens = tokens_of(2, 9)
    positions = np.broadcast_to(np.arange(9), (2, 9))
    for default, given in zip(target.forward(tokens), target.forward(tokens, positions), strict=True):
        for a, b in zip(np.asarray(default), np.asarray(given), strict=True):
            np.testing.assert_array_equal(a, b)


def test_shapes(tmp_path: Path) -> None:
    target = load_target(write_tiny_target(tmp_path))
    logits, hidden = target.forward(tokens_of(2, 9))
    assert logits.shape == (2, 9, 199)
    assert logits.dtype == np.float32
    assert [h.shape for h in hidden] == [(2, 9, 64)] * 4


def test_padding_on_the_right_changes_nothing_before_it(tmp_path: Path) -> None:
    target = load_target(write_tiny_target(tmp_path))
    tokens = tokens_of(1, 20)
    other = tokens.copy()
    other[:, 12:] = 5
    np.testing.assert_array_equal(target.forward(tokens)[0][:, :12], target.forward(other)[0][:, :12])
