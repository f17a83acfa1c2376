"""Which prompts are measured, and up to how many tokens: our protocol, and that of z-lab's published figures."""

import dataclasses

from dflash.text.prompts import PromptSet


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """With a `shuffle_seed` a smaller set is taken whole, and of a larger one the first prompts of its shuffle."""

    name: str
    num_prompts: int
    max_new_tokens: int
    shuffle_seed: int | None = None

    def take(self, prompts: PromptSet, count: int) -> PromptSet:
        """The prompts that are measured. Raises PromptError."""
        whole = self.shuffle_seed is not None and len(prompts.prompts) <= count
        return prompts if whole else prompts.take(count, seed=self.shuffle_seed)


OURS = Protocol(name="dflash", num_prompts=8, max_new_tokens=64)
ZLAB = Protocol(name="zlab", num_prompts=128, max_new_tokens=2048, shuffle_seed=42)
PROTOCOLS = {protocol.name: protocol for protocol in (OURS, ZLAB)}
