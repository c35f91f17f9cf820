"""The text the verifier learns from: conversations, documentation and source, all from the standard library.

Objects marked as held out appear nowhere in it: not in questions, not in answers, not in the source excerpts.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_verifier.conversations import conversation, draw_forms, forms_for
from tiny_verifier.stdlib import Entity, heldout_lines, read_entities, source_files, tidy


@dataclass(frozen=True)
class CorpusConfig:
    seed: int = 20
    conversations_per_entity: int = 7
    """Of a documented object, each of another form; an undocumented one gets one in `undocumented_share` of cases."""
    undocumented_share: float = 0.3
    renamed_per_entity: int = 1
    """Further conversations in which the object has an invented name, so that names must be read, not remembered."""
    multi_turn_share: float = 0.2
    source_chars: int = 2_500_000
    """Source excerpts teach indentation and names; more of them would crowd out the prose."""
    source_chunk_chars: int = 1_500
    num_train_prompts: int = 3_000
    num_heldout_prompts: int = 200
    min_prompt_answer_chars: int = 120
    """A prompt answered in a few words measures nothing of a drafter."""


def build(folder: Path, config: CorpusConfig) -> dict[str, int]:
    """Writes documents (one JSON string or conversation a line) and prompts into `folder`; returns counts."""
    rng = random.Random(config.seed)
    entities = read_entities()
    documents = training_documents(entities, config, rng)
    heldout = [entity for entity in entities if entity.heldout and entity.doc and forms_for(entity)]
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", documents)
    heldout_documents = [c for entity in heldout for c in entity_conversations(entity, config, rng)]
    write_lines(folder / "heldout.jsonl", heldout_documents)
    prompts = {
        "train": sample_prompts(
            [entity for entity in entities if not entity.heldout], config.num_train_prompts, rng, config
        ),
        "heldout": sample_prompts(heldout, config.num_heldout_prompts, rng, config),
    }
    for split, rows in prompts.items():
        write_lines(folder / "prompts" / f"{split}.jsonl", [{"conversations": row} for row in rows])
    return {
        "objects": len(entities),
        "documented objects": sum(bool(entity.doc) for entity in entities),
        "held-out objects": len(heldout),
        "training conversations": sum(isinstance(document, list) for document in documents),
        "training documents": len(documents),
        "held-out conversations": len(heldout_documents),
    }


def training_documents(
    entities: list[Entity], config: CorpusConfig, rng: random.Random
) -> list[str | list[dict[str, str]]]:
    """Conversations and plain texts, shuffled, with nothing about the held-out ones of `entities`."""
    documents: list[str | list[dict[str, str]]] = []
    train = [entity for entity in entities if not entity.heldout]
    names = InventedNames(train, rng)
    for entity in train:
        documents += entity_conversations(entity, config, rng)
        if entity.is_callable and entity.doc:
            documents += [renamed_conversation(names.rename(entity), rng) for _ in range(config.renamed_per_entity)]
    documents += topics()
    documents += source_excerpts(entities, config, rng)
    rng.shuffle(documents)
    return documents


def entity_conversations(entity: Entity, config: CorpusConfig, rng: random.Random) -> list[list[dict[str, str]]]:
    if not entity.doc:
        # Hundreds of codec modules repeat the same undocumented classes.
        if rng.random() > config.undocumented_share or entity.module.startswith("encodings"):
            return []
        return [conversation(entity, draw_forms(entity, rng, 1), rng)] if forms_for(entity) else []
    found = []
    for name in draw_forms(entity, rng, config.conversations_per_entity):
        more = draw_forms(entity, rng, 2) if rng.random() < config.multi_turn_share else []
        found.append(conversation(entity, [name, *(other for other in more if other != name)], rng))
    return found


class InventedNames:
    """New names for modules, classes and functions, put together from words of the real ones."""

    def __init__(self, entities: list[Entity], rng: random.Random):
        words = {word for entity in entities for word in re.findall(r"[a-z]{3,}", entity.name.lower())}
        self.words, self.rng = sorted(words), rng

    def name(self, old: str) -> str:
        words = self.rng.choices(self.words, k=self.rng.choice((1, 2, 2, 3)))
        return "".join(map(str.capitalize, words)) if old[:1].isupper() else "_".join(words)

    def rename(self, entity: Entity) -> Entity:
        """`entity` under another name in another module, in its documentation too."""
        qualname = ".".join(self.name(part) for part in entity.qualname.split("."))
        module = self.rng.choice(self.words)
        leaf = qualname.rsplit(".", 1)[-1]
        old_leaf = re.escape(entity.name)
        return replace(
            entity,
            module=module,
            qualname=qualname,
            definition=re.sub(rf"^((?:async )?def ){old_leaf}\(", rf"\g<1>{leaf}(", entity.definition),
            signature=f"{module}.{qualname}({entity.signature.partition('(')[2]}",
            doc=re.sub(rf"\b{old_leaf}\b", leaf, entity.doc) if len(entity.name) > 5 else entity.doc,
        )


def renamed_conversation(entity: Entity, rng: random.Random) -> list[dict[str, str]]:
    """About what can be read off the question, for nothing is known of an object that does not exist."""
    readable = [
        name for name in ("what", "explain", "long", "arguments", "signature", "code") if name in forms_for(entity)
    ]
    return conversation(entity, [rng.choice(readable)], rng)


def sample_prompts(
    entities: list[Entity], number: int, rng: random.Random, config: CorpusConfig
) -> list[list[dict[str, str]]]:
    """Conversations about `number` different objects; private ones are left out, people rarely ask about them."""
    public = [e for e in entities if len(e.doc) >= 40 and "._" not in e.full_name and e.full_name[0] != "_"]
    rng.shuffle(public)
    rows: list[list[dict[str, str]]] = []
    for entity in public:
        number_of_turns = 2 if rng.random() < config.multi_turn_share else 1
        row = conversation(entity, draw_forms(entity, rng, number_of_turns), rng)
        answer = next(message["content"] for message in row if message["role"] == "assistant")
        if len(rows) < number and len(answer) >= config.min_prompt_answer_chars:
            rows.append(row)
    return rows


def topics() -> list[str | list[dict[str, str]]]:
    """The language reference that `help()` shows: whole, and as answers to questions about a topic."""
    from pydoc_data.topics import topics as texts

    documents: list[str | list[dict[str, str]]] = []
    for name, text in sorted(texts.items()):
        paragraphs = tidy(text).split("\n\n")
        documents += chunked(paragraphs, 1_500)
        for question in ("Explain the Python topic `{}`.", "What does the language reference say about `{}`?"):
            answer = chunked(paragraphs, 600)[0]
            if 40 < len(answer) < 1_200:
                documents.append(
                    [{"role": "user", "content": question.format(name)}, {"role": "assistant", "content": answer}]
                )
    return documents


def chunked(paragraphs: list[str], limit: int) -> list[str]:
    chunks = [""]
    for paragraph in paragraphs:
        if chunks[-1] and len(chunks[-1]) + len(paragraph) > limit:
            chunks.append("")
        chunks[-1] += ("\n\n" if chunks[-1] else "") + paragraph
    return chunks


def source_excerpts(entities: list[Entity], config: CorpusConfig, rng: random.Random) -> list[str]:
    """Pieces of source, from files in random order until there is enough, without the lines of held-out objects."""
    hidden = heldout_lines(entities)
    modules = {entity.module for entity in entities if not entity.module.startswith(("encodings", "idlelib"))}
    files = [(module, path) for module, path in source_files() if module in modules]
    rng.shuffle(files)
    excerpts: list[str] = []
    num_chars = 0
    for module, path in files:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for i, line in enumerate(lines, 1) if i not in hidden.get(module, ()) and len(line) <= 120]
        pieces = chunked("\n".join(kept).split("\n\n"), config.source_chunk_chars)
        pieces = [piece for piece in pieces if 100 < len(piece) < 4_000 and looks_like_code(piece)]
        excerpts += pieces
        num_chars += sum(map(len, pieces))
        if num_chars >= config.source_chars:
            break
    return excerpts


def looks_like_code(piece: str) -> bool:
    """Leaves out tables of numbers and escapes."""
    letters = sum(c.isalpha() or c.isspace() for c in piece)
    return letters / len(piece) > 0.7 and "\\x" not in piece


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
