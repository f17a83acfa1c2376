"""Beside others, in one run: a one-token step beside transformers in torch, a decode beside the reference's own loop.

The same weights, prompts and proposals, float32, all cores; every round runs both in turn.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash import init_draft, write_draft
from dflash.decoding import modes
from dflash.decoding.decode import check_request, compiled_decoder, prefill, read_state
from dflash.decoding.loop import DecodeShape
from dflash.decoding.script import ScriptedDraft
from dflash.measuring.interval import known, ratio_interval
from dflash.measuring.result import Peer, to_json
from dflash.measuring.steps import verify_step
from dflash.metrics import round_up
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.weights.load import target_directory

pytestmark = pytest.mark.oracle
WORKER = Path(__file__).with_name("peer_worker.py")
BLOCK, BUDGET = 8, 64


@pytest.fixture(scope="module")
def peer_draft(target: Llama) -> Draft:
    return init_draft(target, num_layers=2, block_size=BLOCK)


@pytest.fixture(scope="module")
def ask(
    target: Llama, peer_draft: Draft, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Asks the worker process one thing and waits for its answer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if not os.environ.get("DFLASH_REFERENCE_DIR"):
        pytest.skip(
            "DFLASH_REFERENCE_DIR must name a directory with the reference: "
            "pip install --no-deps --target DIR dflash==0.1.0"
        )
    draft_dir = tmp_path_factory.mktemp("peer") / "draft"
    write_draft(peer_draft, draft_dir)
    command = [sys.executable, "-P", str(WORKER), str(target_directory(pytestconfig.option.target)), str(draft_dir)]
    log = draft_dir.with_name("worker.log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
    assert process.stdin is not None
    assert process.stdout is not None

    def request(**message: Any) -> dict[str, Any]:
        process.stdin.write(json.dumps(message) + "\n")
        return read()

    def read() -> dict[str, Any]:
        line = process.stdout.readline()
        assert line, f"the worker ended with {process.wait()}: {log.read_text()[-2000:]}"
        return json.loads(line)

    assert read()["ready"]
    yield request
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.mark.benchmark(group="peers")
def test_one_token_step_beside_torch(
    benchmark: BenchmarkFixture, target: Llama, ask: Callable[..., dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    """T_1 is no slower than torch's; T_verify(8) is reported beside it."""
    context, repeats = 128, 5
    ours = {n: verify_step(target, tokens=n, batch=1, context=context) for n in (1, BLOCK)}
    theirs: dict[int, list[float]] = {1: [], BLOCK: []}

    def time_torch() -> None:
        for tokens, seconds in theirs.items():
            answer = ask(op="step", context=context, tokens=tokens, repeats=repeats)
            seconds.append(float(np.median(answer["seconds"])))

    def step() -> None:
        for _ in range(repeats):
            ours[1]()

    rounds = 3 * pytestconfig.option.rounds
    benchmark.pedantic(step, setup=time_torch, rounds=rounds, warmup_rounds=2)
    mine = np.array(benchmark.stats.stats.data) / repeats
    ratio, low, high = ratio_interval(np.array(theirs[1][-rounds:]), mine)
    result = Peer(
        case="t1-beside-torch",
        torch_step_ms=1000 * float(np.median(theirs[1][-rounds:])),
        torch_verify_ms=1000 * float(np.median(theirs[BLOCK][-rounds:])),
        step_ms=1000 * float(np.median(mine)),
        faster_x=ratio,
        faster_x_ci95=known(low, high),
    )
    benchmark.extra_info.update(to_json(result))
    assert high >= 1.0, f"T_1 is {1 / ratio:.2f} x torch's ({1 / high:.2f} to {1 / low:.2f}): the one-token step moved"


@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize("accepted", [0, 3, 7], ids="a{}".format)
def test_decode_beside_the_reference(
    benchmark: BenchmarkFixture,
    target: Llama,
    peer_draft: Draft,
    workload: Any,
    ask: Callable[..., dict[str, Any]],
    accepted: int,
    pytestconfig: pytest.Config,
) -> None:
    """Block verify is at least twice as fast as the reference's own loop, with the same tokens and accept lengths."""
    prompts = [g[0] for g in workload.groups][:2]
    stops = workload.stop_token_ids
    common = {"stop_token_ids": stops, "allow_larger_block": False}
    longest = round_up(max(map(len, prompts)), 32)
    shape = DecodeShape(mode=modes.BLOCK.name, block_size=BLOCK, batch=1, max_prompt_len=longest, max_new_tokens=BUDGET)
    plain_shape = dataclasses.replace(shape, mode=modes.GREEDY.name, block_size=1, max_new_tokens=BUDGET + BLOCK)
    greedy = compiled_decoder(target, None, plain_shape)
    decoder = compiled_decoder(target, peer_draft, shape)
    requests, scripts = [], []
    for prompt in prompts:
        plain = check_request(
            target, None, [prompt], mode=modes.GREEDY.name, block_size=None, max_new_tokens=BUDGET + BLOCK, **common
        )
        outputs = read_state(greedy.steps(prefill(greedy, plain)))[0]
        draft = ScriptedDraft(draft=peer_draft, outputs=outputs, accept_len=accepted)
        scripts.append(draft.table(BLOCK)[0].tolist() + [0] * BLOCK)
        requests.append(
            check_request(
                target, draft, [prompt], mode=modes.BLOCK.name, block_size=BLOCK, max_new_tokens=BUDGET, **common
            )
        )
    theirs: list[list[float]] = []
    answers: list[dict[str, Any]] = []
    states: list[Any] = []
    outcome: list[Any] = []

    def run_reference() -> None:
        answers[:] = [
            ask(op="decode", prompt=p, max_new_tokens=BUDGET, stops=list(stops), script=s)
            for p, s in zip(prompts, scripts, strict=True)
        ]
        theirs.append([a["seconds"] for a in answers])
        states[:] = [prefill(decoder, r) for r in requests]

    def run_ours() -> None:
        outcome[:] = [decoder.steps(s) for s in states]
        states.clear()

    rounds = pytestconfig.option.rounds
    benchmark.pedantic(run_ours, setup=run_reference, rounds=rounds, warmup_rounds=1)
    for state, answer in zip(outcome, answers, strict=True):
        tokens, _, produced = read_state(state)
        assert tokens[0] == answer["tokens"]
        assert produced[0] == answer["produced"]
    mine = np.array(benchmark.stats.stats.data)
    ratio, low, high = ratio_interval(np.array(theirs[-rounds:]).sum(axis=1), mine)
    tokens_out = sum(len(a["tokens"]) - 1 for a in answers)
    result = Peer(
        case=f"reference-a{accepted}",
        tok_s_total=tokens_out / float(np.median(mine)),
        reference_tok_s_total=tokens_out / float(np.median(np.array(theirs[-rounds:]).sum(axis=1))),
        faster_x=ratio,
        faster_x_ci95=known(low, high),
    )
    benchmark.extra_info.update(to_json(result))
    assert high >= 2.0, f"{ratio:.2f} x ({low:.2f} to {high:.2f}) the reference's tok/s, not 2: a block's cost moved"
