"""Small stand-ins: tiny random models of many architectures, Markov-table verifiers and drafters, scripted proposers.

Shapes: B rows, T tokens, K draft tokens, V vocabulary.

A Markov table makes thousands of generations a second, and its law is known exactly: p(next | last token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from speculators.interfaces import CaptureSpec, Committed, DraftSampling, Proposal, VerifierOutput

VOCAB = 97
WINDOW = 12
"""Sliding windows are shorter than most test sequences."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, num_hidden_layers=4),
    "llama_tied": LlamaConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, num_hidden_layers=3),
    "qwen3": Qwen3Config(**SHAPE, num_hidden_layers=3, head_dim=16),
    "mistral_sliding": MistralConfig(**SHAPE, num_hidden_layers=3, sliding_window=WINDOW, head_dim=8),
    "gemma2": Gemma2Config(
        **SHAPE,
        num_hidden_layers=4,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
        attn_implementation="eager",
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        num_hidden_layers=4,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "phi": PhiConfig(**SHAPE, num_hidden_layers=3),
    "phi3": Phi3Config(**SHAPE, num_hidden_layers=3, sliding_window=WINDOW),
    "gpt_oss": GptOssConfig(
        **SHAPE, num_hidden_layers=4, head_dim=8, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
}


def tiny_model(name: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model, fp32, whose greedy text wanders (the head is scaled up so that near ties are rare)."""
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **changes})
    config._attn_implementation = CONFIGS[name]._attn_implementation
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=CONFIGS[name]._attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)  # large: attention must matter, so that text does not settle into a loop
    model.generation_config.eos_token_id = None  # tests say themselves when to stop
    model.config.eos_token_id = None
    return model.eval().requires_grad_(False)


def prompts(num: int, *, seed: int = 0, shortest: int = 3, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generated(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' own greedy continuation, one prompt at a time."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


class MarkovVerifier:
    """p(next | last token) from a table, behind the verifier's seam. Trees too: a node's law is that of its token."""

    def __init__(self, probs_VV: Tensor):
        self.logits_VV = probs_VV.log()
        self.vocab_size = len(probs_VV)
        self.device = torch.device("cpu")

    def score(
        self,
        token_ids_BT: Tensor,
        num_valid_B: Tensor,
        parents_K: Tensor | None = None,
        *,
        first_row: int = 0,
        last_only: bool = False,
    ) -> VerifierOutput:
        if last_only:
            token_ids_BT = token_ids_BT.gather(1, (num_valid_B - 1).clamp(min=0)[:, None])
        return VerifierOutput(self.logits_VV[token_ids_BT], None)

    def keep(self, columns_BT: Tensor, num_kept_B: Tensor) -> None: ...

    def truncate(self, row: int, length: int) -> None: ...

    def share_prefix(self, from_row: int, to_row: int, length: int) -> None: ...

    def clear_unused(self) -> None: ...

    def __enter__(self) -> MarkovVerifier:
        return self

    def __exit__(self, *exc: object) -> None: ...


class MarkovDrafter:
    """Draws drafts from its own table; temperature is ignored, q is what it really drew from."""

    capture = CaptureSpec()

    def __init__(self, probs_VV: Tensor, *, ragged: bool = False):
        self.probs_VV = probs_VV
        self.ragged = ragged
        self._last_by_row: dict[int, int] = {}

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        for row, new in enumerate(committed.num_new_B.tolist()):
            if new:
                self._last_by_row[row] = int(committed.token_ids_BT[row, new - 1])
        token_B = torch.tensor([self._last_by_row.get(row, 0) for row in range(len(committed.num_new_B))])
        tokens, probs = [], []
        for _ in range(num_tokens):
            probs.append(self.probs_VV[token_B])
            token_B = torch.multinomial(probs[-1], 1, generator=sampling.generator)[:, 0]
            tokens.append(token_B)
        token_ids_BK = torch.stack(tokens, 1)
        if self.ragged:  # how long a row's draft is depends on the row alone
            keep_B1 = (torch.arange(len(token_B)) % (num_tokens + 1))[:, None]
            token_ids_BK = token_ids_BK.masked_fill(torch.arange(num_tokens) >= keep_B1, -1)
        return Proposal(token_ids_BK, torch.stack(probs, 1))


class ScriptedProposer:
    """Knows (or pretends to know) each prompt's continuation. `draft(row text, K)` gives the tokens.

    It checks on the way that the engine commits what it should: rows grow by exactly the new tokens.
    """

    def __init__(self, draft: Callable[[list[int], int], list[int]], capture: CaptureSpec | None = None):
        self.capture = capture or CaptureSpec()
        self.draft = draft
        self.text_by_row: dict[int, list[int]] = {}
        self.num_calls = 0

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        self.num_calls += 1
        drafts = []
        for row, (new, total) in enumerate(
            zip(committed.num_new_B.tolist(), committed.num_committed_B.tolist(), strict=True)
        ):
            if new == 0:
                drafts.append([-1] * num_tokens)
                continue
            before = [] if new == total else self.text_by_row[row]
            self.text_by_row[row] = before + committed.token_ids_BT[row, :new].tolist()
            assert len(self.text_by_row[row]) == total
            draft = self.draft(self.text_by_row[row], num_tokens)
            drafts.append(draft + [-1] * (num_tokens - len(draft)))
        return Proposal(torch.tensor(drafts, dtype=torch.int64).view(len(drafts), num_tokens))


def oracle(texts: Sequence[list[int]], num_right: int | None = None) -> Callable[[list[int], int], list[int]]:
    """Drafts the true continuation (`texts` are prompt + output), of which the first `num_right` tokens are right."""

    def draft(text: list[int], num_tokens: int) -> list[int]:
        for whole in texts:
            if whole[: len(text)] == text:
                right = whole[len(text) : len(text) + num_tokens]
                return [t if num_right is None or i < num_right else (t + 1) % VOCAB for i, t in enumerate(right)]
        raise AssertionError(f"the committed text {text} is not on the way to any reference")

    return draft


def at_random(seed: int, vocab_size: int = VOCAB) -> Callable[[list[int], int], list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def draft(text: list[int], num_tokens: int) -> list[int]:
        length = int(torch.randint(0, num_tokens + 1, (), generator=generator))
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    return draft


class TreeProposer:
    """A fixed tree filled with tokens: one path is the true continuation, its siblings are wrong."""

    def __init__(self, texts: Sequence[list[int]], parents: Sequence[int], right_path: Sequence[int]):
        self.capture = CaptureSpec()
        self.parents_K = torch.tensor(parents)
        self.right_path = list(right_path)
        self._scripted = ScriptedProposer(oracle(texts))

    def propose(self, committed: Committed, num_tokens: int, sampling: DraftSampling) -> Proposal:
        chain = self._scripted.propose(committed, len(self.right_path), sampling).token_ids_BK
        token_ids_BK = torch.empty(len(chain), len(self.parents_K), dtype=torch.int64)
        for slot in range(len(self.parents_K)):
            is_right = slot in self.right_path
            depth = self._depth(slot)
            right_B = chain[:, min(depth, len(self.right_path)) - 1]
            wrong_B = torch.where(right_B >= 0, (right_B + 1 + slot) % VOCAB, -1)
            token_ids_BK[:, slot] = right_B if is_right else wrong_B
        return Proposal(token_ids_BK, parents_K=self.parents_K)

    def _depth(self, slot: int) -> int:
        parent = int(self.parents_K[slot])
        return 1 if parent < 0 else 1 + self._depth(parent)
