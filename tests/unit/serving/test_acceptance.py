"""Acceptance as servers report it, in our definitions: the same blocks reported in each way give the same figures."""

import pytest

from dflash import metrics
from dflash.serving.acceptance import of_sglang, of_sglang_jax, of_vllm, read_counters, unknown

SIZE = 8
# Accept lengths of two requests' blocks.
BLOCKS = [[7, 3, 0, 2], [5, 1, 1]]
MOST = 100  # tokens that came
EXPECTED = metrics.acceptance(BLOCKS, SIZE)
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
MEANS = (*COUNTS, "accept_len_mean", "acceptance_length", "accept_rate")


def same(figures, names=tuple(EXPECTED)):
    assert figures["acceptance_unknown"] is None
    for name in names:
        assert figures[name] == pytest.approx(EXPECTED[name]), name


def meta_info(blocks, histogram=True):
    """An answer's meta_info: correct drafts do not count the bonus token."""
    meta = {"spec_verify_ct": len(blocks), "spec_num_correct_drafts": sum(blocks)}
    counts = [blocks.count(a) for a in range(max(blocks) + 1)]
    return meta | ({"spec_correct_drafts_histogram": counts} if histogram else {})


def test_sglang_tells_all_figures():
    same(of_sglang([meta_info(b) for b in BLOCKS], SIZE, MOST))


def test_sglang_without_a_histogram_leaves_out_what_needs_it():
    figures = of_sglang([meta_info(b, histogram=False) for b in BLOCKS], SIZE, MOST)
    same(figures, ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "accept_len_mean", "accept_rate"))
    assert figures["acceptance_length"] == figures["accept_len_mean"] + 1
    assert figures["accept_histogram"] is None
    assert figures["accept_rate_per_pos"] is None


def test_sglang_of_a_version_that_does_not_count_is_unknown():
    figures = of_sglang([meta_info(BLOCKS[0]), {}], SIZE, MOST)
    assert figures["acceptance_length"] is None
    assert figures["num_drafts"] is None
    assert "spec_verify_ct" in figures["acceptance_unknown"]


def line(requests, accepted, size=SIZE):
    """A decode line of sglang-jax: accept-len counts the bonus token, accept-ratio is accept-len / block size."""
    length = sum(accepted) / requests + 1
    return (
        f"[2026-08-21 05:56:59] Decode batch. #running-req: {requests}, #token: 40, token usage: 0.01, "
        f"accept-len {length:.2f}, accept-ratio {length / size:.2f}, gen throughput (token/s): 11.51, #queue-req: 0, "
    )


def test_sglang_jax_tells_the_means_in_its_log():
    # Both requests run for three steps, then one alone.
    lines = [line(2, [7, 5]), "a line of something else", line(2, [3, 1]), line(2, [0, 1]), line(1, [2])]
    figures = of_sglang_jax("\n".join(lines), SIZE)
    same(figures, MEANS)
    # Its accept-ratio is something else than our accept_rate.
    assert figures["accept_rate"] != pytest.approx(figures["acceptance_length"] / SIZE, rel=0.05)
    assert figures["accept_histogram"] is None


def test_sglang_jax_rounds_to_two_digits_and_is_read_in_whole_tokens():
    figures = of_sglang_jax(line(3, [7, 6, 6]), SIZE)
    assert figures["num_accepted_tokens"] == 19
    assert figures["num_drafts"] == 3


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("Decode batch. #running-req: 1, #token: 3, gen throughput", "no line with accept-len"),
        (line(1, [3], 16), "not the block size 8"),
    ],
)
def test_sglang_jax_is_unknown_where_its_log_does_not_say_it(log, why):
    figures = of_sglang_jax(log, SIZE)
    assert why in figures["acceptance_unknown"]
    assert figures["accept_rate"] is None


def page(blocks, before=0, positions=True):
    """A /metrics page of vLLM, two engines; counters go on from `before` blocks that accepted nothing."""
    accepted, count = sum(blocks), len(blocks) + before
    lines = [
        "# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.",
        "# TYPE vllm:spec_decode_num_drafts_total counter",
        f'vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {count - 1}.0',
        'vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 1.0',
        f'vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {count * (SIZE - 1)}.0',
        f'vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}.0',
        'vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e9',
    ]
    for k in range(SIZE - 1) if positions else []:
        reached = sum(a > k for a in blocks)
        labels = f'{{engine="0",model_name="m",position="{k}"}}'
        lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{labels} {reached}.0")
    return "\n".join(lines)


def test_vllm_tells_all_figures_by_what_its_counters_grew():
    blocks = [a for row in BLOCKS for a in row]
    same(of_vllm(page([], before=4), page(blocks, before=4), SIZE, MOST))


def test_vllm_without_positions_leaves_out_what_needs_them():
    blocks = [a for row in BLOCKS for a in row]
    figures = of_vllm(page([], 2, positions=False), page(blocks, 2, positions=False), SIZE, MOST)
    same(figures, ("num_drafts", "accept_len_mean", "accept_rate"))
    assert figures["accept_histogram"] is None


def test_vllm_that_did_not_draft_is_unknown():
    assert "vllm:spec_decode_num_drafts" in of_vllm(page([], 4), page([], 4), SIZE, MOST)["acceptance_unknown"]
    assert of_vllm("", "", SIZE, MOST)["acceptance_length"] is None


@pytest.mark.parametrize("size", [2, 4, 16])
def test_blocks_of_another_size_than_assumed_are_named(size):
    """A vLLM that runs already may draft more or fewer tokens than its draft's config says."""
    blocks = [a for row in BLOCKS for a in row]
    figures = of_vllm(page([], 2), page(blocks, 2), size, MOST)
    assert f"{SIZE - 1} drafted tokens a block" in figures["acceptance_unknown"]
    assert "--block-size" in figures["acceptance_unknown"]


def test_blocks_that_were_cut_are_counted():
    """At the end of its context a server drafts less."""
    blocks = [a for row in BLOCKS for a in row]
    cut = page(blocks, 2).replace(f" {(len(blocks) + 2) * (SIZE - 1)}.0", f" {(len(blocks) + 2) * (SIZE - 1) - 3}.0")
    figures = of_vllm(page([], 2), cut, SIZE, MOST)
    assert figures["num_draft_tokens"] == len(blocks) * (SIZE - 1) - 3
    assert figures["accept_histogram"] is None


def test_counters_are_summed_over_engines():
    counters = read_counters(page([7, 3], before=1))
    assert counters["drafts"] == 3
    assert counters["pos0"] == 2
    assert counters["pos6"] == 1


def test_unknown_has_no_number():
    figures = unknown("a reason")
    assert figures.pop("acceptance_unknown") == "a reason"
    assert set(figures) == set(EXPECTED)
    assert set(figures.values()) == {None}


@pytest.mark.parametrize(
    "changes",
    [
        {"spec_verify_ct": 10**12},
        {"spec_verify_ct": -1},
        {"spec_verify_ct": True},
        {"spec_verify_ct": "4"},
        {"spec_num_correct_drafts": 29},
        {"spec_num_correct_drafts": 2.5},
    ],
)
def test_counts_that_can_not_be_are_unknown(changes):
    figures = of_sglang([meta_info(BLOCKS[0]) | changes], SIZE, MOST)
    assert figures["acceptance_unknown"]
    assert figures["acceptance_length"] is None


@pytest.mark.parametrize("histogram", [[1, "2"], [-1, 5], {"0": 4}, 7, [0] * 9, [4, True]])
def test_a_histogram_of_another_shape_is_passed_over(histogram):
    figures = of_sglang([meta_info(BLOCKS[0]) | {"spec_correct_drafts_histogram": histogram}], SIZE, MOST)
    assert figures["num_drafts"] == 4
    assert figures["accept_histogram"] is None


def test_counters_that_others_moved_too_are_unknown():
    blocks = [a for row in BLOCKS for a in row]
    assert "answered others too" in of_vllm(page([], 2), page(blocks, 2), SIZE, len(blocks) - 1)["acceptance_unknown"]


@pytest.mark.parametrize("value", ["NaN", "+Inf", "1e400", "x", "-3", "1.2.3", "9" * 5000])
def test_a_counter_that_is_no_number_is_none(value):
    assert read_counters(f"vllm:spec_decode_num_drafts_total {value}\n") == {}
    assert of_sglang_jax(line(1, [2]).replace("3.00", value), SIZE)["acceptance_unknown"]
