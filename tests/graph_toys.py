"""A graph of recorded calls, on a CPU: what a CUDA graph does, without one.

`replayed(run)` runs a computation once more and writes down each operation with the very tensors that it read and
wrote. A replay repeats these operations, in their order, on the same memory; nothing of the computation's Python runs
again. So a number that the host decided while it was recorded stays what it was, as in a CUDA graph, and operations
that no graph may hold (reads, random draws) are errors.
"""

import torch
from second_device import READS
from torch.utils._python_dispatch import TorchDispatchMode

RANDOM = ("rand", "normal", "exponential", "bernoulli", "uniform", "dropout")
ALLOCATES = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")


class Recorder:
    """A `nn.graphs.Record` that counts what it recorded."""

    def __init__(self):
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run):
        run()  # makes what is made once
        self.num_recorded += 1
        calls = []
        with _Writing(calls):
            outputs = run()

        def replay():
            self.num_replayed += 1
            for func, args, kwargs, written in calls:
                out = func(*args, **kwargs)
                for old, new in zip(tensors(written), tensors(out), strict=True):
                    if old is not new:
                        old.copy_(new)
            return outputs

        return replay


def tensors(out):
    return [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)]


class _Writing(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name != "aten::scaled_dot_product_attention" and func._can_decompose():
            with self:  # in inference mode, what consists of operations arrives whole
                return func.decompose(*args, **kwargs)
        assert name not in READS, f"{name} in a recorded computation"
        assert not any(word in name for word in RANDOM), f"{name} in a recorded computation"
        out = func(*args, **kwargs)
        if not func.is_view and name not in ALLOCATES:
            self.calls.append((func, args, kwargs, out))
        return out
