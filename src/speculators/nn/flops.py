"""Model FLOPs of a training step: the arithmetic that its definition asks for, whatever a route computes beside it
(Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B). A multiply-add is 2.

    counted        products of weights: forward; for the weight's gradient, where it is trained; for the input's
                   gradient, where something before it is trained
                   attention: scores and sums of values of the pairs that the mask shows; twice that backward
                   the head on each supervised row, and the verifier's distribution once for each column taught
    not counted    norms, activations, softmax, losses, the optimizer; pairs that are masked and columns that no loss
                   depends on; what is computed a second time to save memory; tokens outside the draft vocabulary,
                   which no loss reads; the forward of the verifier

Sizes are counted on the host: nothing waits for the device.

Shapes: T columns of the packed row, N supervised rows of the head, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speculators.nn.decoder import DecoderLayer
from speculators.nn.packed_row import document_starts


def product_flop(weight: Tensor, num_rows: int, *, input_learns: bool = True) -> int:
    """Of rows @ weight.T and its backward pass. `input_learns`: gradients flow on to what made the rows."""
    return 2 * weight.numel() * num_rows * (1 + weight.requires_grad + input_learns)


def modules_flop(module: nn.Module, num_rows: int, *, input_learns: bool = True) -> int:
    """Of all weights of a module, each row passing through all of them, or through its share of experts."""
    total = 0.0
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if weight.ndim > 1:
                share = getattr(part, "visited_share", 1.0)
                total += share * product_flop(weight, num_rows, input_learns=input_learns)
    return round(total)


def layer_flop(layer: DecoderLayer, *, num_queries: int, num_keys: int, num_pairs: int) -> int:
    """Of a decoder layer: `num_keys` rows become keys and values, `num_queries` pass through the rest of it."""
    attention = layer.self_attn
    total = modules_flop(layer.mlp, num_queries)
    for name, projection in attention.named_children():
        total += modules_flop(projection, num_keys if name.startswith(("k", "v")) else num_queries)
    width = attention.num_heads * attention.head_dim + attention.o_proj.in_features  # of scores and of values
    return total + 3 * 2 * num_pairs * width


def unrolled_flop(
    layers: Sequence[DecoderLayer],
    windows: Sequence[int | None],
    document_ids_T: Tensor,
    asks_T: Tensor,
    num_steps: int,
) -> int:
    """Of layers that are unrolled over their own output (`nn.unrolled`). `asks_T`: bool, columns with a supervised
    step. At step s a query sees the step-0 keys of its document up to its column, and s keys of its own column."""
    is_real_T = document_ids_T != -1
    context_T, asks_T = num_visible(document_ids_T)[is_real_T], asks_T[is_real_T]
    total = 0
    for number, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        for step in range(num_steps):
            # every column is context of step 0; what the last layer makes of it is read by the loss alone
            is_last = number == len(layers) - 1
            visible = (context_T[asks_T] if step or is_last else context_T) + step
            num_pairs = int((visible if window is None else visible.clamp_max(window)).sum())
            num_keys = len(visible) if step else len(context_T)
            total += layer_flop(layer, num_queries=len(visible), num_keys=num_keys, num_pairs=num_pairs)
    return total


def num_visible(document_ids_T: Tensor) -> Tensor:
    """int64 [T]: columns of its document that each column sees, itself included."""
    return torch.arange(1, len(document_ids_T) + 1) - document_starts(document_ids_T)


def head_flop(head_VH: Tensor, num_rows: int) -> int:
    """Of the drafter's logits of the supervised rows."""
    return product_flop(head_VH, num_rows)


def targets_flop(verifier_head_VH: Tensor, target_index_N: Tensor) -> int:
    """Of the verifier's distributions, one for each column that is taught, however often. The index is on the host."""
    return 2 * verifier_head_VH.numel() * int((torch.bincount(target_index_N) > 0).sum())
