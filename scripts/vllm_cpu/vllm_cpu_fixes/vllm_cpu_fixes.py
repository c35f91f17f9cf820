"""Repairs of vLLM 0.32 on CPU, loaded by vLLM itself as a general plugin, or by calling `apply()` before `LLM()`.

1. Sampled verification: the CPU twin of `expand_batch_to_tokens` drops its result for float tensors, so temperature,
   top-k and top-p of the draft positions are uninitialised memory (vLLM issue 55005). Greedy decoding is right.
2. Hidden-state extraction: `ExampleHiddenStatesConnector` pins memory and records CUDA events; both kill the
   CPU worker.
3. Triton's interpreter (TRITON_INTERPRET=1, see ../triton_interpreter) wants masks of bools where compilers take any
   integer.
4. DFlash and DSpark of more than one layer: the context keys of all layers are normed by one kernel call with a weight
   for each layer, and the CPU kernel applies the first layer's to all. Drafts are slightly off what was trained.

Switch off with VLLM_PLUGINS=none.
"""

import fcntl
import os
from functools import partial

import torch


def _expand_to_tokens(output, values, cumulative_counts, replace_from, replace_to, MAX_NUM_TOKENS=None):
    """Write each request's value once per token of that request into `output`, in place (what the GPU kernel does)."""
    cumulative = cumulative_counts.to(torch.int64)
    counts = torch.diff(cumulative, prepend=cumulative.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output.copy_(replaced.repeat_interleave(counts))


class _FinishedEvent:
    """Stands in for a CUDA event: CPU copies are finished when they return."""

    def query(self):
        return True

    def synchronize(self):
        pass


def _submit_write_on_cpu(self, pending):
    """Gather the request's states from the paged cache and hand them to the connector's writer thread."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as connector

    if not self._is_tp_rank_zero:
        return
    block_starts = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * self._block_size
    slots = (block_starts + torch.arange(self._block_size)[None]).flatten()
    states = connector.extract_from_kv_cache(self._kv_cache, slots, pending.token_ids.shape[0])
    tensors = {"hidden_states": states.contiguous().clone(), "token_ids": pending.token_ids.clone()}
    os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
    lock_fd = self._lock_fds.pop(pending.req_id, None)
    if lock_fd is None and self.use_lock:
        lock_fd = os.open(pending.filename + ".lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
    event = _FinishedEvent()
    future = self._executor.submit(self._write_tensors, tensors, event, pending.filename, lock_fd)
    self._req_copy_events[pending.req_id] = event
    self._req_futures[pending.req_id] = future
    future.add_done_callback(partial(self._on_write_done, pending.req_id))


def _normalize_layer_by_layer(self, all_k):
    """What the GPU kernel does with a [L, d] weight: layer i's keys by its own row."""
    from vllm import _custom_ops as ops

    normed = torch.empty_like(all_k)
    for out, keys, weight in zip(normed, all_k, self._k_norm_weights, strict=True):
        ops.rms_norm(out, keys, weight, self._rms_norm_eps)
    return normed


def _with_bool_masks():
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def as_bool(mask):
        return mask if mask is None or mask.data.dtype == numpy.bool_ else TensorHandle(mask.data != 0, tl.int1)

    load, store, update = (
        getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    )
    InterpreterBuilder.create_masked_load = lambda self, pointer, mask, *rest: load(self, pointer, as_bool(mask), *rest)
    InterpreterBuilder.create_masked_store = lambda self, pointer, value, mask, *rest: store(
        self, pointer, value, as_bool(mask), *rest
    )
    InterpreterBuilder.create_atomic_rmw = lambda self, op, pointer, value, mask, *rest: update(
        self, op, pointer, value, as_bool(mask), *rest
    )


def apply():
    if os.environ.get("TRITON_INTERPRET") == "1":
        _with_bool_masks()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
        ExampleHiddenStatesConnector,
    )
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = _expand_to_tokens
    ExampleHiddenStatesConnector._submit_async_write = _submit_write_on_cpu
    DFlashQwen3Model._normalize_context_k = _normalize_layer_by_layer
