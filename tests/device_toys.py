"""The drafters whose layers attend, and kernels that stand in for compiled flex attention on a CPU."""

import dataclasses

import torch
from drafter_toys import DRAFT_VOCAB, decoder_config, draft_maps, packed_row, randomise
from transformers import AutoConfig

from speculators.model import SpeculatorModel
from speculators.nn.attention import dense_attention
from speculators.nn.routes import BLOCK, FLEX

MASK_TOKEN = 39
LAYERS = {
    "num_hidden_layers": 2,
    "head_dim": 16,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 3,
}
BLOCKS = {"block_size": 4, "target_layer_ids": [1, 3, 5], "mask_token_id": MASK_TOKEN}
DRAFTERS = {
    "eagle3": {"ttt_steps": 3, "target_layer_ids": [1, 3, 5]},
    "peagle": {"num_depths": 4, "target_layer_ids": [1, 3, 5], "mask_token_id": MASK_TOKEN},
    "dflash": BLOCKS,
    "dspark": {**BLOCKS, "markov_rank": 5},
    "eagle": {"ttt_steps": 2},
    "mtp": {"num_speculative_steps": 3},
}
"""Their own training keys. All have a sliding layer and a full one, where they choose their layers."""
READS_LAST_STATE = ("eagle", "mtp")


def make_drafter(algorithm, verifier_path):
    """Every weight random, so that each of them matters."""
    torch.manual_seed(0)
    keys = {"verifier_name_or_path": str(verifier_path), **DRAFTERS[algorithm]}
    if algorithm == "mtp":
        config = AutoConfig.from_pretrained(verifier_path)
    elif algorithm == "eagle":
        config = decoder_config("llama", head_dim=16)
    else:
        config = decoder_config("qwen3", **LAYERS)
        t2d, d2t = draft_maps()
        keys |= {"t2d": t2d, "d2t": d2t, "draft_vocab_size": DRAFT_VOCAB}
    model = SpeculatorModel.get_class(algorithm).from_training_args(config, **keys)
    randomise(model)
    return model


def row_of(algorithm, lengths, **options):
    num_aux = 1 if algorithm in READS_LAST_STATE else 3
    row = packed_row(lengths, num_aux=num_aux, **options)
    return {key: value for key, value in row.items() if algorithm != "mtp" or key != "verifier_last_hidden_states"}


def flex_route(kernel):
    return dataclasses.replace(FLEX, kernel=kernel)


def written_out(query, key, value, ranges, blocks):
    """A kernel that does what the lists of blocks say, in plain autograd: pairs of full blocks whatever the ranges say,
    pairs of partial ones by the ranges, no other pairs. Both directions of the lists must say the same."""
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    assert torch.equal(full, listed(blocks.full_q_num_blocks, blocks.full_q_indices).T)
    assert torch.equal(partial, listed(blocks.q_num_blocks, blocks.q_indices).T)
    low, high, own_low, own_high = (part[:, None] for part in ranges)
    keys = torch.arange(key.shape[2])
    in_range = ((keys >= low) & (keys < high)) | ((keys >= own_low) & (keys < own_high))
    wide = [blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) for blocks in (full, partial)]
    visible = wide[0] | (wide[1] & in_range)
    out = dense_attention(*(x.transpose(1, 2) for x in (query, key, value)), visible).transpose(1, 2)
    grouped = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ grouped.transpose(2, 3)) * query.shape[-1] ** -0.5
    return out, scores.masked_fill(~visible, float("-inf")).logsumexp(-1)


def listed(num_blocks, indices):
    """bool [rows, blocks] of lists."""
    dense = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (number, order) in enumerate(zip(num_blocks[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        dense[row, order[:number]] = True
    return dense
