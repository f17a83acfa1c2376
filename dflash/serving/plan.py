"""Which servers a case measures, with what words they are started, and why nothing is drafted where nothing is."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from dflash.serving import draft as drafts
from dflash.serving.adapters import ADAPTERS, Adapter, Launch
from dflash.serving.draft import Draft
from dflash.serving.server import Server, ServingError, free_port, started
from dflash.weights.load import draft_directory, target_directory
from dflash.weights.snapshot import read_json

# A server of unknown kind, which speaks OpenAI's API and is only asked.
OPENAI = "openai"
SERVERS = (*ADAPTERS, OPENAI)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a user asks for. Servers are started with `python`, or run already at `base_url` and `draft_base_url`.

    Without a `draft` nothing is drafted: no server can read the one that comes with a target. `arguments`
    are added to the command line of both servers, `draft_arguments` to the second's. `served_model` is the name in
    requests, `key_variable` a variable of the environment with the key of the URLs.
    """

    server: str
    target: str
    draft: str = ""
    block_size: int | None = None
    python: str = sys.executable
    arguments: str = ""
    draft_arguments: str = ""
    base_url: str = ""
    draft_base_url: str = ""
    served_model: str = ""
    key_variable: str = ""
    ready_timeout_s: float = 900.0
    request_timeout_s: float = 900.0
    log_dir: Path = Path("server-logs")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured; `no_draft` says why nothing drafts.

    `adapter` is None for OPENAI, `launch` where nothing is started here, `draft` where none is known.
    """

    asked: Request
    adapter: Adapter | None
    launch: Launch | None
    target: Path
    draft: Draft | None
    no_draft: str | None
    key: str = ""

    @property
    def server(self) -> str:
        """Kind and version, as far as they are known."""
        return f"{self.asked.server} {self.launch.installed.version if self.launch else ''}".strip()

    @property
    def served_model(self) -> str:
        """The name in requests; empty where the server must be asked for it."""
        return self.asked.served_model or ("" if self.asked.base_url else str(self.target))

    def command(self, *, drafting: bool, port: int) -> list[str]:
        """The whole command line of a server that is started here."""
        assert self.adapter is not None
        assert self.launch is not None
        added = f"{self.asked.arguments} {self.asked.draft_arguments if drafting else ''}"
        launch = self.launch if drafting else dataclasses.replace(self.launch, draft=None)
        words = self.adapter.arguments(launch, port)
        return [self.asked.python, *words, *shlex.split(added)]

    @contextlib.contextmanager
    def open(self, *, drafting: bool) -> Iterator[Server]:
        """The server without a draft, or with one: started, or as it runs already. Raises ServingError."""
        url = self.asked.draft_base_url if drafting else self.asked.base_url
        if url:
            yield Server(url=url)
            return
        assert self.adapter is not None
        port = free_port()
        with started(
            self.command(drafting=drafting, port=port),
            f"http://127.0.0.1:{port}",
            health=self.adapter.health,
            log=self.asked.log_dir / ("draft.log" if drafting else "target.log"),
            timeout_s=self.asked.ready_timeout_s,
        ) as server:
            yield server


def make_plan(asked: Request) -> Plan:
    """Checks all that can be checked before a server is started. Raises ServingError, ConfigError or WeightsError."""
    _check(asked)
    target = target_directory(asked.target).resolve()
    config = read_json(target, "config.json")
    draft = drafts.load(draft_directory(asked.draft), target, asked.block_size) if asked.draft else None
    adapter, launch, no_draft = ADAPTERS.get(asked.server), None, None
    if asked.base_url:
        no_draft = None if asked.draft_base_url else "no server drafts: --draft-base-url names one that does"
    elif adapter is not None:
        launch = Launch(installed=adapter.look(asked.python), target=target, config=config, draft=draft)
        no_draft = _why_no_draft(asked.server, adapter, launch)
        faults = adapter.faults(launch) if adapter.faults and no_draft is None else []
        if faults:
            raise ServingError(f"{asked.server} can't serve {asked.target} with this draft: {'; '.join(faults)}")
    key = os.environ[asked.key_variable] if asked.key_variable else ""
    return Plan(asked=asked, adapter=adapter, launch=launch, target=target, draft=draft, no_draft=no_draft, key=key)


def _check(asked: Request) -> None:
    if asked.server not in SERVERS:
        raise ServingError(f"a server is one of {', '.join(SERVERS)}, got {asked.server!r}")
    if asked.server == OPENAI and not asked.base_url:
        raise ServingError("a server of unknown kind is not started here: give --base-url, or --server KIND")
    if asked.draft_base_url and not asked.base_url:
        raise ServingError("--draft-base-url is compared with a server without a draft: give its --base-url too")
    if asked.base_url and (asked.arguments or asked.draft_arguments):
        raise ServingError(
            "arguments are for servers that are started here, and --base-url names one that runs already"
        )
    for url in filter(None, (asked.base_url, asked.draft_base_url)):
        if not url.startswith(("http://", "https://")):
            raise ServingError(f"a URL of a server starts with http:// or https://, got {url!r}")
    if asked.key_variable and asked.key_variable not in os.environ:
        raise ServingError(f"--key-variable names a variable of the environment, and {asked.key_variable} is not set")
    for words in (asked.arguments, asked.draft_arguments):
        try:
            shlex.split(words)
        except ValueError as error:
            raise ServingError(f"arguments of a server are words as in a shell, got {words!r}: {error}") from None


def _why_no_draft(server: str, adapter: Adapter, launch: Launch) -> str | None:
    """Why what is started here does not draft, in one clause; None where it does."""
    if launch.draft is None:
        return "no draft was given: --draft names one"
    if adapter.has_dflash is None:
        return f"{server} has no DFLASH"
    if not adapter.has_dflash(launch.installed):
        which = launch.installed.version or f"in {launch.installed.directory}"
        return f"{server} {which} has no DFLASH: install a version that has"
    return None
