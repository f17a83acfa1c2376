"""A scripted draft: proposals that agree with the target for exactly `a` tokens of every block.

It shows what a machine gives at each acceptance. The wrapped draft's network still runs (its proposals are replaced,
not skipped), so the time is that of a real draft of that size.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dflash.models.draft import Draft


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScriptedDraft:
    """`outputs[b]` are row b's greedy tokens, one block longer than the budget; `accept_len` is 0..S-1."""

    draft: Draft
    outputs: Sequence[Sequence[int]]
    accept_len: int

    def table(self, block_size: int) -> np.ndarray:
        """Tokens to propose by position in the output, int32 [B, M]; -1 past the end of a row's outputs.

        A block starts at every (a+1)-th token; the proposal where the next block starts is wrong, unless the whole
        block is accepted. Raises ValueError when accept_len is not 0..block_size-1.
        """
        if not 0 <= self.accept_len < block_size:
            raise ValueError(
                f"accept_len must be 0..{block_size - 1} for blocks of {block_size}, got {self.accept_len}"
            )
        table = np.full((len(self.outputs), max(map(len, self.outputs))), -1, np.int32)
        for row, tokens in zip(table, self.outputs, strict=True):
            row[: len(tokens)] = tokens
        if self.accept_len < block_size - 1:
            wrong = table[:, self.accept_len + 1 :: self.accept_len + 1]
            wrong[wrong >= 0] = (wrong[wrong >= 0] + 1) % self.draft.config.vocab_size
        return table
