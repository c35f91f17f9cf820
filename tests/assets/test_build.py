"""How the embedded verifier is built: nothing held out is shown, growing changes nothing, packing loses nothing."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from tiny_verifier.conversations import FORMS, cut, forms_for
from tiny_verifier.corpus import CorpusConfig, InventedNames, training_documents
from tiny_verifier.repetition import closes_repetition, repetition_loss
from tiny_verifier.report import loops, repeated_share
from tiny_verifier.stdlib import module_entities, normal, read_entities, tidy
from tiny_verifier.tokenizer import render, train_tokenizer
from tiny_verifier.train import grown, pack

SOURCE = '''
class Stack(list):
    """A stack.

    Wraps over
    two lines.
    """
    def peek(self, depth=0, *rest, strict):
        """Return the top."""
        if strict:
            raise IndexError("empty")
        return self[-1]
'''


@pytest.fixture
def entities():
    import ast

    return {entity.full_name: entity for entity in module_entities("toy", ast.parse(SOURCE))}


def test_an_object_is_described_by_its_source(entities):
    stack, peek = entities["toy.Stack"], entities["toy.Stack.peek"]
    assert stack.doc == "A stack.\n\nWraps over two lines."
    assert stack.definition == "class Stack(list):" and stack.members == ("peek",)
    assert peek.definition == "def peek(self, depth=0, *rest, strict):"
    assert peek.signature == "toy.Stack.peek(depth=0, *rest, strict)"
    assert [(p.name, p.kind) for p in peek.parameters] == [
        ("depth", "optional"),
        ("*rest", "varargs"),
        ("strict", "required"),
    ]
    assert peek.raises == ("IndexError",) and peek.returns == ("self[-1]",)


def test_answers_written_by_hand(entities):
    peek = entities["toy.Stack.peek"]
    assert set(forms_for(peek)) >= {"what", "arguments", "raises", "code"}
    assert FORMS["what"].answer(peek) == ("```python\ndef peek(self, depth=0, *rest, strict):\n```\n\nReturn the top.")
    assert FORMS["raises"].answer(peek) == "`peek` raises one exception:\n\n- `IndexError`"


def test_an_invented_name_stands_everywhere_the_old_one_stood(entities):
    peek = entities["toy.Stack.peek"]
    renamed = InventedNames(list(entities.values()), random.Random(3)).rename(peek)
    assert renamed.definition == f"def {renamed.name}(self, depth=0, *rest, strict):"
    assert renamed.signature == f"{renamed.full_name}(depth=0, *rest, strict)"


def test_prose_is_reflowed_and_lists_and_examples_are_kept():
    assert tidy("one\ntwo ``x``\n\n- a\n- b\n\n>>> f()\n1") == "one two `x`\n\n- a\n- b\n\n>>> f()\n1"


def test_a_cut_text_ends_with_a_sentence():
    assert cut("First one. Second one. Third one is long.", 25) == "First one. Second one."


def test_nothing_held_out_is_shown_in_training():
    entities = read_entities(packages=("asyncio", "email", "http", "logging", "unittest"))
    documents = training_documents(entities, CorpusConfig(), random.Random(0))
    texts = [d if isinstance(d, str) else " ".join(m["content"] for m in d) for d in documents]
    shown = normal(" ".join(texts))
    heldout = [entity for entity in entities if entity.heldout and len(entity.doc) >= 60]
    assert len(heldout) > 20
    assert not [e.full_name for e in heldout if re.search(rf"`{re.escape(e.full_name)}[`(]", " ".join(texts))]
    leaked = [e.full_name for e in heldout if normal(e.doc[:100]) in shown]
    assert not leaked


def tiny_llama(num_layers: int, vocab_size: int = 64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def test_a_grown_model_computes_the_same_function():
    torch.manual_seed(0)
    shallow = tiny_llama(2)
    deep = grown(shallow, tiny_llama(6))
    ids_NT = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(deep(ids_NT).logits, shallow(ids_NT).logits)


def test_packing_keeps_every_document_whole_and_once():
    documents = ["a b c " * n for n in range(1, 12)]
    tokenizer = train_tokenizer(iter(documents), vocab_size=300, max_length=64)
    tokens_NT = pack(tokenizer, documents, row_length=64)
    packed = tokenizer.decode(tokens_NT.flatten().tolist()).split("<|endoftext|>")
    assert sorted(filter(None, packed)) == sorted(documents)
    assert json.dumps(render(tokenizer, "x")) == '"x<|endoftext|>"'


def test_repetition_is_measured_as_counted_by_hand():
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert loops([1, 2, 3, 4] * 8) and not loops(list(range(40)))


def test_tokens_that_close_a_repeated_ngram_are_found():
    row = torch.tensor([[1, 2, 3, 1, 2, 3, 9, 2, 3]])
    # 2-grams: 12 23 31 12* 23* 39 92 23*
    assert closes_repetition(row, n=2).tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 1]]


def test_the_penalty_on_loops_lowers_the_probability_of_repeated_tokens():
    torch.manual_seed(0)
    model, tokenizer = looping_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    penalties = []
    for _ in range(30):
        penalty = repetition_loss(model, tokenizer, ["a b", "c"], num_new_tokens=24)
        if penalty is None:
            break
        penalties.append(penalty.item())
        optimiser.zero_grad()
        penalty.backward()
        optimiser.step()
    assert penalties, "the model was to loop at first"
    assert len(penalties) < 30 or penalties[-1] < 0.5 * penalties[0]


def looping_model() -> tuple[LlamaForCausalLM, object]:
    """An untrained model with a large embedding: its greedy text is one token again and again."""
    tokenizer = train_tokenizer(iter(["a b c d e f"]), vocab_size=270, max_length=64)
    model = tiny_llama(2, vocab_size=len(tokenizer))
    model.get_input_embeddings().weight.data.mul_(20)
    return model, tokenizer
