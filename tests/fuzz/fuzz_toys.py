"""Small checkpoints of every algorithm, values that nobody expects, and a watch over time, memory and exceptions."""

from __future__ import annotations

import copy
import json
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from speculators import SpeculatorModel
from speculators.train.checkpointer import save_speculator

MOST_SECONDS = 2.0
MOST_BYTES = 500_000_000
VOCAB, DRAFT_VOCAB, HIDDEN = 64, 32, 16
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rope_parameters"),
)
BLOCKS = {"mask_token_id": 3, "block_size": 4}
ALGORITHMS = {
    "eagle3": {"target_layer_ids": [1, 2, 3], "draft_vocab_size": DRAFT_VOCAB, "norm_before_fc": True},
    "peagle": {"target_layer_ids": [1, 2, 3], "draft_vocab_size": DRAFT_VOCAB, "mask_token_id": 3},
    "dflash": {"target_layer_ids": [1, 2, 3], **BLOCKS},
    "dspark": {"target_layer_ids": [1, 2, 3], "draft_vocab_size": DRAFT_VOCAB, "markov_rank": 4, **BLOCKS},
    "mtp": {"num_speculative_steps": 2},
    "eagle": {},
    "medusa": {"num_heads": 2},
    "mlp": {"n_predict": 2, "inner_dim": 8},
}


def save_verifier(path: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def save_checkpoint(algorithm: str, path: Path, verifier: str) -> Path:
    arguments: dict[str, Any] = {"draft_vocab_size": None, **ALGORITHMS[algorithm]}
    layers: Any = AutoConfig.from_pretrained(verifier)
    if algorithm != "mtp":
        arch = "qwen3" if algorithm in ("dflash", "dspark") else "llama"
        shape = {key: value for key, value in layers.to_dict().items() if key in SHAPE}
        layers = AutoConfig.for_model(arch, num_hidden_layers=1, **shape)
    kept = torch.arange(0, VOCAB, VOCAB // DRAFT_VOCAB)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    maps = (t2d, kept - torch.arange(DRAFT_VOCAB)) if arguments["draft_vocab_size"] else (None, None)
    model = SpeculatorModel.get_class(algorithm).from_training_args(
        layers, verifier_name_or_path=verifier, t2d=maps[0], d2t=maps[1], **arguments
    )
    path.mkdir(parents=True)
    save_speculator(model, path)
    return path


# -- values that nobody expects ----------------------------------------------------------------------------------------

ODD_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            7,
            10**9,
            2**31,
            2**63,
            -(10**30),
            1.5,
            -0.0,
            1e308,
            float("nan"),
            float("inf"),
        ]
    ),
    st.sampled_from(
        [
            "",
            "x",
            "-x",
            "../x",
            "/dev/null",
            "1",
            "Qwen/Qwen3-8B",
            "\x1b[2J",
            "[/b]",
            "\ud800",
            "a\nb",
            "None",
            "x" * 9999,
        ]
    ),
    st.sampled_from([[], {}, [[]], [{}], {"": None}, {"a": {"b": []}}, [1, "2", None], [0] * 1000]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
)


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index in a JSON value, outermost first."""
    if isinstance(values, dict):
        children = list(values.items())
    elif isinstance(values, list):
        children = list(enumerate(values[:4]))
    else:
        return []
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, values: dict[str, Any], most: int = 3) -> Any:
    """The values with one to `most` of them replaced, removed or added."""
    changed = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, most))):
        found = places(changed)
        if not found:
            return changed
        *parents, last = draw(st.sampled_from(found))
        parent = changed
        for key in parents:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[last] = draw(ODD_VALUES.map(copy.deepcopy))
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4) | st.sampled_from(["auto_map", "model_type", "dtype"]))] = draw(
                ODD_VALUES.map(copy.deepcopy)
            )
    return changed


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


# -- the watch ---------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """Not an `Exception`: code under test cannot take it for one of its own."""


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def watched(*documented: type[Exception]) -> Iterator[None]:
    """Lets only the documented exceptions pass, within `MOST_SECONDS` of this process and `MOST_BYTES`."""

    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"more than {5 * MOST_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 5 * MOST_SECONDS)
    begun_s, begun_bytes = time.process_time(), peak_bytes()
    try:
        yield
    except documented as error:
        assert str(error), f"{type(error).__name__} without a message"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    taken_s, taken_bytes = time.process_time() - begun_s, peak_bytes() - begun_bytes
    assert taken_s < MOST_SECONDS, f"{taken_s:.1f} s"
    assert taken_bytes < MOST_BYTES, f"{taken_bytes / 1e6:.0f} MB"
