"""`python -m dflash build-cache`: target -> teacher cache."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dflash.cli.option import refuse_unused
from dflash.cli.target import TargetOptions
from dflash.cli.template import TemplateOptions, refuse_unused_template
from dflash.config import Computed, Count, Index, build_target_layer_ids
from dflash.easydel import load
from dflash.easydel.teacher import TeacherReader, load_teacher
from dflash.training.cache.build_sequences import build_sequences
from dflash.training.cache.build_windows import WindowConfig, build_windows
from dflash.training.cache.conversations import ConversationConfig
from dflash.training.cache.source import CacheSource
from dflash.weights.load import name_from_anywhere, target_directory
from dflash.weights.snapshot import snapshot_hash


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildCache(TargetOptions):
    """What `build-cache` takes."""

    out_dir: Annotated[Path, tyro.conf.Positional]
    """New directory for the cache."""
    form: Literal["sequences", "windows"] = "sequences"
    """sequences: one row of features per token, many anchors drawn when training. windows: one context window and one
    anchor per sample, as other programs read it."""
    dtype: Computed | None = None
    """Dtype that the target computes in (bfloat16 on an accelerator, float32 on a CPU); features are stored in
    bfloat16."""
    teacher: Literal["dflash", "easydel"] = "dflash"
    """Whose forward gives the features: ours, or EasyDeL's with its deviations corrected (audit-teacher shows them).
    The text is always the target's own."""
    num_context_features: Count = 4
    """Number of layers of the target that the draft reads, evenly spread."""
    target_layer_ids: tuple[Index, ...] = ()
    """Layers whose outputs the draft reads, instead of num-context-features."""
    template: tyro.conf.OmitArgPrefixes[TemplateOptions] = dataclasses.field(default_factory=TemplateOptions)
    conversations: tyro.conf.OmitArgPrefixes[ConversationConfig]
    windows: tyro.conf.OmitArgPrefixes[WindowConfig]


def _check_unused(args: BuildCache) -> None:
    """Raises ConfigError for options that this cache would ignore."""
    texts, windows = args.conversations, args.windows
    if texts.source == "self":
        unused = ["prompt_template", "raw"]
        refuse_unused(args, unused, "for given prompts (--prompts), and the target writes these itself")
    if texts.answers == "given":
        refuse_unused(args, ["temperature"], "for answers that the target writes, and these are given")
    refuse_unused_template(args, texts.raw)
    if args.form == "sequences":
        names = [field.name for field in dataclasses.fields(windows) if field.name != "position_offsets"]
        refuse_unused(args, names, "for --form windows, and these are sequences")
        return
    if windows.rollout_steps == 1:
        refuse_unused(args, ["accept_len_mode"], "for --rollout-steps above 1, and this is 1")
    if windows.accept_len_mode != "geometric":
        mode = windows.accept_len_mode
        refuse_unused(args, ["accept_len_p"], f"for --rollout-accept-len-mode geometric, and this is {mode}")
    if len(windows.position_offsets) < 2:
        refuse_unused(args, ["position_offset_mode"], "for several --position-offsets, and there is one")


def build_cache(args: Annotated[BuildCache, tyro.conf.arg(name="")]) -> None:
    """Let the target write and answer prompts, and store its hidden states of every token."""
    _check_unused(args)
    if args.teacher == "easydel":
        load()  # fail before reading a large target
    _, target = args.open()
    directory = target_directory(args.target)
    source = CacheSource(
        target=target,
        tokenizer=args.template.open(args.target),
        snapshot_dir=name_from_anywhere(args.target),
        snapshot_hash=snapshot_hash(directory),
    )
    if args.teacher == "easydel":
        forward = load_teacher(target, directory)
        source = dataclasses.replace(source, name=forward.name, make_reader=partial(TeacherReader, forward))
    ids = args.target_layer_ids or build_target_layer_ids(target.config.num_layers, args.num_context_features)
    texts, windows = args.conversations, args.windows
    if args.form == "sequences":
        # Sequences are read whole, so an eighth of the rows gives enough columns.
        size, offsets = max(texts.batch_size // 8, 1), windows.position_offsets
        out = build_sequences(source, args.out_dir, texts, layer_ids=ids, position_offsets=offsets, batch_size=size)
    else:
        out = build_windows(source, args.out_dir, texts, windows, layer_ids=ids, batch_size=texts.batch_size)
    print(f"teacher cache: {out}")
