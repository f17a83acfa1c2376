"""A server that decodes with the reference's own code, and breaks the convention that a request names as its model.

Usage: python -P reference_server.py TARGET DRAFT --host H --port P. DFLASH_REFERENCE_DIR names the directory that the
reference is installed in. Counts what is accepted at /metrics as vLLM does.
"""

import json
import os
import sys
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

sys.path.insert(0, os.environ["DFLASH_REFERENCE_DIR"])
sys.path.append(str(Path(__file__).parent))

import dflash.model as reference
import torch
from reference_draft import load_draft
from transformers import AutoModelForCausalLM

STATS = Counter()


def other_layers(draft, step):
    draft.target_layer_ids = [i + step for i in draft.target_layer_ids]


def causal(draft):
    for layer in draft.layers:
        layer.self_attn.is_causal = True


def unnormed(draft):
    draft.hidden_norm = torch.nn.Identity()


def normed_first(draft):
    norm, project = draft.hidden_norm, draft.fc
    size = project.out_features
    draft.hidden_norm = torch.nn.Identity()
    draft.fc = Called(lambda x: project(torch.cat([norm(part) for part in x.split(size, dim=-1)], dim=-1)))


class Called(torch.nn.Module):
    """A function in the place of a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def normed_late(draft):
    rotated = reference.apply_rotary_pos_emb
    norms = []
    for layer in draft.layers:
        attention = layer.self_attn
        own = (attention.q_norm, attention.k_norm)
        attention.q_norm = attention.k_norm = torch.nn.Identity()
        attention.register_forward_pre_hook(lambda *_, own=own: norms.append(own))

    def rotate(q, k, cos, sin):
        q, k = rotated(q, k, cos, sin)
        if not norms:  # a target has its own
            return q, k
        q_norm, k_norm = norms.pop()
        return q_norm(q), k_norm(k)

    reference.apply_rotary_pos_emb = rotate
    return lambda: setattr(reference, "apply_rotary_pos_emb", rotated)


def first_norm(draft):
    first = draft.layers[0].self_attn.k_norm
    context = []
    for layer in draft.layers:
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda module, positional, named: context.append(named["target_hidden"].shape[1]), with_kwargs=True
        )

        def norm(k, own=attention.k_norm):
            length = context.pop()
            return torch.cat([first(k[:, :length]), own(k[:, length:])], dim=1)

        attention.k_norm = Called(norm)


def before(draft, change):
    """Changes the arguments of every call of the draft: `change(arguments, slots)`."""

    def hook(module, positional, named):
        change(named, named["noise_embedding"].shape[1])
        return positional, named

    draft.register_forward_pre_hook(hook, with_kwargs=True)


def moved(draft, move):
    def change(named, slots):
        positions = named["position_ids"].clone()
        positions[:, -slots:] = move(positions[:, -slots:])
        named["position_ids"] = positions

    before(draft, change)


def hidden(draft, count):
    """Hides the context's last `count` tokens, or with None all of them."""

    def change(named, slots):
        end = int(named["position_ids"].max()) + 1
        visible = torch.ones(1, 1, slots, end, dtype=torch.bool)
        visible[..., 0 if count is None else end - slots - count : end - slots] = False
        named["attention_mask"] = visible

    before(draft, change)


def in_four_bits(draft):
    for weight in draft.parameters():
        if weight.ndim == 2:
            step = weight.abs().amax(dim=1, keepdim=True) / 7
            weight.copy_((weight / step).round() * step)


BREAK = {
    "none": lambda draft: None,
    "target layers one too low": partial(other_layers, step=-1),
    "target layers one too high": partial(other_layers, step=1),
    "the block causal": causal,
    "no norm of the context": unnormed,
    "the context's norm before its projection": normed_first,
    "the norms of queries and keys after rotation": normed_late,
    "the first layer's key norm for the context of all": first_norm,
    "the block one position late": partial(moved, move=lambda p: p + 1),
    "the block one position early": partial(moved, move=lambda p: p - 1),
    "the block's positions from 0": partial(moved, move=lambda p: p - p[:, :1]),
    "the newest token's context lost": partial(hidden, count=1),
    "all context lost": partial(hidden, count=None),
    "the mask token 0": lambda draft: setattr(draft, "mask_token_id", 0),
    "weights in 4 bits": in_four_bits,
}


def generate(target, draft, prompt, budget):
    """The first `budget` tokens, and the accept lengths of the blocks that they took."""
    size = draft.block_size
    # Further than asked: the reference shortens its last block, which servers do not.
    out = reference.dflash_generate(draft, target, torch.tensor([prompt]), budget + size, None, return_stats=True)
    lengths, count = [], 1
    for produced in out.acceptance_lengths:
        if count < budget:
            lengths.append(produced - 1)
        count += produced
    return out.output_ids[0, len(prompt) : len(prompt) + budget].tolist(), lengths


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        lines = [f"vllm:spec_decode_num_{name} {count}" for name, count in STATS.items()]
        self.answer("\n".join(lines) if self.path == "/metrics" else "{}")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        target, directory = self.server.target, self.server.draft
        with torch.inference_mode():
            draft = load_draft(directory)
            mend = BREAK[request["model"]](draft)
            tokens, lengths = generate(target, draft, request["prompt"], request["max_tokens"])
            if mend:
                mend()
        STATS.update(drafts=len(lengths), draft_tokens=len(lengths) * (draft.block_size - 1))
        STATS.update(accepted_tokens=sum(lengths))
        for k in range(draft.block_size - 1):
            name = f'accepted_tokens_per_pos{{position="{k}"}}'
            STATS.update({name: sum(a > k for a in lengths)})
        choice = {"text": "", "token_ids": tokens, "finish_reason": "length"}
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": len(tokens)}
        self.answer(f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\ndata: [DONE]\n\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    reference._cuda_time = lambda: 0.0  # return_stats reads the clock of a GPU
    server = HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])), Handler)
    server.draft = Path(sys.argv[2])
    server.target = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    server.serve_forever()
