"""Unlearning of loops: the model's own greedy text is penalised where it repeats itself.

Sequence-level unlikelihood training (Welleck et al. 2019, arXiv:1908.04319). A small model that is unsure of what comes
next falls into loops when it is decoded greedily, though none stands in its training text.

Shapes: B prompts, P prompt tokens (padded on the left), G generated tokens.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NGRAM = 6
"""Lists in answers repeat shorter runs of tokens rightly ("`: required" and a new line)."""


def closes_repetition(generated_BG: torch.Tensor, n: int = NGRAM) -> torch.Tensor:
    """True at each token that ends an n-gram which stands in the same row before."""
    flags_BG = torch.zeros_like(generated_BG, dtype=torch.bool)
    for row, tokens in enumerate(generated_BG.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(n, len(tokens) + 1):
            gram = tuple(tokens[end - n : end])
            flags_BG[row, end - 1] = gram in seen
            seen.add(gram)
    return flags_BG


def repetition_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], num_new_tokens: int
) -> torch.Tensor | None:
    """Penalty on the repeated tokens of greedy answers to `prompts`, over all their tokens; None if nothing repeats."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    with torch.no_grad():
        ids_BT = model.generate(**batch, max_new_tokens=num_new_tokens, do_sample=False, use_cache=True)
    prompt_length = batch["input_ids"].shape[1]
    generated_BG = ids_BT[:, prompt_length:]
    is_text_BG = generated_BG != tokenizer.pad_token_id
    flags_BG = closes_repetition(generated_BG) & is_text_BG
    rows = flags_BG.any(1)
    if not rows.any():
        return None
    mask_BT = torch.cat((batch["attention_mask"], is_text_BG.long()), 1)[rows]
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    logits_BTV = model(ids_BT[rows], attention_mask=mask_BT, position_ids=positions_BT, use_cache=False).logits
    probs_BGV = logits_BTV[:, prompt_length - 1 : -1].float().softmax(-1)
    probs_BG = probs_BGV.gather(-1, generated_BG[rows].unsqueeze(-1)).squeeze(-1)
    penalty_BG = -torch.log1p(-probs_BG.clamp(max=1 - 1e-5))
    return (penalty_BG * flags_BG[rows]).sum() / is_text_BG.sum()
