"""Greedy decoding of a workload, round by round: the baseline that every case of the workload is paired with.

A workload is groups of prompts (a batch each) and a token budget. The timed program is compiled for that budget and
knows nothing about drafts, so the baseline does not depend on the cases beside it.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from dflash.decoding.decode import Request, Rows, check_request, compiled_decoder, prefill, read_state
from dflash.decoding.loop import Decoder, DecodeShape, State
from dflash.decoding.modes import GREEDY
from dflash.decoding.sampling import GREEDILY, Sampling
from dflash.metrics import round_up
from dflash.models.llama import Llama


def timed_decode(decoder: Decoder, state: State) -> tuple[State, float]:
    """Decodes a prefilled state to its end; also returns the seconds that it took."""
    start = time.perf_counter()
    state = decoder.steps(state)
    return state, time.perf_counter() - start


class Greedy:
    """Rounds of greedy decoding. `groups` are batches of token id prompts, all of one size.

    With a temperature in `sampling`, "greedy" is drawing one token at a time; rows are numbered across the groups. For
    the latest round: `seconds` by group, from after prefill to the last token; `tokens` by group and row;
    `produced`, the one-token steps of each row. Programs are compiled when they are first needed.
    """

    def __init__(
        self,
        target: Llama,
        groups: Sequence[Rows],
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        sampling: Sampling = GREEDILY,
    ):
        self.target, self.groups, self.sampling, self._stops = target, groups, sampling, stop_token_ids
        self.shape = DecodeShape(
            mode=GREEDY.name,
            block_size=1,
            batch=len(groups[0]),
            max_prompt_len=round_up(max(len(p) for g in groups for p in g), 32),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )
        self.greedy_requests = self.requests([None] * len(groups), GREEDY.name, 1)
        self.seconds: list[float] = []
        self.tokens: list[Rows] = []
        self.produced: list[Rows] = []
        self._outputs: dict[int, Rows] = {}

    def requests(
        self, drafts: Sequence[Any], mode: str, block_size: int, *, budget: int | None = None, stops: bool = True
    ) -> list[Request]:
        """A checked request for the group of each draft (None: greedy), from the first on. Raises RequestError."""
        return [
            check_request(
                self.target,
                draft,
                prompts,
                mode=mode,
                block_size=block_size,
                max_new_tokens=budget or self.shape.max_new_tokens,
                stop_token_ids=self._stops if stops else (),
                sampling=self.sampling.row(number * len(prompts)),
            )
            for number, (prompts, draft) in enumerate(zip(self.groups, drafts, strict=False))
        ]

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The timed decoder, with the target's weights as of its first use."""
        return self._compiled(self.shape)

    def _compiled(self, shape: DecodeShape) -> Decoder:
        decoder = compiled_decoder(self.target, None, shape)
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

    def outputs(self, group: int, count: int) -> Rows:
        """The first `count` tokens of every row of a group, past stop tokens and budget: what a script has to know.

        Ask for the largest count first: a larger one than before is decoded again.
        """
        known = self._outputs.get(group)
        if known is None or len(known[0]) < count:
            # Past the stop tokens too: the block that holds one must be accepted as far as any other.
            longer = self.requests([None] * (group + 1), GREEDY.name, 1, budget=count, stops=False)[group]
            decoder = self._compiled(dataclasses.replace(self.shape, max_new_tokens=count))
            self._outputs[group] = known = read_state(decoder.steps(prefill(decoder, longer)))[0]
        return [row[:count] for row in known]
