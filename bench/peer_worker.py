"""Runs beside the benchmark, in its own process: transformers in torch, and the reference's own decoder.

Reads one JSON request per line and answers with one JSON line. A separate process keeps torch's threads and jax's
apart, and the reference package has our import name: its directory (DFLASH_REFERENCE_DIR) comes first on the path here.
"""

import json
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.environ["DFLASH_REFERENCE_DIR"])

import dflash.model as reference
import torch
from transformers import AutoModelForCausalLM


class Peer:
    """Target and draft in torch, float32, two threads."""

    def __init__(self, target: str, draft: str):
        torch.set_num_threads(os.cpu_count() or 2)
        # Timing in the reference calls CUDA; the CPU is synchronous.
        reference._cuda_time = time.perf_counter
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.draft = reference.DFlashDraftModel.from_pretrained(draft, dtype=torch.float32).eval()
        self.script: list[int] | None = None
        self._script_proposals()

    def _script_proposals(self) -> None:
        """Replaces proposals by `script` (tokens by position in the output), after network and head have run."""
        forward, compute_logits = self.draft.forward, self.draft.compute_logits

        def remember_start(*args: Any, **kwargs: Any) -> Any:
            block = kwargs["noise_embedding"].shape[1]
            self.anchor = int(kwargs["position_ids"][0, -block])
            return forward(*args, **kwargs)

        def scripted(hidden: Any, head: Any) -> Any:
            logits = compute_logits(hidden, head)
            if self.script is not None:
                for k in range(logits.shape[1]):
                    place = self.anchor - self.prompt_len + 1 + k
                    logits[0, k, self.script[place]] = float("inf")
            return logits

        self.draft.forward, self.draft.compute_logits = remember_start, scripted

    @torch.inference_mode()
    def step(self, context: int, tokens: int, repeats: int) -> dict[str, Any]:
        """Seconds of `repeats` forwards of `tokens` tokens after `context`."""
        cache = reference._make_cache(self.target.config)
        ids = torch.arange(context + tokens)[None] % 1000
        self.target(ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            logits = self.target(ids[:, context:], past_key_values=cache, use_cache=True).logits
            logits.argmax(-1)
            seconds.append(time.perf_counter() - start)
            reference._crop_to(cache, context)
        return {"seconds": seconds}

    def decode(
        self, prompt: list[int], max_new_tokens: int, stops: list[int], script: list[int] | None
    ) -> dict[str, Any]:
        """The reference's own loop over one prompt: tokens, produced per block, seconds after prefill."""
        self.script, self.prompt_len = script, len(prompt)
        out = reference.dflash_generate(
            self.draft, self.target, torch.tensor([prompt]), max_new_tokens, stops or None, return_stats=True
        )
        return {
            "tokens": out.output_ids[0, len(prompt) :].tolist(),
            "produced": out.acceptance_lengths,
            "seconds": out.time_per_output_token * out.num_output_tokens,
        }


def main() -> None:
    peer = Peer(*sys.argv[1:3])
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        operation = {"step": peer.step, "decode": peer.decode}[request.pop("op")]
        print(json.dumps(operation(**request)), flush=True)


main()
