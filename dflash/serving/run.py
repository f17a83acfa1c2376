"""One case: the same prompts through the API of a server without a draft and of one with, round by round.

Servers that are started here run one after the other, since a device may hold one alone; those that run already are
asked in turn. Both clocks run over a whole round, from its first request to its last answer: prefill, queue and
transport are in it. docs/serving.md says what is compared.
"""

import contextlib
import dataclasses
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from dflash import metrics
from dflash.gate import status
from dflash.interval import NO_SPEEDUP, speedup_figures
from dflash.provenance import redact
from dflash.serving import acceptance
from dflash.serving.client import Answer, Client, first_difference
from dflash.serving.plan import Plan
from dflash.serving.server import Server, ServingError
from dflash.tokenizer import Tokenizer

# A process that dies closes its connections first.
_DYING_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Answers in the order of the prompts, and seconds from the first request to the last answer."""

    answers: list[Answer]
    seconds: float

    def shares(self) -> list[float]:
        """Seconds of the round that each prompt is charged with: by how long its own request took."""
        total = sum(a.seconds for a in self.answers)
        return [self.seconds * a.seconds / total for a in self.answers]

    @property
    def counted(self) -> int:
        return sum(a.counted for a in self.answers)


@contextlib.contextmanager
def _told_of_death(server: Server) -> Iterator[None]:
    """Where a request failed because its server ended, that is said, with its last words."""
    try:
        yield
    except ServingError as error:
        time.sleep(_DYING_S)
        death = server.death()
        raise ServingError(f"{death}; at that, {error}" if death else str(error)) from None


def _at_once(ask: Callable[[list[int]], Answer], prompts: Sequence[list[int]], concurrency: int) -> list[Answer]:
    """The answers in the order of the prompts, so many asked at a time; raises what the first of them raised.

    Nothing waits for a thread: a request that is cut short must keep neither its server nor us from ending.
    """
    answers: list[Future[Answer]] = [Future() for _ in prompts]
    todo = deque(zip(answers, prompts, strict=True))

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                answer, prompt = todo.popleft()
                try:
                    answer.set_result(ask(prompt))
                except Exception as error:
                    answer.set_exception(error)

    for _ in range(min(concurrency, len(prompts))):
        threading.Thread(target=work, daemon=True).start()
    try:
        return [answer.result() for answer in answers]
    finally:
        todo.clear()


class _Side:
    """One server and what it answered; `mark` is where its account of acceptance stood before the timed rounds."""

    def __init__(self, server: Server, client: Client, run: "ServedRun"):
        self.server, self.client, self._run = server, client, run
        self.rounds: list[Round] = []
        self.mark: Any = None

    def round(self) -> Round:
        run = self._run
        begun = time.perf_counter()
        with _told_of_death(self.server):
            answers = _at_once(lambda p: self.client.ask(p, run.max_new_tokens), run.prompts, run.concurrency)
        return Round(answers=answers, seconds=time.perf_counter() - begun)

    def counters(self) -> str:
        """Its page of counters; empty where it has none."""
        try:
            return self.client.get("/metrics")
        except ServingError:
            return ""

    def take(self) -> None:
        self.rounds.append(self.round())


class ServedRun:
    """The rounds of a case, of `served_run`."""

    def __init__(self, plan: Plan, prompts: Sequence[Sequence[int]], max_new_tokens: int, concurrency: int):
        self.plan, self.prompts = plan, [list(p) for p in prompts]
        self.max_new_tokens, self.concurrency = max_new_tokens, concurrency
        self.target: _Side
        self.draft: _Side | None = None
        self.in_turn = bool(plan.asked.draft_base_url)
        self.accepted: dict[str, Any] = {}

    def baseline_round(self) -> None:
        """A timed round without a draft, where both servers run; else those were taken before."""
        if self.in_turn and self.draft is not None:
            self.target.take()

    def round(self) -> None:
        """A timed round with the draft, or without one where there is none."""
        (self.draft or self.target).take()

    @property
    def seconds(self) -> list[float]:
        """Of the timed rounds with the draft, or without one where there is none."""
        return [r.seconds for r in (self.draft or self.target).rounds]

    def read_acceptance(self) -> dict[str, Any]:
        """What the second server tells since its mark."""
        if self.draft is None:
            return acceptance.unknown("nothing was drafted")
        if self.plan.draft is None:
            return acceptance.unknown("the block size is unknown: --draft names what the server drafts with")
        size, side = self.plan.draft.block_size, self.draft
        kind = self.plan.asked.server
        if kind == "sglang":
            return acceptance.of_sglang([a.told for r in side.rounds for a in r.answers], size)
        if kind == "vllm":
            return acceptance.of_vllm(side.mark, side.counters(), size)
        if kind == "sglang-jax" and side.server.log is not None:
            return acceptance.of_sglang_jax(side.server.read_log(side.mark), size)
        if kind == "sglang-jax":
            return acceptance.unknown("sglang-jax writes it into its log alone, and this one was started elsewhere")
        return acceptance.unknown("an OpenAI API tells no acceptance; --server names a kind of server that does")

    def set_mark(self) -> None:
        """After warm-up: acceptance is that of the timed rounds."""
        if self.draft is not None:
            vllm = self.plan.asked.server == "vllm"
            self.draft.mark = self.draft.counters() if vllm else self.draft.server.log_size()

    def info(self) -> dict[str, Any]:
        """The case's figures, by the names in `metrics`; those that a server does not tell are None."""
        plan, rounds = self.plan, (self.draft or self.target).rounds
        lengths = [len(p) for p in self.prompts]
        drafted = self.draft.rounds if self.draft else []
        block_size = plan.draft.block_size if plan.draft else None
        info: dict[str, Any] = {
            "mode": "served",
            "block_size": block_size if drafted else None,
            "batch_size": self.concurrency,
            "num_prompts": len(lengths),
            "prompt_len": max(lengths),
            "prompt_len_mean": sum(lengths) / len(lengths),
            "max_new_tokens": self.max_new_tokens,
            "dtype": "as served",
            **self.accepted,
            "num_output_tokens": rounds[-1].counted,
            "tok_s_total": _rate(drafted),
            "ttft_ms": _median_ms(drafted, lambda a: a.ttft_s),
            "tpot_ms": _median_ms(drafted, _per_token),
            "compile_s": None,
            "rounds": len(rounds),
            "baseline_tok_s_total": _rate(self.target.rounds),
            "baseline_ttft_ms": _median_ms(self.target.rounds, lambda a: a.ttft_s),
            "baseline_tpot_ms": _median_ms(self.target.rounds, _per_token),
            **NO_SPEEDUP,
            "block_ratio": None,
            "divergences": None,
            "near_ties": None,
            "server": plan.server,
            "server_commands": self._commands(),
            "no_draft": plan.no_draft,
            "interleaved": self.in_turn,
            **self._compared(),
        }
        if drafted and all(r.counted for r in self.target.rounds + drafted):
            info |= self._speedup()
        return metrics.finite(info | {"status": status(info)})

    def _commands(self) -> list[str]:
        """What started the servers, without secrets; empty where they ran already."""
        if self.plan.asked.base_url:
            return []
        sides = [False] if self.draft is None else [False, True]
        return [shlex.join(redact(self.plan.command(drafting=d, port=0))) for d in sides]

    def _differing(self, side: _Side | None) -> list[dict[str, int]]:
        """Where answers of a server differ from the target's of its first round: prompt and token, from 0."""
        expected = self.target.rounds[0].answers
        return [
            {"prompt": prompt, "token": place}
            for taken in (side.rounds if side else [])
            for prompt, (a, b) in enumerate(zip(expected, taken.answers, strict=True))
            if (place := first_difference(a, b, self.max_new_tokens)) is not None
        ]

    def _compared(self) -> dict[str, Any]:
        """Whether all answers to a prompt are the same, and how they were compared."""
        answers = [a for side in (self.target, self.draft) if side for r in side.rounds for a in r.answers]
        differing = self._differing(self.draft)
        return {
            "compared": "token ids" if all(a.exact for a in answers) else "texts, encoded again",
            "over_budget": sum(a.emitted > self.max_new_tokens for a in answers),
            # A target that answers otherwise when asked again can't be held against anything.
            "target_repeats_itself": not self._differing(self.target),
            "lossless": not differing if self.draft else None,
            "prompts_equal": len(self.prompts) - len({d["prompt"] for d in differing}) if self.draft else None,
            "first_divergence": differing[0] if differing else None,
        }

    def _speedup(self) -> dict[str, Any]:
        """Seconds a token, target over draft, with intervals: after a difference texts differ, and may in length."""
        assert self.draft is not None
        count = min(len(self.target.rounds), len(self.draft.rounds))
        before, after = (
            np.array([r.shares() for r in side.rounds[-count:]]) / np.array([[r.counted] for r in side.rounds[-count:]])
            for side in (self.target, self.draft)
        )
        return speedup_figures(before, after)


def _rate(rounds: Sequence[Round]) -> float | None:
    return float(np.median([r.counted / r.seconds for r in rounds])) if rounds else None


def _per_token(answer: Answer) -> float | None:
    return (answer.seconds - answer.ttft_s) / (answer.counted - 1) if answer.counted > 1 else None


def _median_ms(rounds: Sequence[Round], of: Callable[[Answer], float | None]) -> float | None:
    found = [s for r in rounds for a in r.answers if (s := of(a)) is not None]
    return 1000 * float(np.median(found)) if found else None


@contextlib.contextmanager
def served_run(
    plan: Plan,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    concurrency: int,
    rounds: int,
) -> Iterator[ServedRun]:
    """A run whose servers are warm, for `rounds` of its rounds; what it has not started yet it starts.

    Where both are started here, the target's own rounds are taken, and its server is ended, before this returns. Raises
    ServingError.
    """
    run = ServedRun(plan, prompts, max_new_tokens, concurrency)

    def warmed(server: Server) -> _Side:
        client = Client(
            server.url,
            api=plan.adapter.api if plan.adapter else "openai",
            model=plan.served_model,
            tokenizer=tokenizer,
            timeout_s=plan.asked.request_timeout_s,
            key=plan.key,
        )
        side = _Side(server, client, run)
        with _told_of_death(server):
            client.learn(run.prompts[0], unnamed=str(plan.target))
        side.round()
        return side

    with contextlib.ExitStack() as stack:
        if plan.no_draft is not None:
            run.target = warmed(stack.enter_context(plan.open(drafting=False)))
        elif run.in_turn:
            run.target = warmed(stack.enter_context(plan.open(drafting=False)))
            run.draft = warmed(stack.enter_context(plan.open(drafting=True)))
        else:
            with plan.open(drafting=False) as server:
                run.target = warmed(server)
                for _ in range(rounds):
                    run.target.take()
            run.draft = warmed(stack.enter_context(plan.open(drafting=True)))
        run.set_mark()
        yield run
        run.accepted = run.read_acceptance()
