"""A tiny Llama verifier on disk and block drafters for it. Shapes: V 40, D 24, H 16, 6 verifier layers."""

from functools import partial

import torch
from drafter_toys import (
    DRAFT_VOCAB,
    HIDDEN,
    VOCAB,
    Request,
    decoder_config,
    draft_maps,
    packed_row,
    randomise,
    save_llama,
)

from speculators.model import SpeculatorModel

NUM_AUX, MASK_TOKEN = 3, 39
MIXED = {"num_layers": 2, "nested": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}}
SLIDING = {"num_layers": 2, "nested": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}}


def save_verifier(path):
    return save_llama(path, num_layers=6, eos_token_id=None, bos_token_id=None)


def make_drafter(
    algorithm, verifier_path, *, num_layers=1, draft_vocab_size=DRAFT_VOCAB, seed=0, nested=None, noise=1.0, **arguments
):
    """A drafter with every weight random, so that each of them matters."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": num_layers, "use_sliding_window": True}  # else transformers forgets the window
    config = decoder_config("qwen3", **{**sizes, **(nested or {})})
    t2d, d2t = draft_maps() if draft_vocab_size != VOCAB else (None, None)
    arguments = {"block_size": 4, "mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 3, 5], **arguments}
    model = SpeculatorModel.get_class(algorithm).from_training_args(
        config,
        t2d=t2d,
        d2t=d2t,
        draft_vocab_size=draft_vocab_size,
        verifier_name_or_path=str(verifier_path),
        **arguments,
    )
    randomise(model, matrix_scale=noise)
    return model


packed_batch = partial(packed_row, num_aux=NUM_AUX)


def one_document(batch, start, length, padding):
    """The document at columns start .. of a packed row as a row of its own, with padding behind it."""
    alone = {}
    for key, value in batch.items():
        rows = value[:, start : start + length]
        fill = -1 if key == "document_ids" else 0
        alone[key] = torch.cat((rows, rows.new_full((1, padding, *rows.shape[2:]), fill)), dim=1)
    return alone


class BlockRequest(Request):
    def __init__(self, seed, length):
        super().__init__(seed, length, NUM_AUX)

    def as_batch(self, drafts):
        """The training row of this request followed by `drafts`, states of tokens that have none zero; the last
        committed token is the only anchor that is drawn."""
        tokens = torch.tensor([*self.tokens, *drafts, *[0] * (len(drafts) + 2)])[None]
        num_known = len(self.tokens) - 1
        states = torch.zeros(1, tokens.shape[1], NUM_AUX * HIDDEN)
        states[0, :num_known] = self.states[:num_known]
        mask = torch.zeros_like(tokens)
        mask[0, num_known : num_known + len(drafts) + 1] = 1
        return {
            "hidden_states": states,
            "input_ids": tokens,
            "loss_mask": mask,
            "verifier_last_hidden_states": torch.zeros(1, tokens.shape[1], HIDDEN),
        }
