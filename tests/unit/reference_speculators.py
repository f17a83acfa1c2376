"""speculators' side of test_export_reference.py, in a process of its own: it patches transformers and torch.

Usage: python -P reference_speculators.py DIRECTORY. Prints one JSON object: the config as speculators understood it and
how the model that it made of the directory differs from the files.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from speculators import SpeculatorModel, SpeculatorModelConfig


def main():
    directory = Path(sys.argv[1])
    config = SpeculatorModelConfig.from_pretrained(directory)
    model = SpeculatorModel.from_pretrained(directory)
    loaded = model.state_dict()
    stored = {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}
    layers = config.transformer_layer_config
    answer = {
        "type": type(config).__name__,
        "model": type(model).__name__,
        "aux_hidden_state_layer_ids": config.aux_hidden_state_layer_ids,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": config.sliding_window_non_causal,
        "speculative_tokens": config.speculators_config.proposal_methods[0].speculative_tokens,
        "verifier": config.speculators_config.verifier.model_dump(),
        "rope": dict(layers.rope_parameters),
        "layer_types": layers.layer_types,
        "heads": [layers.num_attention_heads, layers.num_key_value_heads, layers.head_dim],
        "unused": sorted(stored.keys() - loaded.keys()),
        "different": sorted(n for n in stored.keys() & loaded.keys() if not torch.equal(stored[n], loaded[n])),
        # What a draft borrows of its verifier is filled in later.
        "not_stored": sorted(loaded.keys() - stored.keys()),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
