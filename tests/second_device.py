"""A device that is not the host, on a machine without one: its tensors are `meta` tensors, and each storage has a twin
on the host that holds its values. So what runs on a GPU runs here, by the routes that a GPU takes, with its results;
and three things are counted that decide how fast a GPU is:

    reads      the host waits for a value: item, tolist, cpu, bool(tensor), nonzero, unique, an index that is a mask
    waits      the host waits for a copy to the device, because it was not `non_blocking`
    launches   operations of the device; views and allocations are none

As on a GPU, an operation on tensors of two devices is an error. Numbers without a dimension may lie anywhere.
"""

import contextlib
from collections import Counter

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("meta")
HOST = torch.device("cpu")
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::multinomial",
    "aten::equal",
    "aten::bincount",
)
"""Their results, or the sizes of them, are known when the device has computed them."""
ALLOCATIONS = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")
PURGED_EVERY = 5000


class SecondDevice:
    """A context manager. Inside, `DEVICE` computes; `counts` is what it did since `start_counting`."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.where: Counter[str] = Counter()
        """Operations that made the host wait."""
        self._storage_of_device: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._storage_of_host: dict[int, StorageWeakRef] = {}
        self._is_counting = True

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        original = torch.Generator
        self._stack.callback(setattr, torch, "Generator", original)
        torch.Generator = _Generator  # torch makes none for `meta`
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def start_counting(self):
        self.counts.clear()
        self.where.clear()

    @contextlib.contextmanager
    def as_one_launch(self):
        """What runs inside is one launch: a graph that was recorded."""
        self.count("launches")
        before, self._is_counting = self._is_counting, False
        try:
            yield
        finally:
            self._is_counting = before

    def count(self, what, where=None):
        if self._is_counting:
            self.counts[what] += 1
            if where is not None:
                self.where[f"{what}: {where}"] += 1
        elif what != "launches":
            raise AssertionError(f"{what} of {where} inside a recorded graph")

    # -- values

    def on_host(self, x):
        """The host's view of a device tensor's values; anything else as it is."""
        if not isinstance(x, torch.Tensor) or x.device != DEVICE:
            return x
        twin = self._storage_of_device[x.untyped_storage()._cdata][1]
        return torch.empty(0, dtype=x.dtype).set_(twin, x.storage_offset(), x.size(), x.stride())

    def on_device(self, x):
        """The device tensor whose values these are."""
        if not isinstance(x, torch.Tensor):
            return x
        twin = x.untyped_storage()
        known = self._storage_of_host.get(twin._cdata)
        if known is not None and not known.expired():
            storage = torch.UntypedStorage._new_with_weak_ptr(known.cdata)
        else:
            storage = torch.UntypedStorage(twin.nbytes(), device=DEVICE)
            self._register(storage, twin)
        return torch.empty(0, dtype=x.dtype, device=DEVICE).set_(storage, x.storage_offset(), x.size(), x.stride())

    def _register(self, storage, twin):
        weak = StorageWeakRef(storage)
        self._storage_of_device[storage._cdata] = (weak, twin)
        self._storage_of_host[twin._cdata] = weak
        if len(self._storage_of_device) % PURGED_EVERY == 0:
            dead = [key for key, (ref, _) in self._storage_of_device.items() if ref.expired()]
            for key in dead:
                _, gone = self._storage_of_device.pop(key)
                self._storage_of_host.pop(gone._cdata, None)

    # -- operations

    def run(self, func, args, kwargs):
        """An operation of the device, on the host's twins."""
        kwargs = {k: HOST if k == "device" and v is not None else v for k, v in kwargs.items()}
        out = func(*mapped(self.on_host, args), **mapped(self.on_host, kwargs))
        if isinstance(out, torch.Tensor) and is_in_place(func):
            for x in tensors_in((args, kwargs)):  # the same tensor comes back
                if x.device == DEVICE and _same(self.on_host(x), out):
                    return x
        # a view of a tensor from outside of inference mode is none of inference mode
        of_outside = getattr(func, "is_view", False) and not args[0].is_inference()
        with torch.inference_mode(torch.is_inference_mode_enabled() and not of_outside):
            return mapped(self.on_device, out)


def mapped(function, x):
    if isinstance(x, (tuple, list)):
        return type(x)(mapped(function, part) for part in x)
    return {key: mapped(function, part) for key, part in x.items()} if isinstance(x, dict) else function(x)


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def is_in_place(func):
    returns = func._schema.returns if hasattr(func, "_schema") else ()
    return bool(returns) and returns[0].alias_info is not None and returns[0].alias_info.is_write


def _same(a, b):
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.dtype == b.dtype
        and (a.storage_offset(), a.size(), a.stride()) == (b.storage_offset(), b.size(), b.stride())
    )


class _Generator(torch.Generator):
    """The device draws with numbers of the host."""

    def __new__(cls, device=HOST):
        return super().__new__(cls, HOST)


class _Functions(TorchFunctionMode):
    """What would not reach the dispatcher as on a GPU."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or HOST) == DEVICE:
            if isinstance(args[0], torch.Tensor):
                return args[0].to(DEVICE, kwargs.get("dtype"))
            made = func(*args, **{**kwargs, "device": HOST})
            return made.to(DEVICE)  # a copy that is waited for
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == DEVICE:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            return func(args[0], tensors, *args[2:])
        if func is F.scaled_dot_product_attention and args[0].device == DEVICE:
            self.device.count("launches")
            with _paused():
                return self.device.run(func, args, kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _paused():
    with torch.utils._python_dispatch._disable_current_modes():
        yield


class _Dispatch(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        tensors = tensors_in((args, kwargs))
        ours = [x for x in tensors if x.device == DEVICE]
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not ours and target != DEVICE:
            return func(*args, **kwargs)
        if name != "aten::scaled_dot_product_attention" and func._can_decompose():
            with self:  # in inference mode, what consists of operations arrives whole
                return func.decompose(*args, **kwargs)
        if name in COPIES:
            return self.copy(func, name, args, kwargs, target)
        hosts = [x for x in tensors if x.device != DEVICE and x.dim()]
        is_index = name in INDEXED
        if hosts and is_index:
            self.device.count("waits", f"{name} with indices of the host")
        assert not hosts or is_index, f"{name} on tensors of two devices"
        is_mask = is_index and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in READS or is_mask or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            self.device.count("reads", name)
        if not func.is_view and name not in ALLOCATIONS and name not in READS[:1] and name != "aten::detach":
            self.device.count("launches")
        return self.device.run(func, args, kwargs)

    def copy(self, func, name, args, kwargs, target):
        """Between the devices, or on one of them."""
        to = args[0].device if name == "aten::copy_" else target or args[0].device
        came_from = args[1].device if name == "aten::copy_" else args[0].device
        is_blocking = not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,)))
        if came_from == to:
            self.device.count("launches")
        elif to == HOST:
            self.device.count("reads", name)
        elif is_blocking:
            self.device.count("waits", name)
        if name == "aten::copy_" and to == HOST:
            args[0].copy_(self.device.on_host(args[1]))
            return args[0]
        if to == HOST:
            return func(self.device.on_host(args[0]), **{**kwargs, "device": HOST})
        return self.device.run(func, args, kwargs)
