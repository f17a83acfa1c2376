"""The reference draft's side of test_draft_reference.py, in a process of its own: it has our package's name.

Usage: python -P reference_draft.py JOB. DFLASH_REFERENCE_DIR names the directory that the reference is installed in.
Reads JOB/job.json and the directories and arrays that it names; writes JOB/answer.json and an array file per case.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ["DFLASH_REFERENCE_DIR"])

import dflash.model as reference
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load_draft(directory):
    """The draft in `directory`; every weight comes from the file and every tensor of the file is used."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    draft, info = getattr(reference, name).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not faults, f"{directory}: {faults}"
    return draft.eval()


def run_blocks(job, case):
    """Blocks as dflash_generate runs them: the last block's context in, a block proposed, the cache cropped back."""
    draft = load_draft(job / case["draft"])
    target = AutoModelForCausalLM.from_pretrained(job / case["target"], dtype=torch.float32).eval()
    inputs = np.load(job / case["inputs"])
    features, blocks = torch.tensor(inputs["features"])[None], torch.tensor(inputs["blocks"])
    cache, known, outputs = reference._make_cache(draft.config), 0, {}
    for i, context in enumerate(case["contexts"]):
        end = known + context
        hidden = draft(
            target_hidden=features[:, known:end],
            noise_embedding=reference._raw_input_embeddings(target, blocks[i][None]),
            position_ids=torch.arange(known, end + blocks.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )
        reference._crop_to(cache, end)
        outputs[f"hidden{i}"] = hidden[0].numpy()
        outputs[f"logits{i}"] = draft.compute_logits(hidden, reference._output_head(target))[0].numpy()
        known = end
    np.savez(job / f"{case['name']}.npz", **outputs)


def generate(job, case):
    """The reference's own decode of one prompt: tokens, and how many each block gave."""
    draft = load_draft(job / case["draft"])
    target = AutoModelForCausalLM.from_pretrained(job / case["target"], dtype=torch.float32).eval()
    # return_stats reads the clock of a GPU.
    reference._cuda_time = time.perf_counter
    answers = []
    for request in case["requests"]:
        out = reference.dflash_generate(
            draft,
            target,
            torch.tensor([request["prompt"]]),
            request["max_new_tokens"],
            request["stops"] or None,
            return_stats=True,
        )
        tokens = out.output_ids[0, len(request["prompt"]) :].tolist()
        answers.append({"tokens": tokens, "produced": out.acceptance_lengths})
    return answers


def main():
    job = Path(sys.argv[1])
    request = json.loads((job / "job.json").read_text())
    torch.set_num_threads(2)
    with torch.inference_mode():
        for case in request["blocks"]:
            run_blocks(job, case)
        decodes = {case["name"]: generate(job, case) for case in request["decodes"]}
    ids = [reference.build_target_layer_ids(layers, features) for layers, features in request["layer_ids"]]
    (job / "answer.json").write_text(json.dumps({"decodes": decodes, "layer_ids": ids}))


if __name__ == "__main__":
    main()
