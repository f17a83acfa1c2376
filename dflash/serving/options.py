"""The servers of a case as options: of `serve-bench`, and of pytest under the same names."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal, get_args

from dflash.config import BlockSize, Positive
from dflash.decoding.sampling import Sampling, SamplingOptions

ServerKind = Literal["sglang-jax", "sglang", "vllm", "transformers", "openai"]
SERVERS: tuple[str, ...] = get_args(ServerKind)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions(SamplingOptions):
    """Servers are started with `server_python`, or already run at `base_url` and `draft_base_url`."""

    server: ServerKind = "openai"
    """Kind of server; `openai` is one of unknown kind, at --base-url."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target, which is served; its tokenizer is used here."""
    draft: str = ""
    """DFlashDraftModel directory, or smollm2-135m-plain, the draft for servers that comes with the project; without one
    the target alone is measured."""
    block_size: BlockSize | None = None
    """Block size, the anchor included; by default the draft's own."""
    server_python: str = sys.executable
    """Python interpreter that has the server; by default this one."""
    server_args: str = ""
    """Words added to the command line of both servers, as in a shell."""
    draft_server_args: str = ""
    """Words added to that of the server with the draft."""
    base_url: str = ""
    """A server without a draft that runs already, instead of one started here; with or without /v1 at its end."""
    draft_base_url: str = ""
    """The same of a server with the draft."""
    served_model: str = ""
    """Name of the model in requests; by default what is served."""
    key_variable: str = ""
    """Variable of the environment that holds the key of the servers."""
    offline: bool = False
    """Decode the prompts here too, and fail where the server accepts more or less than that; says what explains it."""
    ready_timeout: Positive = 900.0
    """Seconds until a server must be ready."""
    request_timeout: Positive = 900.0
    """Seconds that an answer may take in all."""
    server_logs: Path = Path("server-logs")
    """Directory of the logs, target.log and draft.log."""

    @property
    def sampling(self) -> Sampling:
        """How the servers choose tokens."""
        return Sampling.of(self)
