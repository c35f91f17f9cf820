"""Finds the device to work on (CUDA, Ascend NPU or CPU), and turns what other people wrote into objects: a wrong value
ends in one `ValueError`, and a config cannot ask for more modules or layers than a drafter has. Nested contexts set up
once and restore once. Counts the memory that tensors take."""

from __future__ import annotations

import importlib.util
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PretrainedConfig
from typing_extensions import Self


def is_npu_available() -> bool:
    """Says whether this machine has an Ascend NPU and its torch package."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    return hasattr(torch, "npu") and bool(torch.npu.is_available())


def _kind() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "npu" if is_npu_available() else "cpu"


def chosen_device(name: str | None) -> str:
    """Returns the name of a device; for None and "auto" that of the first CUDA device, else the CPU's."""
    if name is not None and name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def get_current_device() -> torch.device:
    """Returns the accelerator that this process uses, else the CPU."""
    kind = _kind()
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, getattr(torch, kind).current_device())


def get_device_name() -> str:
    """Returns the device's name for display: "NVIDIA H100 80GB HBM3", "cpu"."""
    kind = _kind()
    return "cpu" if kind == "cpu" else getattr(torch, kind).get_device_name()


def mem_get_info() -> tuple[int, int]:
    """Returns (free, total) bytes of the accelerator; (0, 0) on the CPU."""
    kind = _kind()
    return (0, 0) if kind == "cpu" else getattr(torch, kind).mem_get_info()


def empty_cache() -> None:
    """Returns cached accelerator memory to the device; does nothing on the CPU."""
    kind = _kind()
    if kind != "cpu":
        getattr(torch, kind).empty_cache()


# -- what other people wrote

WRONG_VALUE = (
    *(TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError, MemoryError),
    StrictDataclassError,
)
"""What transformers, torch and our constructors raise for a value that nobody expected there."""
SIZES = ("hidden_size", "vocab_size", "num_attention_heads")
"""No model has less than one of these; torch warns of tensors without elements."""
MOST_MODULES = 20_000
"""Modules and parameters of one drafter: 256 experts in three layers have 3,000."""
MOST_COUNT = 65_536
"""Largest number of layers, heads or experts that a config may ask for: some classes make a list of that length."""
MOST_SIZE = 1 << 40
COUNTS = ("num_", "n_")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises `ValueError`, naming `what`, for a value that the code inside cannot work with."""
    try:
        yield
    except NotImplementedError:  # a RuntimeError that says what is not supported
        raise
    except WRONG_VALUE as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = ": ".join([type(error).__name__, *lines[:2]])[:300]
        raise ValueError(f"{what} has a value that cannot be used ({reason}); correct it, or fetch it again") from error


def refuse_huge(values: Mapping[str, Any], what: str) -> None:
    """Raises `ValueError` for sizes and counts of a config that no model has."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            refuse_huge(value, f"{what}.{key}")
        elif isinstance(value, int):
            most = MOST_COUNT if str(key).startswith(COUNTS) or str(key).endswith("layers") else MOST_SIZE
            if abs(value) > most:
                raise ValueError(f"{what}.{key}={value!r}; at most {most} makes sense there: correct it")
            if key in SIZES and value < 1:
                raise ValueError(f"{what}.{key}={value!r}; it must be at least 1: correct it")


@contextmanager
def bounded_build(what: str) -> Iterator[None]:
    """Raises `ValueError` as soon as this thread has built more than `MOST_MODULES` modules and parameters inside."""
    thread, num_built = threading.get_ident(), 0

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal num_built
        if threading.get_ident() != thread:
            return
        num_built += 1
        if num_built > MOST_MODULES:
            raise ValueError(f"{what} asks for more than {MOST_MODULES} modules; correct its number of layers or heads")

    hooks = (
        module_hooks.register_module_module_registration_hook(count),
        module_hooks.register_module_parameter_registration_hook(count),
    )
    try:
        with warnings.catch_warnings():
            # a size of 0 is refused where shapes are compared, with the tensor's name
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        for hook in hooks:
            hook.remove()


def load_transformer_config(value: Any, default_model_type: str) -> PretrainedConfig:
    """`transformer_layer_config` from what a user or a file gives: a config as it is, or a dict.

    A dict names its class by `model_type`; without one it is of `default_model_type`."""
    if isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"Input should be a dict or an instance of PreTrainedConfig, got {value!r}")
    values = {"model_type": default_model_type, **value}
    refuse_huge(values, "transformer_layer_config")
    with reading("transformer_layer_config"):
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)


# -- contexts


@contextmanager
def replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module has other parameters and buffers."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: own[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name])
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


class NestedContext:
    """A context manager that may be entered again inside itself: calls `set_up` on the first entry and undoes it after
    the last exit; entries in between are only counted."""

    _num_entered = 0
    _undo: ExitStack

    def set_up(self, stack: ExitStack) -> None:
        """Prepares the object; pushes on the stack what must be undone, also when it fails half way."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._num_entered == 0:
            with ExitStack() as stack:
                self.set_up(stack)
                self._undo = stack.pop_all()
        self._num_entered += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._num_entered -= 1
        if self._num_entered == 0:
            self._undo.close()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, of those made inside. `before`: tensors that are there already."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: Any = WeakIdKeyDictionary()
        for tensor in before:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known[storage] = True
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, num_bytes: int) -> None:
        self.live -= num_bytes
