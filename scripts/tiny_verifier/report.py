"""What the finished model does, measured on the prompts shipped beside it: loss, length, repetition, and the card.

Everything here needs only the package data, so `build_tiny_verifier.py report` measures the shipped model again.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

LOOP_NGRAM, LOOP_TIMES = 8, 4
"""An answer loops if one run of this many tokens stands in it this often."""
NUM_SAMPLES = 5


@dataclass(frozen=True)
class ReportConfig:
    num_loss_prompts: int = 200
    num_greedy_prompts: int = 200
    max_new_tokens: int = 256
    batch_size: int = 25


def measure(model_folder: Path, prompts_folder: Path, config: ReportConfig) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    chats = {split: read_chats(prompts_folder / f"{split}.jsonl") for split in ("train", "heldout")}
    result: dict = {"config": vars(config), "loss": {}, "greedy": {}, "num_parameters": model.num_parameters()}
    for split, rows in chats.items():
        result["loss"][split] = assistant_loss(model, tokenizer, rows[: config.num_loss_prompts])
        rows = rows[: config.num_greedy_prompts]
        answers, prompts = greedy_answers(model, tokenizer, rows, config)
        result["greedy"][split] = text_figures(answers, tokenizer.eos_token_id)
        result["greedy"][split]["names_the_object"] = names_share(rows, [tokenizer.decode(a) for a in answers])
        real = [tokenizer(first_exchange(row)[1])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
        result["greedy"][f"{split}_documentation"] = text_figures(real, tokenizer.eos_token_id)
        if split == "heldout":
            longest = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
            # From the longer half, evenly: the shortest answers say little about repetition.
            chosen = longest[: len(longest) // 2][:: max(1, len(longest) // 2 // NUM_SAMPLES)][:NUM_SAMPLES]
            result["samples"] = [
                {"prompt": prompts[i], "answer": tokenizer.decode(answers[i], skip_special_tokens=True)} for i in chosen
            ]
    return result


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["conversations"] for line in path.read_text(encoding="utf-8").splitlines()]


def first_exchange(chat: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """The messages up to the first answer, and that answer."""
    first = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
    return chat[:first], chat[first]["content"]


@torch.no_grad()
def assistant_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, chats: list) -> dict[str, float]:
    """Of the first answers' tokens, their end mark included, given the question."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for chat in chats:
        messages, answer = first_exchange(chat)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"])
        logits_TV = model(input_ids=ids[None, :-1]).logits[0, start - 1 :]
        nats += functional.cross_entropy(logits_TV, ids[start:], reduction="sum").item()
        num_tokens += len(ids) - start
        num_bytes += len(answer.encode())
    return {"nats_per_token": nats / num_tokens, "bits_per_byte": nats / num_bytes / 0.6931471805599453}


@torch.no_grad()
def greedy_answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, chats: list, config: ReportConfig
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each answer, up to and with the end mark if there is one, and the prompts' last questions."""
    answers: list[list[int]] = []
    for begin in range(0, len(chats), config.batch_size):
        messages = [first_exchange(chat)[0] for chat in chats[begin : begin + config.batch_size]]
        texts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=config.max_new_tokens, do_sample=False)
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            answers.append(ids[:end])
    return answers, [first_exchange(chat)[0][-1]["content"] for chat in chats]


def ngrams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repeated_share(ids: list[int], n: int) -> float:
    """Share of the n-grams of one answer which stand in it already."""
    grams = ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: list[int]) -> bool:
    return max(Counter(ngrams(ids, LOOP_NGRAM)).values(), default=0) >= LOOP_TIMES


def text_figures(answers: list[list[int]], eos: int) -> dict[str, float]:
    figures = {
        "answers": len(answers),
        "mean_tokens": statistics.fmean(map(len, answers)),
        "median_tokens": statistics.median(map(len, answers)),
        "without_end_mark": statistics.fmean(eos not in ids for ids in answers),
        "looping": statistics.fmean(map(loops, answers)),
        "repeated_4grams": statistics.fmean(repeated_share(ids, 4) for ids in answers),
    }
    for n in (1, 2, 3):
        grams = [gram for ids in answers for gram in ngrams(ids, n)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    return figures


def names_share(chats: list, answers: list[str]) -> float:
    """Share of the answers which contain the name of the object asked about, where the question quotes one."""
    hits = []
    for chat, answer in zip(chats, answers, strict=True):
        quoted = re.search(r"`(?:def |class )?([\w.]+)", first_exchange(chat)[0][-1]["content"])
        if quoted:
            hits.append(quoted.group(1).rsplit(".", 1)[-1] in answer)
    return statistics.fmean(hits) if hits else 0.0


LABELS = {
    "answers": "answers",
    "mean_tokens": "tokens per answer, mean",
    "median_tokens": "tokens per answer, median",
    "without_end_mark": "answers cut at the limit without an end mark",
    "looping": f"answers that loop (one {LOOP_NGRAM}-gram {LOOP_TIMES} times or more)",
    "repeated_4grams": "4-grams seen before in the same answer, mean",
    "names_the_object": "answers that name the object asked about",
    "distinct_1": "distinct-1 over all answers",
    "distinct_2": "distinct-2 over all answers",
    "distinct_3": "distinct-3 over all answers",
}
SHARES = {"without_end_mark", "looping", "repeated_4grams", "names_the_object"}


def greedy_table(greedy: dict[str, dict[str, float]]) -> str:
    columns = ("heldout", "heldout_documentation", "train", "train_documentation")
    head = ("", "held-out, model", "held-out, documentation", "training, model", "training, documentation")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, label in LABELS.items():
        cells = [format_figure(key, greedy[column].get(key)) for column in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key in SHARES:
        return f"{value:.1%}"
    return f"{value:.3f}" if key.startswith("distinct") else f"{value:.0f}"


def phase_row(number: int, phase: dict, shape: dict) -> str:
    config = phase["config"]
    cells = (
        number,
        shape["num_layers"] if config["init"] else config["start_layers"],
        f"{phase['steps'] * config['rows_per_step'] * config['row_length']:,}",
        config["learning_rate"],
        f"{phase['train_loss']:.3f}",
        f"{phase['heldout_loss']:.3f}",
        f"{phase['seconds'] / 3600:.1f}, {phase['hardware']}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def phase_command(number: int, phase: dict) -> str:
    remark = f" ({phase['note']})" if "note" in phase else ""
    return f"Phase {number}{remark}:\n\n    {phase['command']}"


def write_card(folder: Path, result: dict, made: dict) -> None:
    """README.md of the model folder, from the template beside this file."""
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    loss_rows = [
        f"| {split} | {row['nats_per_token']:.3f} | {row['bits_per_byte']:.3f} |"
        for split, row in result["loss"].items()
    ]
    samples = "\n\n".join(f"**{s['prompt']}**\n\n~~~~\n{s['answer']}\n~~~~" for s in result["samples"])
    corpus = made["phases"][-1]["corpus"]
    fields = {
        **made["shape"],
        "num_parameters": f"{result['num_parameters']:,}",
        "python_version": corpus["python_version"],
        "num_documents": f"{corpus['training documents']:,}",
        "heldout_objects": corpus["held-out objects"],
        "corpus_tokens": f"{made['phases'][-1]['corpus_tokens']:,}",
        "phases_table": "\n".join(phase_row(i, phase, made["shape"]) for i, phase in enumerate(made["phases"], 1)),
        "phases_commands": "\n\n".join(phase_command(i, phase) for i, phase in enumerate(made["phases"], 1)),
        **{f"limit_{name}": value for name, value in result["config"].items()},
        "loss_table": "\n".join(loss_rows),
        "greedy_table": greedy_table(result["greedy"]),
        "samples": samples,
    }
    card = re.sub(r"\{(\w+)\}", lambda match: str(fields[match.group(1)]), template)
    (folder / "README.md").write_text(card, encoding="utf-8")
