"""Whole inputs of every kind, as small as they can be, and the command that reads each of them."""

import contextlib
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sample_runs
from weights import test_easydel, test_easydel_fork

from dflash import init_draft, load_target, write_draft
from dflash.cli import main as cli
from dflash.config import ConvConfig, SelectorConfig
from dflash.measuring.baselines import read_baselines
from dflash.measuring.gate import status
from dflash.measuring.journal import Journal, Record
from dflash.text.prompts import load_prompts
from dflash.text.tokenizer import load_tokenizer
from dflash.training.cache.arrays import ArrayWriter
from dflash.weights.export import export_draft
from dflash.weights.load import new_draft, read_any_draft
from dflash.weights.snapshot import target_config
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

TEXT = ["--num-conversations=24", "--held-out=0.25", "--max-prompt-len=64", "--max-user-turn=40", "--seed=0"]
TEXT += ["--max-new-tokens=24", "--batch-size=16", "--target-layer-ids", "0", "2"]
STEPS = ["--steps=4", "--batch-size=8", "--num-anchors=4", "--save-every=2", "--vocab-chunk-size=260"]
WINDOWS = ["--form=windows", "--ctx-len=16", "--block-size=4", "--num-blocks=12"]
GENERATE = ["generate", "hi", "--target={s}", "--max-new-tokens=2", "--mode=greedy"]
EXPORT = ["export", "{s}", "{o}", "--target={target}"]
EVALUATE = ["evaluate", "{s}", "{draft}", "--target={target}", "--num-samples=4", "--vocab-chunk-size=260"]
SERVED = ["serve-bench", "--target={target}", "--num-prompts=1", "--max-new-tokens=3", "--rounds=1"]


@dataclasses.dataclass(frozen=True)
class Specimen:
    """`files` may be damaged, of those the `needed` ones can't be done without. `reads` is a command's words or a call.

    In words {s} is the damaged copy, {o} what is written, and other names are those of whole specimens.
    """

    name: str
    reads: list[str] | Callable[[Path], object]
    files: tuple[str, ...]
    needed: tuple[str, ...] = ()
    # The copy is what the command writes into: it may stay.
    resumes: bool = False


def _read_fork(path: Path) -> object:
    return read_any_draft(path, target=target_config(path.parent / "oss"))


SNAPSHOT = ("config.json", "model.safetensors")
TOKENS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
RUN = ("config.json", "metadata.json", "tensorstore_index.json", "model/fc/kernel/value/.zarray")
SPECIMENS = [
    Specimen("target", GENERATE, (*SNAPSHOT, *TOKENS), (*SNAPSHOT, "tokenizer.json", "tokenizer_config.json")),
    Specimen("shards", GENERATE, ("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
             ("model.safetensors.index.json", "model-00002-of-00002.safetensors")),
    Specimen("oss", GENERATE, SNAPSHOT, SNAPSHOT),
    Specimen("qwen3", GENERATE, SNAPSHOT[:1], SNAPSHOT[:1]),
    Specimen("easydel", GENERATE,
             ("config.json", "tensorstore_index.json", "model/model/norm/kernel/.zarray", "model/model/norm/kernel/0"),
             ("config.json", "tensorstore_index.json", "model/model/norm/kernel/.zarray", "model/model/norm/kernel/0")),
    Specimen("draft", EXPORT, SNAPSHOT, SNAPSHOT),
    Specimen("second", EXPORT, SNAPSHOT, SNAPSHOT),
    Specimen("sglang-jax", EXPORT, SNAPSHOT[:1], SNAPSHOT[:1]),
    Specimen("speculators", EXPORT, SNAPSHOT, SNAPSHOT),
    Specimen("run", [*EXPORT[:1], "{s}/run-4", *EXPORT[2:]],
             (*(f"run-4/{name}" for name in RUN), "run-4/model/fc/kernel/value/0.0", "run_config.json",
              "metrics.jsonl"),
             (*(f"run-4/{name}" for name in RUN if name != "metadata.json"), "run-4/model/fc/kernel/value/0.0")),
    Specimen("resumed", ["train", "{sequences}", "{s}", "--target={target}", *STEPS],
             (*(f"run-4/{name}" for name in RUN), "run_config.json", "metrics.jsonl"),
             ("run-4/config.json", "run-4/tensorstore_index.json"), resumes=True),
    Specimen("fork-run", _read_fork,
             ("run-1500/config.json", "run-1500/tensorstore_index.json", "run-1500/metadata.json",
              "run-1500/model/fc/kernel/value/0.0", "run_config.json"),
             ("run-1500/config.json", "run-1500/tensorstore_index.json")),
    Specimen("fork-export", _read_fork, ("config.json", "model.safetensors.index.json"),
             ("config.json", "model.safetensors.index.json")),
    Specimen("linen", _read_fork, ("meta.json", "step_000020/draft_params.msgpack"),
             ("meta.json", "step_000020/draft_params.msgpack")),
    Specimen("sequences", EVALUATE, ("meta.json", "features_u16.npy", "token_ids.npy", "sequence_start_i64.npy"),
             ("meta.json", "features_u16.npy", "token_ids.npy", "sequence_start_i64.npy")),
    # Of so few windows maybe none is held out.
    Specimen("windows", [*EVALUATE, "--rows=all"],
             ("meta.json", "target_ids.npy", "ctx_pos_start_i32.npy", "context_features_u16.npy"),
             ("meta.json", "target_ids.npy", "context_features_u16.npy")),
    Specimen("npz", [EVALUATE[0], "{s}/old.npz", *EVALUATE[2:], "--rows=all"], ("old.npz",), ("old.npz",)),
    Specimen("begun", ["build-cache", "{s}/cache", "--target={target}", *TEXT],
             tuple(f"cache.building/{name}" for name in
                   ("settings.json", "progress.json", "cache/conversations.jsonl", "cache/token_ids.npy")),
             ("cache.building/settings.json",), resumes=True),
    Specimen("texts", ["build-cache", "{o}", "--target={target}", "--prompts={s}/prompts.jsonl",
                       "--openings={s}/openings.jsonl", *TEXT, "--num-conversations=2", "--answers=given"],
             ("prompts.jsonl", "openings.jsonl"), ("prompts.jsonl", "openings.jsonl")),
    Specimen("report", ["report", "{s}/new.json", "{s}/old.json", "--out={o}"], ("new.json", "old.json"),
             ("new.json", "old.json")),
    Specimen("export-bencher", ["export-results", "{s}/new.json", "--format=bencher"], ("new.json",), ("new.json",)),
    Specimen("export-vllm", ["export-results", "{s}/new.json", "--format=vllm"], ("new.json",), ("new.json",)),
    Specimen("baselines", lambda path: read_baselines(path, "cpu"), ("cpu.json",)),
    Specimen("journal", lambda path: Journal(path / "x.cases.jsonl", resume=True), ("x.cases.jsonl",)),
    Specimen("server", [*SERVED, "--base-url={url}"], ("answers",)),
]  # fmt: skip


def run(*words: object) -> None:
    """A command that has to succeed."""
    sys.argv = ["dflash", *map(str, words)]
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = cli.main()
    if code:
        raise RuntimeError(f"{words}: {heard.getvalue()}")


def make(folder: Path) -> None:
    """Makes every specimen in a folder of its name."""
    stops = {"vocab_size": 260, "eos_token_id": [1, *range(100, 107)]}
    for name, family, more in (
        ("target", "llama", {}), ("shards", "llama", {"shards": 2}), ("qwen3", "qwen3", {}),
    ):  # fmt: skip
        target = write_tiny_tokenizer(write_tiny_target(folder / name, family, **stops, **more))
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": stops["eos_token_id"]}))
    oss = {"num_attention_heads": test_easydel_fork.HEADS, "rms_norm_eps": test_easydel_fork.EPS}
    write_tiny_tokenizer(write_tiny_target(folder / "oss", "gpt_oss", mxfp4=True, **stops, **oss))
    write_tiny_tokenizer(test_easydel.write_theirs(folder / "target", folder / "easydel"))
    _make_drafts(folder)
    _make_training(folder)
    _make_results(folder)
    (folder / "server").mkdir()
    (asked,) = load_prompts("builtin").take(1).encode(load_tokenizer(folder / "target"))
    (folder / "server" / "answers").write_bytes(
        b"".join(
            b"data: %b\n\n" % json.dumps(event).encode()
            for event in (
                {"choices": [{"text": "a", "token_ids": [5]}]},
                {"choices": [{"text": "b", "token_ids": [6]}]},
                {"choices": [{"text": "c", "token_ids": [7], "finish_reason": "length"}]},
                {"choices": [], "usage": {"prompt_tokens": len(asked), "completion_tokens": 3}},
            )
        )
        + b"data: [DONE]\n\n"
    )


def _make_drafts(folder: Path) -> None:
    target = load_target(folder / "target")
    draft = init_draft(target, num_layers=2, target_layer_ids=(0, 2), block_size=4)
    write_draft(draft, folder / "draft")
    for consumer in ("sglang-jax", "speculators"):
        export_draft(draft, folder / consumer, consumer=consumer, dtype="float32", target_dir=folder / "target")
    parts = {"conv": ConvConfig(kernel_size=3, group_size=32), "selector": SelectorConfig(rank=4, top_k=4)}
    second = new_draft(target.config, num_layers=1, block_size=4, target_layer_ids=(0, 2), **parts)
    write_draft(second, folder / "second")
    arrays = test_easydel_fork.draw()
    test_easydel_fork.write_fork_run(folder / "fork-run", arrays, test_easydel_fork.CONFIG | test_easydel_fork.WITH_IDS)
    notes = test_easydel_fork.NOTES
    test_easydel_fork.write_fork_export(folder / "fork-export", arrays, notes=notes, vocab_size=260)
    meta = test_easydel_fork.WITH_IDS | {"block_size": test_easydel_fork.BLOCK}
    test_easydel_fork.write_linen(folder / "linen", arrays, meta)


def _make_training(folder: Path) -> None:
    kept, finish = folder / "begun" / "cache.building", ArrayWriter.finish

    def keep_begun(writer: ArrayWriter, meta: dict) -> Path:
        if not kept.exists():
            shutil.copytree(writer._root, kept)
        return finish(writer, meta)

    ArrayWriter.finish = keep_begun
    try:
        run("build-cache", folder / "sequences", "--target", folder / "target", *TEXT)
    finally:
        ArrayWriter.finish = finish
    run("build-cache", folder / "windows", "--target", folder / "target", *TEXT, *WINDOWS)
    whole = {path.stem: np.load(path) for path in (folder / "windows").glob("*.npy")}
    (folder / "npz").mkdir()
    np.savez(folder / "npz" / "old.npz", meta=np.array((folder / "windows" / "meta.json").read_text()), **whole)
    run("train", folder / "sequences", folder / "run", "--target", folder / "target", *STEPS)
    shutil.copytree(folder / "run", folder / "resumed", ignore=shutil.ignore_patterns("run-2"))
    (folder / "texts").mkdir()
    prompts = [{"prompt": f"What is {i}?"} for i in range(3)]
    talks = [{"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": "No."}]}
             for p in prompts]  # fmt: skip
    for name, lines in (("prompts", talks), ("openings", ["How ", "Why ", "When "])):
        (folder / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _make_results(folder: Path) -> None:
    old, new = (sample_runs.file_of(sample_runs.sweep(tilt), when) for tilt, when in
                ((1.0, "2026-01-02T03:04:05+00:00"), (1.1, "2026-01-03T03:04:05+00:00")))  # fmt: skip
    for name in ("report", "export-bencher", "export-vllm", "baselines", "journal"):
        (folder / name).mkdir()
        (folder / name / "new.json").write_text(json.dumps(new))
        (folder / name / "old.json").write_text(json.dumps(old))
    from dflash.measuring.baselines import close_run

    case = sample_runs.case()
    assert status(case) == "ok", status(case)
    close_run([case, sample_runs.case(case="other")], folder / "baselines", update=True)
    journal = Journal(folder / "journal" / "x.cases.jsonl")
    for name in ("a", "b"):
        journal.add(Record(name * 64, case, [1.5, 1.25]))
