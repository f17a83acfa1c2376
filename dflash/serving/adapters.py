"""Which command line starts which server with and without a draft, and what that server can't do.

What is installed is looked at on disk: nothing of a server is imported, and no device is opened. docs/serving.md says
which versions this was read from and tried with.
"""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash.serving.client import Api
from dflash.serving.draft import Draft
from dflash.serving.server import ServingError
from dflash.weights.export import reader_faults

_HOST = "127.0.0.1"
_LOOK_S = 60
# Runs in the server's interpreter, with the standard library alone; a package is found, not imported.
_LOOK = """
import importlib.metadata, importlib.util, json, sys
spec = importlib.util.find_spec(sys.argv[1])
try:
    version = importlib.metadata.version(sys.argv[2])
except importlib.metadata.PackageNotFoundError:
    version = ""
print(json.dumps([version, spec and list(spec.submodule_search_locations or [])]))
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """A server's package as it lies on disk; `version` is empty for a checkout that was not installed."""

    version: str
    directory: Path

    def says(self, path: str, text: str) -> bool:
        """Whether a file of the package exists and holds this text."""
        file = self.directory / path
        return file.is_file() and text in file.read_text(encoding="utf-8", errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What is to be started: which package, on which snapshot directory with which config.json, with a draft or not."""

    installed: Installed
    target: Path
    config: dict[str, Any]
    draft: Draft | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One kind of server.

    package, distribution  its import name and its name on PyPI
    command                arguments after the interpreter
    has_dflash             whether this version can decode with a draft; None: no version can
    faults                 what of a target or a draft it can't serve; None: nothing is known of that
    """

    package: str
    distribution: str
    api: Api
    health: str
    command: Callable[[Launch], list[str]]
    has_dflash: Callable[[Installed], bool] | None = None
    faults: Callable[[Launch], list[str]] | None = None

    def look(self, python: str) -> Installed:
        """What `python` would import. Raises ServingError when it has no such server, or is no interpreter."""
        try:
            looked = subprocess.run(
                [python, "-c", _LOOK, self.package, self.distribution],
                capture_output=True,
                text=True,
                check=True,
                timeout=_LOOK_S,
            )
            version, found = json.loads(looked.stdout)
        except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
            # Of a command that failed, what it said last: the error itself holds the whole script.
            said = (getattr(error, "stderr", None) or "").strip().rpartition("\n")[2] or type(error).__name__
            reason = getattr(error, "strerror", None) or said
            raise ServingError(
                f"--server-python names the Python interpreter that has the server; {python}: {reason}"
            ) from None
        if not found:
            raise ServingError(
                f"{python} has no {self.distribution} to start: install it there, or name the interpreter that has it "
                "with --server-python"
            )
        return Installed(version=version, directory=Path(found[0]))

    def arguments(self, launch: Launch, port: int) -> list[str]:
        """The command line after the interpreter."""
        return [*self.command(launch), "--host", _HOST, "--port", str(port)]


# ---- sglang-jax


def _is_upstream(installed: Installed) -> bool:
    """Upstream's DFLASH, and not the fork's that came before it: its rules stand in the argument parser."""
    return installed.says("srt/server_args.py", "DFLASH requires --speculative-eagle-topk=1")


def _sglang_jax(launch: Launch) -> list[str]:
    installed, draft = launch.installed, launch.draft
    # Acceptance stands in the log alone, a line every 40 steps unless told otherwise.
    words = ["-m", "sgl_jax.launch_server", "--model-path", str(launch.target), "--decode-log-interval", "1"]
    upstream = _is_upstream(installed)
    if not upstream and _sglang_jax_has_dflash(installed):
        # The fork can't reuse prefixes with a draft, and rounds repeat their prompts: neither server reuses any.
        words += ["--disable-radix-cache"]
    if draft is None:
        return words
    words += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft.directory)]
    words += ["--speculative-num-draft-tokens", str(draft.block_size), "--grammar-backend", "none"]
    if upstream:
        # The defaults, 4 and 5, are for other algorithms, and refused with this one.
        return [*words, "--speculative-num-steps", "1", "--speculative-eagle-topk", "1"]
    return [*words, "--page-size", "1", "--disable-overlap-schedule"]


def _sglang_jax_has_dflash(installed: Installed) -> bool:
    return installed.says("srt/server_args.py", '"DFLASH"')


def _sglang_jax_faults(launch: Launch) -> list[str]:
    target, draft = launch.config, launch.draft
    if draft is None or not _is_upstream(launch.installed):
        return []
    faults = []
    kinds = [k for k in target.get("architectures") or [] if k not in ("Qwen3ForCausalLM", "LlamaForCausalLM")]
    if kinds:
        faults.append(f"it gives a draft the hidden states of Qwen3 and Llama targets alone, and this is {kinds[0]}")
    if target.get("tie_word_embeddings"):
        faults.append("it gives a draft the target's own lm_head, and this target's is tied to its embeddings")
    return faults + reader_faults(draft.config, "sglang-jax")


# ---- SGLang


def _sglang(launch: Launch) -> list[str]:
    words, draft = ["-m", "sglang.launch_server", "--model-path", str(launch.target)], launch.draft
    if draft is None:
        return words
    words += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft.directory)]
    return [*words, "--speculative-num-draft-tokens", str(draft.block_size)]


def _sglang_has_dflash(installed: Installed) -> bool:
    return installed.says("srt/speculative/spec_info.py", "DFLASH")


# ---- vLLM


def _vllm(launch: Launch) -> list[str]:
    words, draft = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.target)], launch.draft
    if draft is None:
        return words
    # Drafted tokens, so the anchor is not among them.
    settings = {"method": "dflash", "model": str(draft.directory), "num_speculative_tokens": draft.block_size - 1}
    return [*words, "--speculative-config", json.dumps(settings)]


def _vllm_has_dflash(installed: Installed) -> bool:
    return (installed.directory / "v1" / "spec_decode" / "dflash.py").is_file()


def _vllm_faults(launch: Launch) -> list[str]:
    own = (launch.draft.raw.get("dflash_config") or {}) if launch.draft else {}
    missing = [name for name in ("mask_token_id", "target_layer_ids") if own.get(name) is None]
    if missing and launch.draft:
        return [f"it reads {' and '.join(missing)} from dflash_config alone, takes others without, and this has none"]
    return []


# ---- transformers


def _transformers(launch: Launch) -> list[str]:
    return ["-m", "transformers.cli.transformers", "serve", str(launch.target)]


ADAPTERS = {
    "sglang-jax": Adapter(
        package="sgl_jax",
        distribution="sglang-jax",
        api="sglang",
        health="/health",
        has_dflash=_sglang_jax_has_dflash,
        command=_sglang_jax,
        faults=_sglang_jax_faults,
    ),
    "sglang": Adapter(
        package="sglang",
        distribution="sglang",
        api="sglang",
        health="/health",
        has_dflash=_sglang_has_dflash,
        command=_sglang,
    ),
    "vllm": Adapter(
        package="vllm",
        distribution="vllm",
        api="openai",
        health="/health",
        has_dflash=_vllm_has_dflash,
        command=_vllm,
        faults=_vllm_faults,
    ),
    "transformers": Adapter(
        package="transformers",
        distribution="transformers",
        api="openai",
        health="/health",
        command=_transformers,
    ),
}
