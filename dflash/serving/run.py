"""One case: the same prompts sent to a server without a draft and to one with it, round by round.

Servers started here run one after the other, since a device may hold only one; servers already running are asked in
turn. Both clocks cover a whole round, from its first request to its last answer, with prefill, queue and transport.
docs/serving.md says what is compared.
"""

import asyncio
import contextlib
import dataclasses
import shlex
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dflash.config import ConfigError
from dflash.decoding.decode import RequestError
from dflash.host.provenance import redact
from dflash.measuring import gate
from dflash.measuring.interval import NO_SPEEDUP, speedup_figures
from dflash.measuring.result import Served, TokenPlace
from dflash.measuring.turns import is_out_of_memory, sentence_of
from dflash.serving import acceptance, conventions
from dflash.serving.adapters import Timed
from dflash.serving.client import Client, Completion
from dflash.serving.connection import ServingError, patiently
from dflash.serving.deployment import Deployment
from dflash.serving.results import origin
from dflash.serving.server import Server
from dflash.text.prompts import Prompt, PromptSet, ids_sha256
from dflash.text.tokenizer import Tokenizer
from dflash.weights.snapshot import WeightsError

# A process that dies closes its connections first.
_DYING_S = 0.5
# What a result says until `ServedRun.held_to_ours`, and for good if the run ends before.
NOT_YET = "the run ended before its prompts were decoded here"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Completions in the order of the prompts, and seconds from the first request to the end of the last answer."""

    completions: list[Completion]
    seconds: float

    def shares(self) -> list[float]:
        """The round's seconds divided over its prompts, in proportion to how long each request took."""
        total = sum(c.seconds for c in self.completions)
        return [self.seconds * c.seconds / total for c in self.completions]

    @property
    def counted(self) -> int:
        return sum(c.counted for c in self.completions)


async def _at_once(
    ask: Callable[[list[int]], Awaitable[Completion]], prompts: Sequence[list[int]], concurrency: int
) -> list[Completion]:
    """The completions in the order of the prompts, several requests at a time; the first failure ends them all."""
    places = asyncio.Semaphore(concurrency)

    async def completion(prompt: list[int]) -> Completion:
        async with places:
            return await ask(prompt)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(completion(prompt)) for prompt in prompts]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


class _Side:
    """One server and its rounds; `mark` is the state of its acceptance report before the timed ones."""

    def __init__(self, server: Server, client: Client, run: "ServedRun"):
        self.server, self.client, self._run = server, client, run
        self.rounds: list[Round] = []
        self.mark: Any = None
        with self._naming_death():
            client.learn(run.prompts[0], unnamed=str(run.deployment.target))

    @contextlib.contextmanager
    def _naming_death(self) -> Iterator[None]:
        """If a request failed because its server ended, says so, with the server's last words."""
        try:
            yield
        except ServingError as error:
            time.sleep(_DYING_S)
            death = self.server.death()
            raise ServingError(f"{death}; at that, {error}" if death else str(error)) from None

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the server says to each prompt, cut at the budget."""
        tokenizer = self.client.tokenizer
        asked = self._asked([prompt.encode(tokenizer) for prompt in prompts])
        return [tokenizer.decode(completion.tokens) for completion in asked.completions]

    def round(self) -> Round:
        """Every prompt once."""
        return self._asked(self._run.prompts)

    def _asked(self, prompts: Sequence[list[int]]) -> Round:
        """A round cut short by a busy server is taken again, so its seconds contain no waiting."""
        with self._naming_death():
            return patiently(lambda: asyncio.run(self._round(prompts)))

    async def _round(self, prompts: Sequence[list[int]]) -> Round:
        run = self._run
        begun = time.perf_counter()
        completions = await _at_once(lambda p: self.client.ask(p, run.max_new_tokens), prompts, run.concurrency)
        return Round(completions=completions, seconds=time.perf_counter() - begun)

    def take(self) -> None:
        self.rounds.append(self.round())

    def set_mark(self) -> None:
        self.mark = self._run.deployment.adapter.mark(self.server, self.client)

    @property
    def completions(self) -> list[Completion]:
        """The completions of the timed rounds."""
        return [completion for timed in self.rounds for completion in timed.completions]


class ServedRun:
    """The rounds of a case, of `served_run`. `cut_short` says what ended them early; those before it are kept.

    `prompts` are token ids, every turn a prompt of its own.
    """

    def __init__(self, deployment: Deployment, prompts: list[list[int]], max_new_tokens: int, concurrency: int):
        self.deployment, self.prompts = deployment, prompts
        self.max_new_tokens, self.concurrency = max_new_tokens, concurrency
        self.target: _Side
        self.draft: _Side | None = None
        self.cut_short: str | None = None
        self.accepted: acceptance.Figures = {}

    def baseline_round(self) -> None:
        """A timed round without a draft if both servers run; otherwise those were taken before."""
        if self.deployment.in_turn and self.draft is not None:
            self.target.take()

    def round(self) -> None:
        """A timed round with the draft, or without one if there is none."""
        (self.draft or self.target).take()

    def failures(self, case: Served, floors: gate.Floors, rounds: int) -> list[str]:
        """A sentence for each thing that fails the run: fewer than `rounds` rounds, different texts, a missed floor.

        A target alone and drawn texts prove nothing: that fails only a run that is held to a floor.
        """
        proven = self.deployment.no_draft is None and not self.deployment.options.sampling.temperature
        sentences = gate.failures(case, floors) if proven or floors != gate.Floors() else []
        if case.own_unknown or (case.own and case.own.gap):
            sentences = [*sentences, gate.own_line(case) or ""]
        if self.cut_short:
            return [f"{len(self.seconds)} of {rounds} rounds were taken, since {self.cut_short}", *sentences]
        return sentences

    @contextlib.contextmanager
    def keeping(self, side: _Side) -> Iterator[None]:
        """If a round of this side fails after the first, the rounds before it are kept. Raises ServingError."""
        try:
            yield
        except ServingError as error:
            if not side.rounds:
                raise
            self.cut_short = str(error)

    def measure(self, rounds: int) -> None:
        """That many rounds, or as many as succeed. Raises ServingError if none does."""
        with self.keeping(self.draft or self.target):
            for _ in range(rounds):
                self.baseline_round()
                self.round()

    @property
    def seconds(self) -> list[float]:
        """Seconds of the timed rounds with the draft, or without one if there is none."""
        return [r.seconds for r in (self.draft or self.target).rounds]

    def read_acceptance(self) -> acceptance.Figures:
        """What the second server has reported since its mark."""
        if self.draft is None:
            return acceptance.unknown("nothing was drafted")
        if self.deployment.draft is None:
            return acceptance.unknown("the block size is unknown: --draft names what the server drafts with")
        side = self.draft
        timed = Timed(server=side.server, client=side.client, completions=side.completions, mark=side.mark)
        try:
            return self.deployment.adapter.acceptance(timed, self.deployment.draft.block_size)
        except ServingError as error:
            return acceptance.unknown(str(error))

    def result(self, prompts: Mapping[str, Any]) -> Served:
        """The case's figures; None for those that a server does not report. `prompts` says where those are from.

        With --offline, `held_to_ours` adds what decoding here gives.
        """
        deployment, rounds = self.deployment, (self.draft or self.target).rounds
        lengths = [len(p) for p in self.prompts]
        drafted = self.draft.rounds if self.draft else []
        block_size = deployment.draft.block_size if deployment.draft and drafted else None
        timed = drafted and all(r.counted for r in self.target.rounds + drafted)
        case = Served(
            **origin(deployment, block_size, self.concurrency, self.max_new_tokens),
            **prompts,
            prompts_sha256=ids_sha256(self.prompts),
            mode="served",
            block_size=block_size,
            batch_size=self.concurrency,
            num_prompts=len(lengths),
            prompt_len=max(lengths),
            prompt_len_mean=sum(lengths) / len(lengths),
            max_new_tokens=self.max_new_tokens,
            dtype="as served",
            **self.accepted,
            num_output_tokens=rounds[-1].counted,
            tok_s_total=_rate(drafted),
            ttft_ms=_median_ms(drafted, lambda c: c.ttft_s),
            tpot_ms=_median_ms(drafted, _per_token),
            compile_s=None,
            rounds=len(rounds),
            baseline_tok_s_total=_rate(self.target.rounds),
            baseline_ttft_ms=_median_ms(self.target.rounds, lambda c: c.ttft_s),
            baseline_tpot_ms=_median_ms(self.target.rounds, _per_token),
            **(self._speedup() if timed else NO_SPEEDUP),
            server=deployment.server,
            server_commands=self._commands(),
            no_draft=deployment.no_draft,
            interleaved=deployment.in_turn,
            **self._compared(),
            alarm=self._alarm(),
            own_unknown=self._not_held(),
            status="ok",
        )
        return dataclasses.replace(case, status=gate.status(case))

    def held_to_ours(self, case: Served) -> Served:
        """The case with our own acceptance beside the server's, where --offline asks for it.

        That takes minutes, and memory for the target: write the case down before.
        """
        if case.own_unknown != NOT_YET:
            return case
        assert self.draft is not None
        assert self.deployment.draft is not None
        try:
            own = conventions.own_figures(
                self.deployment.target,
                self.deployment.draft,
                self.prompts,
                max_new_tokens=self.max_new_tokens,
                stop_token_ids=self.draft.client.tokenizer.stop_token_ids,
            )
            held = conventions.held_to_ours(self.accepted, len(self.draft.rounds), own)
        except (ConfigError, WeightsError, RequestError) as error:
            return dataclasses.replace(case, own_unknown=str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return dataclasses.replace(case, own_unknown=sentence_of(error))
        return dataclasses.replace(case, own=held, own_unknown=None)

    def _not_held(self) -> str | None:
        """Why the server's acceptance is not held to ours, until it is; None where nobody asked for that."""
        if not self.deployment.options.offline:
            return None
        return self.cut_short or self.accepted["acceptance_unknown"] or NOT_YET

    def _alarm(self) -> Literal["hardly-accepted"] | None:
        rate = self.accepted["accept_rate"]
        return "hardly-accepted" if rate is not None and rate <= gate.HARDLY_ACCEPTED else None

    def _commands(self) -> list[str]:
        """The commands that started the servers, without secrets; empty if they were already running."""
        if self.deployment.options.base_url:
            return []
        sides = [False] if self.draft is None else [False, True]
        secrets = (self.deployment.key,) if self.deployment.key else ()
        return [shlex.join(redact(self.deployment.command(drafting=d, port=0), secrets)) for d in sides]

    def _differing(self, side: _Side | None) -> list[TokenPlace]:
        """Where completions of a server differ from the target's of its first round: prompt and token, from 0."""
        expected = self.target.rounds[0].completions
        return [
            TokenPlace(prompt=prompt, token=token)
            for taken in (side.rounds if side else [])
            for prompt, (a, b) in enumerate(zip(expected, taken.completions, strict=True))
            if (token := a.divergence(b, self.max_new_tokens)) is not None
        ]

    def _compared(self) -> dict[str, Any]:
        """Whether all completions of a prompt are the same, and how they were compared."""
        completions = [c for side in (self.target, self.draft) if side for c in side.completions]
        over = sum(c.emitted > self.max_new_tokens for c in completions)
        if self.deployment.options.sampling.temperature:
            facts = {"compared": "nothing: texts are drawn", "over_budget": over}
            return facts | {"lossless": None, "first_divergence": None}
        differing = self._differing(self.draft)
        return {
            "compared": "token ids" if all(c.exact for c in completions) else "texts, encoded again",
            "over_budget": over,
            # A target that answers differently when asked again can't be compared with anything.
            "target_repeats_itself": not self._differing(self.target),
            "lossless": not differing if self.draft else None,
            "prompts_equal": len(self.prompts) - len({place.prompt for place in differing}) if self.draft else None,
            "first_divergence": differing[0] if differing else None,
        }

    def _speedup(self) -> dict[str, Any]:
        """Seconds per token, target over draft, with intervals; after a difference texts may differ in length."""
        assert self.draft is not None
        count = min(len(self.target.rounds), len(self.draft.rounds))
        before, after = (
            np.array([r.shares() for r in side.rounds[:count]]) / np.array([[r.counted] for r in side.rounds[:count]])
            for side in (self.target, self.draft)
        )
        return speedup_figures(before, after)


def _rate(rounds: Sequence[Round]) -> float | None:
    return float(np.median([r.counted / r.seconds for r in rounds])) if rounds else None


def _per_token(completion: Completion) -> float | None:
    extra = completion.counted - 1
    return (completion.seconds - completion.ttft_s) / extra if extra > 0 else None


def _median_ms(rounds: Sequence[Round], of: Callable[[Completion], float | None]) -> float | None:
    seconds = [value for r in rounds for c in r.completions if (value := of(c)) is not None]
    return 1000 * float(np.median(seconds)) if seconds else None


@contextlib.contextmanager
def served_run(
    deployment: Deployment,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    *,
    max_new_tokens: int,
    concurrency: int,
    rounds: int,
) -> Iterator[ServedRun]:
    """A run with warm servers, for `rounds` rounds; starts what is not yet running.

    A later turn follows the answer that the server without a draft gave to the one before when it was warmed up. So
    both servers are asked the same, and a turn can be compared although an earlier one differs.

    Where both are started here, the target's own rounds are taken, and its server is ended, before this returns. Raises
    ServingError, PromptError and TokenizerError.
    """
    run = ServedRun(deployment, prompts.encode(tokenizer), max_new_tokens, concurrency)

    def warmed(server: Server, drafting: bool = False) -> _Side:
        side = _Side(server, deployment.client(server.url, tokenizer), run)
        if not drafting:
            run.prompts = prompts.turn_by_turn(side.answers).encode(tokenizer)
        side.round()
        return side

    with contextlib.ExitStack() as stack:
        if deployment.no_draft is not None:
            run.target = warmed(stack.enter_context(deployment.open(drafting=False)))
        elif deployment.in_turn:
            run.target = warmed(stack.enter_context(deployment.open(drafting=False)))
            run.draft = warmed(stack.enter_context(deployment.open(drafting=True)), drafting=True)
        else:
            with deployment.open(drafting=False) as server:
                run.target = warmed(server)
                with run.keeping(run.target):
                    for _ in range(rounds):
                        run.target.take()
            run.draft = warmed(stack.enter_context(deployment.open(drafting=True)), drafting=True)
        if run.draft is not None:
            run.draft.set_mark()
        yield run
        run.accepted = run.read_acceptance()
