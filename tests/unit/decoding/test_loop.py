"""The decode loop against plain greedy decoding with a cacheless forward, whatever the draft proposes."""

import functools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash.decoding.loop import PREFILL_CHUNK, Decoder, DecodeShape
from dflash.decoding.recompute import recompute_row
from dflash.weights.load import load_target
from dflash.weights.tiny import write_tiny_target

BLOCK, BUDGET, LONGEST = 8, 40, PREFILL_CHUNK + 22
# Windows are 16: within one, past it, and past a prefill chunk.
PROMPT_LENGTHS, BUDGETS = (5, 33, LONGEST), (BUDGET, BUDGET - 7, BUDGET - 13)
NO_STOPS = [[], [], []]
FAMILIES = {
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
}
DRAFTED = ("cached_sequential_verify", "cached_block_verify")
# The modes of which a batch of one is compiled too. With experts it matters how many tokens come together.
ALONE = {"llama": ("greedy", *DRAFTED), "qwen3": (), "gpt_oss": ("cached_block_verify",)}


def plain_greedy(target, prompts, count):
    """int [B, count]: the most likely next token, `count` times, each from a forward over all tokens before it."""
    tokens = np.zeros((len(prompts), max(map(len, prompts)) + count), np.int32)
    ends = np.array([len(p) for p in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows, out = np.arange(len(prompts)), []
    for k in range(count):
        logits = np.asarray(target.forward(tokens)[0])
        out.append(logits[rows, ends + k - 1].argmax(-1))
        tokens[rows, ends + k] = out[-1]
    return np.stack(out, axis=1)


def cut(tokens, budget, stops):
    """What a row emits of its greedy tokens."""
    emitted = []
    for token in tokens[:budget].tolist():
        emitted.append(token)
        if token in stops:
            break
    return emitted


def simulate(greedy, script, budget, stops):
    """Accept and produced lengths of each block when the draft proposes `script`, one token at a time."""
    count, total, accepted, produced = 1, len(cut(greedy, budget, stops)), [], []
    while count < total:
        agreed = 0
        while agreed < BLOCK - 1 and script[count + agreed] == greedy[count + agreed]:
            agreed += 1
        accepted.append(agreed)
        produced.append(min(agreed + 1, total - count))
        count += produced[-1]
    return accepted, produced


class Family:
    """A tiny target and an untrained draft, three prompts, and what plain greedy decoding makes of them."""

    def __init__(self, name, directory, draw_draft, vocab_size):
        sizes = {"num_hidden_layers": 2, "vocab_size": vocab_size}
        self.target = load_target(write_tiny_target(directory / name, name, **sizes, **FAMILIES[name]))
        self.draft = draw_draft(seed=3, vocab_size=vocab_size)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, vocab_size, n).tolist() for n in PROMPT_LENGTHS]
        self.greedy = plain_greedy(self.target, self.prompts, BUDGET + BLOCK)
        self.alone = ALONE[name]
        self._decoders = {}

    def decoder(self, mode, batch):
        if (mode, batch) not in self._decoders:
            draft = None if mode == "greedy" else self.draft
            shape = DecodeShape(
                mode=mode,
                block_size=1 if draft is None else BLOCK,
                batch=batch,
                max_prompt_len=LONGEST,
                max_new_tokens=BUDGET,
            )
            self._decoders[mode, batch] = Decoder(self.target, draft, shape)
        return self._decoders[mode, batch]

    def prefill(self, mode, rows=(0, 1, 2), stops=NO_STOPS, script=None, budgets=BUDGETS):
        return self.decoder(mode, len(rows)).prefill(
            [self.prompts[r] for r in rows],
            budgets=[budgets[r] for r in rows],
            stops=[stops[r] for r in rows],
            script=None if script is None else script[list(rows)],
        )

    def run(self, mode, rows=(0, 1, 2), **request):
        return read(self.decoder(mode, len(rows)).steps(self.prefill(mode, rows, **request)))

    def expected(self, stops=NO_STOPS, budgets=BUDGETS):
        return [cut(*row) for row in zip(self.greedy, budgets, stops, strict=True)]


def read(state):
    """What a decode left on the device, per row."""
    count, lengths = np.asarray(state.count), np.asarray(state.cache.lengths)
    if state.draft_cache is not None:
        assert state.draft_cache.lengths.tolist() == lengths.tolist()

    def logged(buffer):
        rows = np.asarray(buffer)
        for row in rows:
            ended = np.flatnonzero(row < 0)
            assert not ended.size or (row[ended[0] :] == -1).all()
        return [row[row >= 0].tolist() for row in rows]

    return SimpleNamespace(
        tokens=[row[:n].tolist() for row, n in zip(np.asarray(state.tokens), count, strict=True)],
        accepted=logged(state.accepted),
        produced=logged(state.produced),
        count=count.tolist(),
        cached=lengths.tolist(),
        done=np.asarray(state.done).tolist(),
        step=int(state.step),
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory, draw_draft):
    """A family by its name, made once: what it has compiled is shared."""

    @functools.cache
    def make(name, vocab_size=199):
        return Family(name, tmp_path_factory.mktemp("target"), draw_draft, vocab_size)

    return make


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return families(request.param)


@pytest.fixture
def llama(families):
    return families("llama")


def scripted(greedy, accept_len):
    """Proposals with exactly `accept_len` right ones in every block: the token a block later begins with is wrong."""
    script = greedy.astype(np.int32)
    if accept_len < BLOCK - 1:
        script[:, 1 + accept_len :: accept_len + 1] += 1
    return script % 199


def some_stops(family):
    """Row 0 stops at its first token, row 1 in the middle, row 2 never (a token it doesn't say, and one too late)."""
    said = family.greedy.tolist()
    middle = next(t for k, t in enumerate(said[1]) if k >= 11 and t not in said[1][:k])
    never = next(t for t in range(199) if t not in said[2])
    late = next(t for t in reversed(said[2]) if t not in said[2][: BUDGETS[2]])
    return [[said[0][0]], [198 if middle != 198 else 197, middle], [never, late]]


def test_the_text_is_worth_comparing(family):
    for row in family.greedy:
        assert len(set(row.tolist())) > 10


@pytest.mark.parametrize("rows", [(0, 1, 2), (0,), (1,), (2,)], ids=lambda rows: f"rows{''.join(map(str, rows))}")
@pytest.mark.parametrize("mode", ["greedy", *DRAFTED])
def test_tokens_are_the_targets_own(family, mode, rows):
    """With the draft's own proposals; budgets and stop tokens of each row."""
    if len(rows) == 1 and mode not in family.alone:
        rows = (*rows, *rows, *rows)
    for stops in (NO_STOPS, some_stops(family)):
        result = family.run(mode, rows, stops=stops)
        expected = [family.expected(stops)[r] for r in rows]
        assert result.tokens == expected
        assert all(result.done)
        for row, count, cached, produced in zip(rows, result.count, result.cached, result.produced, strict=True):
            assert count == 1 + sum(produced)
            assert cached == len(family.prompts[row]) + count - 1


@pytest.mark.parametrize("accept_len", range(BLOCK), ids="a{}".format)
def test_a_script_is_accepted_as_far_as_it_agrees(family, accept_len):
    script = scripted(family.greedy, accept_len)
    for stops in (NO_STOPS, some_stops(family)):
        logs = []
        for mode in DRAFTED:
            result = family.run(mode, script=script, stops=stops)
            assert result.tokens == family.expected(stops)
            assert all(a == accept_len for row in result.accepted for a in row)
            assert all(p == accept_len + 1 for row in result.produced for p in row[:-1])
            plain = [simulate(*row) for row in zip(family.greedy, script, BUDGETS, stops, strict=True)]
            assert list(zip(result.accepted, result.produced, strict=True)) == plain
            logs.append((result.accepted, result.produced, result.step))
        assert logs[0] == logs[1]


@pytest.mark.parametrize("seed", range(4))
def test_both_verifies_accept_what_a_plain_loop_accepts(family, seed):
    """Proposals wrong here and there, every row at its own pace; rows in a batch and alone are the same."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(family.greedy.shape) < rng.choice([0.05, 0.3, 0.8], (3, 1))
    script = ((family.greedy + wrong) % 199).astype(np.int32)
    stops = [row[:1] for row in rng.permuted(family.greedy, axis=1).tolist()]
    plain = [simulate(*row) for row in zip(family.greedy, script, BUDGETS, stops, strict=True)]
    for mode in DRAFTED:
        result = family.run(mode, script=script, stops=stops)
        assert result.tokens == family.expected(stops)
        assert list(zip(result.accepted, result.produced, strict=True)) == plain
        if mode in family.alone:
            alone = family.run(mode, (seed % 3,), script=script, stops=stops)
            assert (alone.accepted[0], alone.produced[0]) == plain[seed % 3]


def test_both_verifies_log_the_same_of_the_drafts_own_proposals(family):
    first, second = (family.run(mode) for mode in DRAFTED)
    assert (first.accepted, first.produced, first.step) == (second.accepted, second.produced, second.step)


@pytest.mark.parametrize("mode", DRAFTED)
def test_the_drafts_own_proposals_are_a_cacheless_drafts(families, mode):
    """Wrong context for the draft costs no token, only acceptance: so that is compared, block by block.

    A vocabulary of 7, so that an untrained draft is right now and then.
    """
    family = families("llama", vocab_size=7)
    result = family.run(mode)
    plain = [
        recompute_row(family.target, family.draft, prompt, block_size=BLOCK, budget=budget, stops=[])
        for prompt, budget in zip(family.prompts, BUDGETS, strict=True)
    ]
    assert list(zip(result.tokens, result.accepted, result.produced, strict=True)) == plain
    for accepted in result.accepted:
        assert len(set(accepted)) >= 3, f"accept lengths {accepted} prove little"


def test_a_script_leaves_the_drafts_own_proposals_where_it_says_minus_one(llama):
    """Nothing scripted is no script, and the draft's own proposals come back behind a script's end."""
    own = llama.run("cached_block_verify")
    nothing = llama.run("cached_block_verify", script=np.full((3, BUDGET), -1, np.int32))
    assert (nothing.tokens, nothing.accepted) == (own.tokens, own.accepted)
    short = scripted(llama.greedy, BLOCK - 1)[:, : 1 + 2 * BLOCK]
    half = llama.run("cached_block_verify", script=short)
    assert half.tokens == llama.expected()
    # Chance aside, an untrained draft is wrong: two whole blocks, then hardly anything.
    for row in half.accepted:
        assert row[:2] == [BLOCK - 1] * 2
        assert sum(row[3:]) < len(row)


@pytest.mark.parametrize("mode", ["greedy", *DRAFTED])
def test_in_pieces_is_at_once(llama, mode):
    script = scripted(llama.greedy, 2)
    whole = llama.run(mode, script=script)
    state = llama.prefill(mode, script=script)
    for limit in (0, 1, 2, 2, 6, 13, BUDGET):
        state = llama.decoder(mode, 3).steps(state, limit)
        assert int(state.step) == min(limit, whole.step)
    assert vars(read(state)) == vars(whole)


@pytest.mark.parametrize("mode", ["greedy", *DRAFTED])
def test_a_row_that_has_ended_stays_as_it_was(family, mode):
    decoder, stops = family.decoder(mode, 3), some_stops(family)
    state = family.prefill(mode, stops=stops)
    frozen = {}
    while not all(read(state).done):
        state = decoder.steps(state, int(state.step) + 1)
        now = read(state)
        for row in range(3):
            seen = (now.tokens[row], now.cached[row], now.accepted[row], now.produced[row], int(state.anchor[row]))
            if now.done[row]:
                assert frozen.setdefault(row, seen) == seen
    assert [frozen[row][0] for row in range(3)] == family.expected(stops)
    # Row 0 ended with its first token, before any step.
    assert frozen[0][2:4] == ([], [])
    again = decoder.steps(state, BUDGET)
    assert read(again).tokens == family.expected(stops)


@pytest.mark.parametrize("mode", ["greedy", *DRAFTED])
def test_a_budget_of_one_is_the_prompts_own_answer(llama, mode):
    result = llama.run(mode, budgets=(1, 1, 1))
    assert result.tokens == [row[:1].tolist() for row in llama.greedy]
    assert (result.step, result.produced) == (0, [[], [], []])


class Compilations(logging.Handler):
    """What jax says that it compiles."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        message = record.getMessage()
        if message.startswith(("Compiling", "Finished tracing")):
            self.seen.append(message)


@pytest.fixture
def compilations():
    handler, logger = Compilations(), logging.getLogger("jax")
    logger.addHandler(handler)
    with jax.log_compiles():
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(5))
        assert any(m.startswith("Compiling") for m in handler.seen)
        handler.seen.clear()
        yield handler.seen
    logger.removeHandler(handler)


@pytest.mark.parametrize("mode", ["greedy", *DRAFTED])
def test_nothing_compiles_and_nothing_is_transferred_while_it_runs(llama, mode, compilations):
    decoder, limit = llama.decoder(mode, 3), jax.block_until_ready(jnp.int32(BUDGET))
    compilations.clear()
    for script in (None, scripted(llama.greedy, 0), scripted(llama.greedy, 5)):
        state = llama.prefill(mode, script=script, stops=some_stops(llama))
        with jax.transfer_guard("disallow_explicit"):
            state = decoder.steps(state, limit)
        assert np.asarray(state.done).all()
    assert compilations == []


@pytest.mark.parametrize("mode", ["greedy", *DRAFTED])
def test_the_loop_never_calls_the_host(llama, mode):
    program = llama.decoder(mode, 3)._loop.as_text().lower()
    assert "while" in program
    assert not [word for word in ("callback", "infeed", "outfeed", "send(", "recv(") if word in program]


def test_new_weights_are_taken_without_compiling(llama, compilations):
    decoder = llama.decoder("greedy", 3)
    weight = llama.target.head.weight
    old = weight[...]
    try:
        weight.set_value(-old)
        expected = plain_greedy(llama.target, llama.prompts, BUDGET)
        compilations.clear()
        decoder.take_weights()
        result = llama.run("greedy")
        assert compilations == []
    finally:
        weight.set_value(old)
        decoder.take_weights()
    assert result.tokens == [cut(*row, []) for row in zip(expected, BUDGETS, strict=True)]
    assert result.tokens != llama.expected()
    assert llama.run("greedy").tokens == llama.expected()


def test_bfloat16_runs(tmp_path, draw_draft):
    """Shapes, ranges and sums; no exactness: rows and blocks round differently."""
    directory = write_tiny_target(tmp_path / "target", "gpt_oss", num_hidden_layers=2, **FAMILIES["gpt_oss"])
    target, draft = load_target(directory, "bfloat16"), draw_draft(seed=3, dtype=jnp.bfloat16)
    shape = DecodeShape(
        mode="cached_block_verify",
        block_size=BLOCK,
        batch=2,
        max_prompt_len=48,
        max_new_tokens=BUDGET,
    )
    decoder = Decoder(target, draft, shape)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 199, n).tolist() for n in (7, 40)]
    state = decoder.steps(decoder.prefill(prompts, budgets=[BUDGET, 20], stops=[[], []]))
    result = read(state)
    assert result.count == [BUDGET, 20]
    assert all(0 <= t < 199 for row in result.tokens for t in row)
    assert [1 + sum(row) for row in result.produced] == result.count
    assert all(0 <= a < BLOCK for row in result.accepted for a in row)
    assert result.cached == [len(p) + n - 1 for p, n in zip(prompts, result.count, strict=True)]
