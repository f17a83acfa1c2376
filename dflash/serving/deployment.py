"""How the servers of a case are started, and, if nothing is drafted, why."""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash.serving.adapters import ADAPTERS, Adapter, Launch
from dflash.serving.client import Client
from dflash.serving.connection import Connection, ServingError, redacted
from dflash.serving.draft import ServedDraft, served_draft
from dflash.serving.options import ServerOptions
from dflash.serving.server import Server, free_port, started
from dflash.text.tokenizer import Tokenizer
from dflash.weights.config_json import read_target_config
from dflash.weights.load import target_directory
from dflash.weights.snapshot import holds_weights, read_json, snapshot_hash


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What is measured; `no_draft` says why nothing is drafted.

    `launch` is None where nothing is started here, `draft` where none is known, `target_sha256` when the served
    weights are not on this machine.
    """

    options: ServerOptions
    adapter: Adapter
    launch: Launch | None
    target: Path
    target_sha256: str | None
    draft: ServedDraft | None
    no_draft: str | None
    key: str = dataclasses.field(default="", repr=False)

    @property
    def server(self) -> str:
        """Kind and version, if they are known."""
        return f"{self.adapter.name} {self.launch.installed.version if self.launch else ''}".strip()

    @property
    def in_turn(self) -> bool:
        """Whether both servers are already running and are asked in turn, round by round."""
        return bool(self.options.draft_base_url)

    def command(self, *, drafting: bool, port: int) -> list[str]:
        """The whole command line of a server that is started here."""
        assert self.launch is not None
        added = f"{self.options.server_args} {self.options.draft_server_args if drafting else ''}"
        launch = self.launch if drafting else dataclasses.replace(self.launch, draft=None)
        return [self.options.server_python, *self.adapter.arguments(launch, port), *shlex.split(added)]

    def client(self, url: str, tokenizer: Tokenizer) -> Client:
        """The client for the server at a URL; without a model's name, it uses the only model of that server."""
        connection = Connection(url, timeout_s=self.options.request_timeout, key=self.key)
        model = self.options.served_model or ("" if self.options.base_url else str(self.target))
        return self.adapter.client(connection, model=model, tokenizer=tokenizer, sampling=self.options.sampling)

    @contextlib.contextmanager
    def open(self, *, drafting: bool) -> Iterator[Server]:
        """The server without a draft, or with one: started here, or already running. Raises ServingError."""
        url = self.options.draft_base_url if drafting else self.options.base_url
        if url:
            yield Server(url=url)
            return
        port = free_port()
        with started(
            self.command(drafting=drafting, port=port),
            f"http://127.0.0.1:{port}",
            log=self.options.server_logs / ("draft.log" if drafting else "target.log"),
            timeout_s=self.options.ready_timeout,
            secrets=(self.key,) if self.key else (),
        ) as server:
            yield server


def deployment(options: ServerOptions) -> Deployment:
    """Checks all that can be checked before a server is started. Raises ServingError, ConfigError or WeightsError."""
    key = _check(options)
    adapter = ADAPTERS[options.server]
    target = target_directory(options.target).resolve()
    config = read_json(target, "config.json")
    elsewhere = bool(options.base_url) and not holds_weights(target)
    if options.offline:
        _check_offline(options, config, target)
    draft = served_draft(options.draft, target, options.block_size) if options.draft else None
    launch = None
    if options.base_url:
        no_draft = None if options.draft_base_url else "no server drafts: --draft-base-url names one that does"
    else:
        installed = adapter.look(options.server_python)
        launch = Launch(installed=installed, target=target, config=config, draft=draft)
        no_draft = _why_no_draft(adapter, launch)
        faults = adapter.faults(launch) if no_draft is None else []
        if faults:
            raise ServingError(f"{adapter.name} can't serve {options.target} with this draft: {'; '.join(faults)}")
    return Deployment(
        options=options,
        adapter=adapter,
        launch=launch,
        target=target,
        target_sha256=None if elsewhere else snapshot_hash(target),
        draft=draft,
        no_draft=no_draft,
        key=key,
    )


def _check(options: ServerOptions) -> str:
    """The key of the servers, empty for none. Raises ServingError for options that make no sense together."""
    adapter = ADAPTERS[options.server]
    if not adapter.package and not options.base_url:
        raise ServingError("a server of unknown kind is not started here: give --base-url, or --server KIND")
    if options.draft_base_url and not options.base_url:
        raise ServingError("--draft-base-url is compared with a server without a draft: give its --base-url too")
    if options.base_url and (options.server_args or options.draft_server_args):
        raise ServingError(
            "arguments are for servers that are started here, and --base-url names one that runs already"
        )
    for words in (options.server_args, options.draft_server_args):
        try:
            shlex.split(words)
        except ValueError as error:
            raise ServingError(
                f"arguments of a server are words as in a shell, got {redacted(words)!r}: {error}"
            ) from None
    key = _key(options.key_variable)
    for url in filter(None, (options.base_url, options.draft_base_url)):
        Connection(url, timeout_s=options.request_timeout, key=key)
    return key


def _check_offline(options: ServerOptions, config: dict[str, Any], target: Path) -> None:
    """What is decoded here must be what is served. Raises ServingError or ConfigError."""
    if not options.draft:
        raise ServingError("--offline decodes here with the draft that is served: name it with --draft")
    if options.temperature:
        raise ServingError(
            f"--offline compares greedy decoding, got --temperature {options.temperature:g}: leave one of them out"
        )
    if not holds_weights(target):
        raise ServingError(f"--offline decodes here with the target, and {target} holds no weights: give a snapshot")
    read_target_config(config, str(target / "config.json"))


def _key(variable: str) -> str:
    """The value of the variable. Its name is not shown: it may be the key itself, given in the wrong place."""
    if not variable:
        return ""
    if not os.environ.get(variable):
        raise ServingError(
            "--key-variable is the NAME of a variable of the environment that holds the key, and no variable of the "
            "name that was given is set"
        )
    return os.environ[variable]


def _why_no_draft(adapter: Adapter, launch: Launch) -> str | None:
    """Why a server that is started here does not draft, in one clause; None if it does."""
    if launch.draft is None:
        return "no draft was given: --draft names one"
    if not adapter.can_draft:
        return f"{adapter.name} has no DFLASH"
    if not adapter.has_dflash(launch.installed):
        which = launch.installed.version or f"in {launch.installed.directory}"
        return f"{adapter.name} {which} has no DFLASH: install a version that has"
    return None
