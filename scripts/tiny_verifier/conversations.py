"""Questions and answers about one object of the standard library.

A form is a kind of question. Each has many phrasings and ONE layout of answer, so that a reader who knows the question
knows the shape of the answer: that is what makes the text regular enough for a drafter to learn, and easy to check.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tiny_verifier.stdlib import Entity, Parameter

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that knows the Python standard library.",
    "You answer questions about Python. Be brief and precise.",
    "You are a Python expert. Answer with the documentation of the object in question.",
)
MAX_BODY_CHARS = 500
"""Longer bodies are left out of answers: a drafter learns little from code nobody could predict."""


@dataclass(frozen=True)
class Form:
    applies: Callable[[Entity], bool]
    questions: tuple[str, ...]
    answer: Callable[[Entity], str]
    weight: int = 1


def cut(doc: str, limit: int) -> str:
    """The first paragraphs of `doc` that fit, never ending inside a sentence if that can be helped."""
    kept: list[str] = []
    for paragraph in doc.split("\n\n"):
        if kept and sum(map(len, kept)) + len(paragraph) > limit:
            break
        kept.append(paragraph)
    text = "\n\n".join(kept)
    if len(text) > limit:
        end = max(text.rfind(mark, 0, limit) for mark in (". ", ".\n", "\n"))
        text = text[: end + 1] if end > limit // 3 else text[: text.rfind(" ", 0, limit)] + " ..."
    return text.strip()


def sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?", ":", "...")) else text + "."


def summary(entity: Entity) -> str:
    first = " ".join(entity.doc.split("\n\n")[0].split())
    end = first.find(". ")
    return sentence(first if end < 0 else first[: end + 1]) if len(first) < 400 or end > 0 else cut(first, 200)


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def listed(names: tuple[str, ...], limit: int = 8) -> str:
    quoted = [f"`{name}`" for name in names[:limit]]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" and {quoted[-1]}"


def place(entity: Entity) -> str:
    owner = entity.qualname.rsplit(".", 1)[0]
    if "." in entity.qualname:
        return f"`{entity.full_name}` is a method of the class `{owner}` in the module `{entity.module}`."
    noun = {"class": "a class", "builtin": "a built-in function"}.get(entity.kind, "a function")
    return f"`{entity.full_name}` is {noun} in the module `{entity.module}`."


def describe(parameter: Parameter) -> str:
    if parameter.kind == "varargs":
        return f"- `{parameter.name}`: any number of positional arguments"
    if parameter.kind == "keywords":
        return f"- `{parameter.name}`: any further keyword arguments"
    if parameter.default is not None:
        return f"- `{parameter.name}`: optional, the default is `{parameter.default}`"
    return f"- `{parameter.name}`: required"


def count(number: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    word = words[number] if number < len(words) else str(number)
    return f"{word} {noun}" + ("" if number == 1 else "s")


def about_arguments(entity: Entity) -> str:
    if not entity.parameters:
        return f"`{entity.name}` takes no arguments."
    head = f"`{entity.name}` takes {count(len(entity.parameters), 'argument')}:"
    return head + "\n\n" + "\n".join(map(describe, entity.parameters))


def about_raises(entity: Entity) -> str:
    if not entity.raises:
        return f"`{entity.name}` raises no exception of its own. Exceptions of the functions it calls pass through."
    body = "\n".join(f"- `{name}`" for name in entity.raises)
    return f"`{entity.name}` raises {count(len(entity.raises), 'exception')}:\n\n{body}"


def about_return(entity: Entity) -> str:
    told = [s for s in entity.doc.replace("\n", " ").split(". ") if "return" in s.lower()]
    if told:
        return f"From the documentation of `{entity.name}`:\n\n> {sentence(told[0])}"
    values = "\n".join(f"return {value}" for value in entity.returns)
    return f"`{entity.name}` returns the value of:\n\n{code(values)}"


def docstring_block(entity: Entity) -> str:
    indented = cut(entity.doc, 500).replace("\n", "\n    ")
    close = "\n    " if "\n" in indented else ""
    return code(f'{entity.definition}\n    """{indented}{close}"""').replace("    \n", "\n")


def how_to_call(entity: Entity) -> str:
    required = ", ".join(p.name for p in entity.parameters if p.kind == "required")
    optional = [p.name for p in entity.parameters if p.kind == "optional"]
    call = f"import {entity.module}\n\nresult = {entity.full_name}({required})"
    extra = f"\n\nThe optional arguments are {listed(tuple(optional))}." if optional else ""
    return f"{code(call)}\n\n{sentence(summary(entity))}{extra}"


def explain_class(entity: Entity) -> str:
    bases = f" It inherits from {listed(entity.bases)}." if entity.bases else ""
    members = f"\n\nIts public methods are {listed(entity.members)}." if entity.members else ""
    return f"{code(entity.definition)}\n\n{cut(entity.doc, 500)}{bases}{members}"


def explain_module(entity: Entity) -> str:
    members = f"\n\nIt defines {listed(entity.members)}." if entity.members else ""
    return f"The module `{entity.module}`:\n\n{cut(entity.doc, 600)}{members}"


def has_doc(entity: Entity) -> bool:
    return len(entity.doc) >= 15


def callable_with_doc(entity: Entity) -> bool:
    return entity.is_callable and has_doc(entity)


def has_source(entity: Entity) -> bool:
    return bool(entity.body) and entity.body != "pass" and len(entity.body) <= MAX_BODY_CHARS


def whole_source(entity: Entity) -> str:
    return code(entity.definition + "\n    " + entity.body.replace("\n", "\n    "))


FORMS: dict[str, Form] = {
    "what": Form(
        callable_with_doc,
        (
            "What does `{full}` do?",
            "What does `{signature}` do?",
            "What is `{signature}` for?",
            "Explain `{signature}`.",
            "What is the purpose of `{full}`?",
            "Can you explain what `{signature}` does?",
            "Tell me about `{full}`.",
            "I found `{signature}` in some code. What does it do?",
            "How does `{signature}` work?",
        ),
        lambda e: f"{code(e.definition)}\n\n{cut(e.doc, 500)}",
        weight=5,
    ),
    "explain": Form(
        callable_with_doc,
        (
            "Describe `{signature}`.",
            "Describe `{full}` and where it belongs.",
            "Give me an overview of `{signature}`.",
            "Give a description of the Python function `{signature}`.",
        ),
        lambda e: f"{place(e)}\n\n{cut(e.doc, 400)}",
        weight=3,
    ),
    "long": Form(
        lambda e: e.kind in ("function", "method") and has_doc(e),
        (
            "Explain `{signature}` in detail.",
            "Describe `{full}` with its arguments.",
            "Document `{signature}` completely.",
        ),
        lambda e: f"{place(e)}\n\n{cut(e.doc, 350)}\n\n{about_arguments(e)}",
        weight=2,
    ),
    "summary": Form(
        callable_with_doc,
        (
            "Summarise `{signature}` in one sentence.",
            "In one sentence, what does `{full}` do?",
            "Give a one-line summary of `{signature}`.",
        ),
        lambda e: f"`{e.name}`: {summary(e)}",
    ),
    "docstring": Form(
        callable_with_doc,
        (
            "Write the def line with a docstring for `{full}`.",
            "Write a docstring for `{signature}`.",
            "Show the definition of `{signature}` with its docstring.",
        ),
        docstring_block,
        weight=3,
    ),
    "call": Form(
        lambda e: e.kind == "function" and has_doc(e),
        ("How do I call `{signature}`?", "Show how to use `{full}`.", "Give an example call of `{signature}`."),
        how_to_call,
        weight=2,
    ),
    "code": Form(
        lambda e: has_doc(e) and has_source(e),
        (
            "What does this function do?\n\n{source}",
            "Explain this code:\n\n{source}",
            "Document this function:\n\n{source}",
        ),
        lambda e: f"The function `{e.name}`:\n\n{cut(e.doc, 400)}",
        weight=2,
    ),
    "implement": Form(
        lambda e: has_doc(e) and has_source(e),
        ("Implement `{definition}` with this docstring: {summary}", "Write `{full}`. {summary}"),
        whole_source,
    ),
    "arguments": Form(
        lambda e: e.kind in ("function", "method") and bool(e.parameters),
        (
            "Which arguments does `{signature}` take?",
            "What are the parameters of `{signature}`?",
            "List the arguments of `{signature}`.",
        ),
        about_arguments,
    ),
    "signature": Form(
        lambda e: e.kind in ("function", "method"),
        ("Show the signature of `{full}`.", "What is the signature of `{full}`?"),
        lambda e: f"{code(e.definition)}\n\n{place(e)}",
    ),
    "raises": Form(
        lambda e: e.kind in ("function", "method") and bool(e.raises),
        ("Which exceptions does `{signature}` raise?", "What can go wrong in `{full}`?"),
        about_raises,
    ),
    "returns": Form(
        lambda e: e.kind in ("function", "method") and (bool(e.returns) or "return" in e.doc.lower()),
        ("What does `{signature}` return?", "What is the return value of `{full}`?"),
        about_return,
    ),
    "class": Form(
        lambda e: e.kind == "class" and has_doc(e),
        (
            "Explain the class `{full}`.",
            "What is `{full}`?",
            "What is the class `{full}` for?",
            "Describe the class `{full}`.",
        ),
        explain_class,
        weight=5,
    ),
    "module": Form(
        lambda e: e.kind == "module" and has_doc(e),
        ("Summarise the module `{full}`.", "What is the module `{full}` for?", "What is in the module `{full}`?"),
        explain_module,
        weight=5,
    ),
}


def turn(form: Form, entity: Entity, rng: random.Random) -> list[dict[str, str]]:
    question = rng.choice(form.questions).format(
        full=entity.full_name,
        signature=entity.signature or entity.full_name,
        definition=entity.definition.rstrip(":"),
        summary=summary(entity) if entity.doc else "",
        source=whole_source(entity),
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": form.answer(entity)}]


def forms_for(entity: Entity) -> list[str]:
    return [name for name, form in FORMS.items() if form.applies(entity)]


def conversation(
    entity: Entity, names: list[str], rng: random.Random, system_share: float = 0.15
) -> list[dict[str, str]]:
    """One conversation about `entity`, a question of each named form in turn."""
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < system_share else []
    for name in names:
        messages += turn(FORMS[name], entity, rng)
    return messages


def draw_forms(entity: Entity, rng: random.Random, number: int) -> list[str]:
    """`number` different forms (fewer if fewer apply), the heavier ones more often."""
    left = forms_for(entity)
    drawn: list[str] = []
    while left and len(drawn) < number:
        drawn.append(rng.choices(left, [FORMS[name].weight for name in left])[0])
        left.remove(drawn[-1])
    return drawn
