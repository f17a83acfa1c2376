"""What differs between servers, one class each: command line, limits, and where it reports acceptance.

The installed version is read from disk: nothing of a server is imported, and no device is opened. docs/serving.md says
which versions this was taken from and tried with.
"""

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflash.serving import acceptance
from dflash.serving.client import Client, Completion, OpenAIClient, SglangClient
from dflash.serving.connection import RejectedError, ServingError
from dflash.serving.draft import ServedDraft
from dflash.serving.server import Server
from dflash.weights.export import reader_faults

_HOST = "127.0.0.1"
_LOOK_S = 60
# Runs in the server's interpreter with only the standard library; a package is found, not imported.
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
    """A server's package on disk; `version` is empty for a checkout that was not installed."""

    version: str
    directory: Path

    def says(self, path: str, text: str) -> bool:
        """Whether a file of the package exists and holds this text."""
        file = self.directory / path
        return file.is_file() and text in file.read_text(encoding="utf-8", errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What to start: which package, on which snapshot directory with which config.json, with a draft or not."""

    installed: Installed
    target: Path
    config: dict[str, Any]
    draft: ServedDraft | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """What acceptance is read from: a server after its timed rounds, their completions, and the mark before them."""

    server: Server
    client: Client
    completions: Sequence[Completion]
    mark: Any

    @property
    def emitted(self) -> int:
        return sum(completion.emitted for completion in self.completions)


class Adapter:
    """A kind of server; this base class is for one of which nothing more is known.

    name                   in options and results
    package, distribution  its import name and its name on PyPI; empty for what can't be started here
    client                 how it is asked
    can_draft              whether any version of it can decode with a draft
    """

    name = "openai"
    package = distribution = ""
    client: type[Client] = OpenAIClient
    can_draft = True

    def look(self, python: str) -> Installed:
        """The package that `python` would import. Raises ServingError without such a server or interpreter."""
        try:
            output = subprocess.run(
                [python, "-c", _LOOK, self.package, self.distribution],
                capture_output=True,
                text=True,
                errors="replace",
                check=True,
                timeout=_LOOK_S,
            ).stdout
            version, folders = json.loads(output)
        # Another program than Python may print anything.
        except (OSError, subprocess.SubprocessError, ValueError, TypeError, RecursionError) as error:
            # Of a command that failed, its last line: the error itself holds the whole script.
            last = (getattr(error, "stderr", None) or "").strip().rpartition("\n")[2] or type(error).__name__
            reason = getattr(error, "strerror", None) or last
            raise ServingError(
                f"--server-python names the Python interpreter that has the server; {python}: {reason}"
            ) from None
        if not folders:
            raise ServingError(
                f"{python} has no {self.distribution} to start: install it there, or name the interpreter that has it "
                "with --server-python"
            )
        return Installed(version=version, directory=Path(folders[0]))

    def arguments(self, launch: Launch, port: int) -> list[str]:
        """The command line after the interpreter."""
        return [*self.command(launch), "--host", _HOST, "--port", str(port)]

    def command(self, launch: Launch) -> list[str]:
        """The same without host and port."""
        raise NotImplementedError

    def has_dflash(self, installed: Installed) -> bool:
        """Whether this version can decode with a draft."""
        return False

    def faults(self, launch: Launch) -> list[str]:
        """Why it can't serve the target or the draft."""
        return []

    def mark(self, server: Server, client: Client) -> Any:
        """The current state of its acceptance report."""
        return None

    def acceptance(self, timed: Timed, block_size: int) -> acceptance.Figures:
        """What it reports about the timed rounds since their mark."""
        return acceptance.unknown("an OpenAI API reports no acceptance; --server names a kind of server that does")


class SglangJax(Adapter):
    name, package, distribution = "sglang-jax", "sgl_jax", "sglang-jax"
    client = SglangClient

    def command(self, launch: Launch) -> list[str]:
        installed, draft = launch.installed, launch.draft
        # Acceptance is only in the log, by default one line every 40 steps.
        words = ["-m", "sgl_jax.launch_server", "--model-path", str(launch.target), "--decode-log-interval", "1"]
        upstream = self._is_upstream(installed)
        if not upstream and self.has_dflash(installed):
            # The fork can't reuse prefixes with a draft, and rounds repeat their prompts, so neither server reuses any.
            words += ["--disable-radix-cache"]
        if draft is None:
            return words
        words += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft.directory)]
        words += ["--speculative-num-draft-tokens", str(draft.block_size), "--grammar-backend", "none"]
        if upstream:
            # The defaults, 4 and 5, are for other algorithms and refused with this one.
            return [*words, "--speculative-num-steps", "1", "--speculative-eagle-topk", "1"]
        return [*words, "--page-size", "1", "--disable-overlap-schedule"]

    def _is_upstream(self, installed: Installed) -> bool:
        """Whether this is upstream's DFLASH, not the earlier fork's: its rules are in the argument parser."""
        return installed.says("srt/server_args.py", "DFLASH requires --speculative-eagle-topk=1")

    def has_dflash(self, installed: Installed) -> bool:
        return installed.says("srt/server_args.py", '"DFLASH"')

    def faults(self, launch: Launch) -> list[str]:
        target, draft = launch.config, launch.draft
        if draft is None or not self._is_upstream(launch.installed):
            return []
        faults = []
        kind = target.get("architectures")
        if kind and kind not in (["Qwen3ForCausalLM"], ["LlamaForCausalLM"]):
            faults.append(f"it gives a draft the hidden states of Qwen3 and Llama targets alone, and this is {kind}")
        if target.get("tie_word_embeddings"):
            faults.append("it gives a draft the target's own lm_head, and this target's is tied to its embeddings")
        return faults + reader_faults(draft.config, "sglang-jax")

    def mark(self, server: Server, client: Client) -> int:
        return server.log_size()

    def acceptance(self, timed: Timed, block_size: int) -> acceptance.Figures:
        if timed.server.log is None:
            return acceptance.unknown("sglang-jax writes it only to its log, and this one was started elsewhere")
        return acceptance.of_sglang_jax(timed.server.read_log(timed.mark), block_size)


class Sglang(Adapter):
    name = package = distribution = "sglang"
    client = SglangClient

    def command(self, launch: Launch) -> list[str]:
        words, draft = ["-m", "sglang.launch_server", "--model-path", str(launch.target)], launch.draft
        if draft is None:
            return words
        words += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft.directory)]
        return [*words, "--speculative-num-draft-tokens", str(draft.block_size)]

    def has_dflash(self, installed: Installed) -> bool:
        return installed.says("srt/speculative/spec_info.py", "DFLASH")

    def acceptance(self, timed: Timed, block_size: int) -> acceptance.Figures:
        metas = [completion.meta for completion in timed.completions]
        return acceptance.of_sglang(metas, block_size, timed.emitted)


class Vllm(Adapter):
    name = package = distribution = "vllm"

    def command(self, launch: Launch) -> list[str]:
        words, draft = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.target)], launch.draft
        if draft is None:
            return words
        # Drafted tokens, so the anchor does not count.
        settings = {"method": "dflash", "model": str(draft.directory), "num_speculative_tokens": draft.block_size - 1}
        return [*words, "--speculative-config", json.dumps(settings)]

    def has_dflash(self, installed: Installed) -> bool:
        return (installed.directory / "v1" / "spec_decode" / "dflash.py").is_file()

    def faults(self, launch: Launch) -> list[str]:
        own = (launch.draft.raw.get("dflash_config") or {}) if launch.draft else {}
        missing = [name for name in ("mask_token_id", "target_layer_ids") if own.get(name) is None]
        if missing and launch.draft:
            return [
                f"it reads {' and '.join(missing)} from dflash_config alone, takes others without, and this has none"
            ]
        return []

    def mark(self, server: Server, client: Client) -> str:
        """Its page of counters; empty if it has none."""
        try:
            return client.connection.page("/metrics")
        except RejectedError:
            return ""

    def acceptance(self, timed: Timed, block_size: int) -> acceptance.Figures:
        after = self.mark(timed.server, timed.client)
        return acceptance.of_vllm(timed.mark, after, block_size, timed.emitted)


class Transformers(Adapter):
    name = package = distribution = "transformers"
    can_draft = False

    def command(self, launch: Launch) -> list[str]:
        return ["-m", "transformers.cli.transformers", "serve", str(launch.target)]


ADAPTERS = {adapter.name: adapter for adapter in (SglangJax(), Sglang(), Vllm(), Transformers(), Adapter())}
