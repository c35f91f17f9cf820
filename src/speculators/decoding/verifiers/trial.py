"""Tries out how a verifier decodes, against plain forwards without a cache; and the small random copies of models it is
tried on: the same class, settings and kinds of layers, but few and narrow layers and short windows.

Shapes: B rows, T columns, K nodes, V vocabulary.

What an attention knows about place is code, not weights. A copy whose windows are a few tokens long shows in
milliseconds what the model itself would show only beyond thousands of tokens (`attention_proof`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from speculators.decoding.trees.token_tree import path_to
from speculators.interfaces import Verifier

TOLERANCE_BY_DTYPE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_PRECISION_TOLERANCE = 0.1
"""Largest difference that is rounding, as a share of the largest logit."""
SHORT = 6
"""Tokens of the shorter prompt."""
LAST_CHUNK = 9
NUM_LATER = 12
"""The trial's tokens after the prompts."""
DRAFTS, KEPT_DRAFTS = 4, (1, 3)
PARENTS, KEPT_BRANCH = [-1, -1, 1], [0, 2, 3]
CHOSEN_FROM = 90
"""Token ids below this are used, without special ones."""


class AnotherText(Exception):
    """Says what differs from the model's own forward."""


class Claim(NamedTuple):
    """What a trial says of a text."""

    tried: str
    row: int
    text: list[int]
    logits_V: Tensor


class Trial:
    """Decodes two prompts in rows 0 and 2, whatever the model says, and compares all logits with plain forwards."""

    def __init__(self, model: PreTrainedModel, verifier: Verifier, *, has_trees: bool):
        self.model, self.verifier, self.has_trees = model, verifier, has_trees
        special = special_ids(model.config)
        self.ids = [i for i in range(3, min(CHOSEN_FROM, self.verifier.vocab_size)) if i not in special]
        self.num_taken = 0
        self.texts: list[list[int]] = [[], [], []]
        self.claims: list[Claim] = []

    def run(self, num_long: int) -> None:
        """Raises AnotherText unless all logits are those of plain forwards."""
        with self.verifier:
            self.prefill([num_long - LAST_CHUNK, 0, SHORT - 2])
            self.prefill([LAST_CHUNK, 0, 2])
            chain = list(range(-1, DRAFTS))
            self.score(
                "a chain after dropped drafts", chain, [list(range(n)) for n in (KEPT_DRAFTS[0], 0, KEPT_DRAFTS[1])]
            )
            if self.has_trees:
                self.score("a draft tree", [-1, *(parent + 1 for parent in PARENTS)], [KEPT_BRANCH, [], [0]])
            self.score("a batch of different lengths", [-1], [[0], [], [0]])
        self.compare()

    def tokens(self, num: int) -> list[int]:
        self.num_taken += num
        return [self.ids[37 * i % len(self.ids)] for i in range(self.num_taken - num, self.num_taken)]

    def prefill(self, num_tokens: list[int]) -> None:
        tokens = [self.tokens(num) for num in num_tokens]
        num_columns = max(num_tokens)
        filler = self.ids[:1]  # not token 0, whose embedding is often never trained
        rows = [row + filler * (num_columns - len(row)) for row in tokens]
        padded = torch.tensor(rows, device=self.verifier.device)
        num_valid_B = torch.tensor(num_tokens)
        output = self.verifier.score(padded, num_valid_B, last_only=True)
        self.verifier.keep(torch.arange(num_columns).expand(3, num_columns), num_valid_B)
        for row, new in enumerate(tokens):
            self.texts[row] += new
            if new:
                self.claims.append(
                    Claim("a batch of different lengths", row, list(self.texts[row]), output.logits_BTV[row, 0])
                )

    def score(self, what: str, parent_by_column: list[int], kept_by_row: list[list[int]]) -> None:
        """Score a root and drafts below it, keep some columns."""
        num_columns = len(parent_by_column)
        is_tree = parent_by_column != list(range(-1, num_columns - 1))
        parents_K = torch.tensor([column - 1 for column in parent_by_column[1:]]) if is_tree else None
        tokens = [self.tokens(num_columns) for _ in self.texts]
        num_valid_B = torch.tensor([num_columns if text else 0 for text in self.texts])
        output = self.verifier.score(torch.tensor(tokens, device=self.verifier.device), num_valid_B, parents_K)
        for row, text in enumerate(self.texts):
            for column in range(num_columns if text else 0):
                path = path_to(column, parent_by_column)
                self.claims.append(
                    Claim(what, row, text + [tokens[row][c] for c in path], output.logits_BTV[row, column])
                )
        width = max(map(len, kept_by_row))
        columns_BT = torch.tensor([kept + [0] * (width - len(kept)) for kept in kept_by_row])
        self.verifier.keep(columns_BT, torch.tensor([len(kept) for kept in kept_by_row]))
        for row, kept in enumerate(kept_by_row):
            self.texts[row] = self.texts[row] + [tokens[row][column] for column in kept]

    def compare(self) -> None:
        """One plain forward over the texts of each row, padded at their ends: a causal model does not look there."""
        tolerance = TOLERANCE_BY_DTYPE.get(self.model.dtype, HALF_PRECISION_TOLERANCE)
        texts_by_row = {row: whole_texts([claim.text for claim in self.claims if claim.row == row]) for row in (0, 2)}
        logits_by_row = {row: self.plain_logits(texts) for row, texts in texts_by_row.items()}
        for claim in self.claims:
            index = next(i for i, text in enumerate(texts_by_row[claim.row]) if begins(text, claim.text))
            expected_V = logits_by_row[claim.row][index, len(claim.text) - 1]
            if not expected_V.isfinite().all():
                continue  # a damaged model shows nothing here; decoding names the request that meets it
            difference = relative_difference(claim.logits_V, expected_V)
            if not difference <= tolerance:
                raise AnotherText(f"{claim.tried} in one forward changes its logits by {difference:.1%}")

    def plain_logits(self, texts: list[list[int]]) -> Tensor:
        length = max(map(len, texts))
        padded = [text + [text[-1]] * (length - len(text)) for text in texts]
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor(padded, device=self.verifier.device), use_cache=False).logits


def special_ids(config: PretrainedConfig) -> set[int]:
    values = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    return {i for value in values for i in (value if isinstance(value, list) else [value])}


def whole_texts(texts: list[list[int]]) -> list[list[int]]:
    """The texts that begin no other one."""
    whole: list[list[int]] = []
    for text in sorted(texts, key=len, reverse=True):
        if not any(begins(longer, text) for longer in whole):
            whole.append(text)
    return whole


def begins(longer: list[int], text: list[int]) -> bool:
    return longer[: len(text)] == text


def relative_difference(ours_V: Tensor, expected_V: Tensor) -> float:
    ours_V, expected_V = ours_V.float(), expected_V.float()
    return ((ours_V - expected_V).abs().max() / expected_V.abs().max().clamp_min(1e-30)).item()


# -- small copies

WINDOW = 8
"""Windows of the copy, in tokens."""
VOCAB_SIZE = 97
LAST_TOKEN_ID = VOCAB_SIZE - 1
"""Special tokens that were beyond the vocabulary."""
MOST_POSITIONS = 512
LEAST_LAYERS, MOST_LAYERS = 4, 12
"""Deeper random models enlarge rounding, as when it chooses another expert."""
WEIGHT_STD = 0.2
"""Large, so that attention matters: with the usual 0.02 every token gets almost the same output."""

IS_LAYER_COUNT = re.compile(r"(num_)?(hidden|encoder|decoder)?_?layers?|n_layers?|num_blocks|num_layers_per_stack")
IS_WINDOW = re.compile(
    r".*(sliding_window|window_size|attention_chunk_size)(_size)?|local_attention|attention_window|floor_scale"
)
SIZES: list[tuple[str, int]] = [
    (r".*vocab_size(_per_layer_input|_base)?", VOCAB_SIZE),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions",
        MOST_POSITIONS,
    ),
    (r"model_max_length|rel_extent", MOST_POSITIONS),
    (r"original_max_position_embeddings", MOST_POSITIONS),
    (r"hidden_size|n_embd|d_model|model_dim|dim|embed_dim|emb_dim|embedding_dim|attention_hidden_size", 32),
    (r"word_embed_proj_dim|embedding_size|(in|out)put_embedding_size|lru_width|backbone_hidden_size", 32),
    (r"mamba_d_ssm", 64),
    (r"num_attention_heads|n_heads?|num_heads|attention_heads|.*_attention_heads|.*linear_num(_value)?_heads", 4),
    (r"linear_num_value_heads|index_n_heads", 4),
    (r"mamba_n(um)?_heads|n_mamba_heads", 8),
    (r"linear_num_key_heads", 2),
    (r"qk_head_dim", 16),
    (
        r".*head_dim|d_head|dim_head|kv_channels|attention_head_size|rotary_dim|mamba_d_head|mamba_headdim|query_pre_attn_scalar",
        8,
    ),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|.*ffn_hidden_size|d_inner|dff|dim_ff|n_inner|feed_forward_size", 48),
    (r"(q|kv|o)_lora_rank|dt_rank|time_step_rank|mamba_dt_rank|hidden_size_per_layer_input|router_hidden_size", 16),
    (r".*_d_state|ssm_state_size|state_size|mamba_chunk_size|chunk_size", 8),
    (r"(num|n)(_local|_routed)?_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|mamba_n_groups|n_groups|mamba_ngroups|o_groups", 1),
]
NO_SETTINGS = ("_name_or_path", "output_attentions")
"""What every config writes and not every one takes."""


def small_copy(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The copy, in float32 on the CPU, in evaluation mode. The random state of the caller is left as it was."""
    small = small_config(config)
    small._attn_implementation = config._attn_implementation
    return random_model(lambda: model_class(small))


def random_model(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Builds a model and draws its matrices."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: Any = build().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, WEIGHT_STD)
    return model.eval().requires_grad_(False)


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config with every size small. Lists with one entry per layer are cut to the first layers of all kinds."""
    values = {name: value for name, value in config.to_dict().items() if name not in NO_SETTINGS}
    inner = {name: small_config(value) for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    counts = {name: n for name, n in values.items() if IS_LAYER_COUNT.fullmatch(name) and isinstance(n, int)}
    most = max(counts.values(), default=0)
    lists = {name: list(v) for name, v in values.items() if isinstance(v, (list, tuple))}
    indices = {name for name, v in lists.items() if are_indices(v)}
    per_layer = {name: v for name, v in lists.items() if len(v) == most > 0 and name not in indices}
    num_layers = num_layers_of_all_kinds(list(per_layer.values()), most)
    small = {name: small_value(name, value) for name, value in values.items()}
    small |= {name: min(n, num_layers) for name, n in counts.items()}
    small |= {name: [small_value(name, v) for v in value[:num_layers]] for name, value in per_layer.items()}
    small |= {name: [i for i in lists[name] if i < num_layers] for name in indices if name.endswith(("layers", "idxs"))}
    by_layer = {name: v for name, v in values.items() if isinstance(v, dict) and v and all(map(is_number, v))}
    small |= {name: {i: v for i, v in value.items() if int(i) < num_layers} for name, value in by_layer.items()}
    if "expand" in values and "num_heads" in values:
        small["num_heads"] = 4 * values["expand"]
    if values.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = num_layers // 2
    for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"):
        if isinstance(values.get(name), int):
            heads = values.get(name.replace("key_value", "attention")) or values.get("num_attention_heads")
            small[name] = 4 if values[name] == heads else 1 if values[name] == 1 else 2
    return type(config)(**{**small, **inner})


def are_indices(values: list[Any]) -> bool:
    """Whether this may be numbers of layers: integers, each once."""
    return len(values) > 1 and all(type(value) is int for value in values) and len(set(values)) == len(values)


def is_number(key: Any) -> bool:
    return str(key).isdigit()


def small_value(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name.startswith("rope"):
        return {key: small_value(key, inner) for key, inner in value.items()}
    if isinstance(value, list) and name.endswith("_factor"):
        return value[:4]
    if name.endswith(("token_id", "token_index")):
        return min(value, LAST_TOKEN_ID) if isinstance(value, int) else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if IS_WINDOW.fullmatch(name):
        return min(value, WINDOW)
    return next((min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name)), value)


def num_layers_of_all_kinds(per_layer: list[Any], most: int) -> int:
    """The least number of first layers among which every kind of layer is."""
    num_layers = min(LEAST_LAYERS, most)
    for values in per_layer:
        kinds = [str(value) for value in values]
        num_layers = max(num_layers, max(kinds.index(kind) for kind in set(kinds)) + 1)
    return min(num_layers, MOST_LAYERS)


def windows_of(config: PretrainedConfig) -> list[int]:
    """Every window that a config names."""
    found = [v for name, v in config.to_dict().items() if IS_WINDOW.fullmatch(name) and isinstance(v, int) and v > 0]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            found += windows_of(value)
    return found
