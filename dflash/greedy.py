"""Greedy decoding of a workload, round by round: the one baseline that every case of the workload is paired with.

A workload is groups of prompts (a batch each) and a token budget. What is timed is compiled for that budget and knows
nothing of any draft, so it is the same baseline whichever cases are measured beside it.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

from dflash.decoding.decode import Request, check_request, compiled_decoder, prefill, read_state
from dflash.decoding.loop import Decoder, State
from dflash.models.llama import Llama

Rows = list[list[int]]


def timed_decode(decoder: Decoder, state: State) -> tuple[State, float]:
    """Decodes a prefilled state to its end, and the seconds that took."""
    start = time.perf_counter()
    state = decoder.steps(state)
    return state, time.perf_counter() - start


class Greedy:
    """Rounds of greedy decoding. `groups` are batches of token id prompts, all of one size.

    Of the latest round: `seconds` by group, from after prefill to the last token; `tokens` by group and row; `produced`
    counts the one-token steps of each row. Nothing is compiled before it is needed.
    """

    def __init__(
        self, target: Llama, groups: Sequence[Rows], *, max_new_tokens: int, stop_token_ids: Sequence[int] = ()
    ):
        self.target, self.groups, self.max_new_tokens = target, groups, max_new_tokens
        self._stops = stop_token_ids
        longest = max(len(p) for g in groups for p in g)
        self.shape = (len(groups[0]), -(-longest // 32) * 32)  # batch, prompt length
        self.greedy_requests = self.requests([None] * len(groups), "greedy", 1)
        self.seconds: list[float] = []
        self.tokens: list[Rows] = []
        self.produced: list[Rows] = []
        self._outputs: list[Rows] = []
        self._output_len = 0

    def requests(
        self, drafts: Sequence[Any], mode: str, block_size: int, *, budget: int | None = None, stops: bool = True
    ) -> list[Request]:
        """A checked request for each group, with its draft (None: greedy). Raises RequestError."""
        return [
            check_request(
                self.target,
                draft,
                prompts,
                mode=mode,
                block_size=block_size,
                max_new_tokens=budget or self.max_new_tokens,
                stop_token_ids=self._stops if stops else (),
                temperature=0.0,
                allow_larger_block=False,
            )
            for prompts, draft in zip(self.groups, drafts, strict=True)
        ]

    @functools.cached_property
    def decoder(self) -> Decoder:
        """What is timed, with the target's weights as they were when it was first asked for."""
        return self._compiled(self.max_new_tokens)

    def _compiled(self, budget: int) -> Decoder:
        decoder = compiled_decoder(self.target, None, "greedy", 1, *self.shape, budget)
        decoder.take_weights()
        return decoder

    def decode(self, group: int) -> None:
        """Decodes one group; the first of them begins a round."""
        if group == 0:
            self.seconds, self.tokens, self.produced = [], [], []
        state, seconds = timed_decode(self.decoder, prefill(self.decoder, self.greedy_requests[group]))
        tokens, _, produced = read_state(state)
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.produced.append(produced)

    def outputs(self, count: int) -> list[Rows]:
        """The first `count` tokens of every row, past stop tokens and budget: what a scripted draft has to know.

        Ask for the most first: more than was asked before is decoded anew.
        """
        if count > self._output_len:
            decoder = self._compiled(count)
            # Past the stop tokens too: the block that holds one must be accepted as far as any other.
            longer = self.requests([None] * len(self.groups), "greedy", 1, budget=count, stops=False)
            self._outputs = [read_state(decoder.steps(prefill(decoder, r)))[0] for r in longer]
            self._output_len = count
        return [[row[:count] for row in rows] for rows in self._outputs]
