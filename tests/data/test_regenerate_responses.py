"""On-policy responses: the rows that are written, resuming, and failures that cost one conversation each."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import datasets
import pytest
from chats import CHATML_WITH_GENERATION_BLOCKS, chat, make_tokenizer, write_jsonl

from speculators.data_generation import prepare_data, regenerate_responses
from speculators.data_generation.answering import read_system_prompts
from speculators.data_generation.rollout import Answer, Question

END = "<|im_end|>"
CASES = Path(__file__).parent / "cases"


class Parrot:
    """A verifier that answers with its last question in capitals, and notes what it was asked."""

    def __init__(self, tokenizer, broken_word: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.broken_word = broken_word
        self.prompts: list[str] = []

    def __call__(self, asked: Sequence[Question]) -> list[Answer]:
        texts = [self.tokenizer.decode(question.prompt) for question in asked]
        if self.broken_word is not None and any(self.broken_word in text for text in texts):
            raise ConnectionError("server gone")
        self.prompts += texts
        questions = [text.rsplit("<|im_start|>user\n", 1)[-1].split(END)[0] for text in texts]
        return [Answer(self.tokenizer(question.upper() + END)["input_ids"]) for question in questions]


@pytest.fixture
def parrot(tokenizer) -> Parrot:
    return Parrot(tokenizer)


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_becomes_a_row_and_the_context_of_the_next_question(tokenizer, parrot, tmp_path):
    out = tmp_path / "out.jsonl"
    conversation = {"id": "c7", **chat("hi", "an old answer", "bye", "another")}
    report = regenerate_responses(
        [conversation], tokenizer, parrot, output=out, sampling_params={"temperature": 0.5}, endpoint="here"
    )
    first, second = written(out)
    assert parrot.prompts == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHI<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert (first["id"], second["id"], second["primary_id"]) == ("c7_gen0", "c7_gen1", "c7")
    assert second["text"] == "BYE<|im_end|>"
    num_answer_tokens = sum(second["loss_mask"])
    assert tokenizer.decode(second["input_ids"][-num_answer_tokens:]) == "BYE<|im_end|>"
    assert second["loss_mask"] == [0] * (len(second["input_ids"]) - num_answer_tokens) + [1] * num_answer_tokens
    metadata = second["metadata"]
    assert len(metadata.pop("content_sha256")) == 64
    assert metadata == {
        "idx": 0,
        "sample": 0,
        "turn": 1,
        "is_last_turn": True,
        "finish_reason": "stop",
        "is_tool_call": False,
        "usage": {
            "prompt_tokens": len(second["input_ids"]) - num_answer_tokens,
            "completion_tokens": num_answer_tokens,
        },
        "endpoint": "here",
        "sampling_params": {"temperature": 0.5},
    }
    assert (report.num_conversations, report.num_rows, report.num_cut) == (1, 2, 0)
    assert report.num_tokens == sum(first["loss_mask"]) + num_answer_tokens
    assert not report.errors_path.exists()


def test_the_rows_are_training_data_as_they_are(tokenizer, parrot, model_dir, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate_responses([chat("hi", "x"), chat("yo", "x")], tokenizer, parrot, output=out)
    prepared = prepare_data(model=model_dir, data=out, output=tmp_path / "data", seq_length=100)
    rows = {tuple(row["input_ids"].tolist()): row["loss_mask"].tolist() for row in prepared.dataset()}
    assert rows == {tuple(row["input_ids"]): row["loss_mask"] for row in written(out)}


@pytest.mark.parametrize(
    ("row", "questions"),
    [
        (chat("hi"), 1),  # a question nobody answered yet
        ({"prompt": "hi"}, 1),
        ({"conversations": [{"role": "assistant", "content": "welcome"}, {"role": "user", "content": "hi"}]}, 1),
        ({"conversations": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]}, 1),
        (chat("a", "b", "c", "d", "hi"), 3),
    ],
)
def test_whatever_ends_in_a_question_is_answered(tokenizer, parrot, tmp_path, row, questions):
    regenerate_responses([row], tokenizer, parrot, output=tmp_path / "out.jsonl")
    rows = written(tmp_path / "out.jsonl")
    assert len(rows) == questions
    assert rows[-1]["text"] == "HI<|im_end|>"
    assert ("welcome" in parrot.prompts[0]) == ("welcome" in str(row))


def test_pre_tokenised_rows_need_no_template(tmp_path):
    tokenizer = make_tokenizer(None)
    row = {"input_ids": [9, 8, 7, 6], "loss_mask": [0, 0, 1, 1]}
    regenerate_responses([row], tokenizer, lambda asked: [Answer([5])] * len(asked), output=tmp_path / "out.jsonl")
    (answer,) = written(tmp_path / "out.jsonl")
    assert (answer["input_ids"], answer["loss_mask"]) == ([9, 8, 5], [0, 0, 1])
    assert answer["metadata"]["finish_reason"] == "length"


def test_results_of_calls_that_were_never_made_are_not_read(tokenizer, parrot, tmp_path):
    turns = [("user", "sum"), ("assistant", "<tool_call>"), ("tool", "4"), ("assistant", "four")]
    row = {"conversations": [{"role": role, "content": text} for role, text in turns]}
    regenerate_responses([row], tokenizer, parrot, output=tmp_path / "out.jsonl")
    assert [row["text"] for row in written(tmp_path / "out.jsonl")] == ["SUM<|im_end|>"]


def test_one_failing_prompt_costs_one_conversation(tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    parrot = Parrot(tokenizer, broken_word="bad")
    rows = [{"id": str(i), **chat(word, "x")} for i, word in enumerate(("one", "bad", "two"))]
    report = regenerate_responses(rows, tokenizer, parrot, output=out)
    assert [row["primary_id"] for row in written(out)] == ["0", "2"]
    assert written(report.errors_path) == [{"primary_id": "1", "idx": 1, "error": "ConnectionError: server gone"}]
    parrot.broken_word = None
    again = regenerate_responses(rows, tokenizer, parrot, output=out, resume=True)
    assert (again.num_already_done, again.num_conversations, again.num_failed) == (2, 1, 0)
    assert sorted(row["primary_id"] for row in written(out)) == ["0", "1", "2"]
    assert not again.errors_path.exists()


def test_a_verifier_that_is_gone_stops_the_run_and_the_next_one_goes_on(tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    rows = [{"id": str(i), **chat(word, "x")} for i, word in enumerate(("one", "two", *["bad"] * 6))]
    parrot = Parrot(tokenizer, broken_word="bad")
    with pytest.raises(ConnectionError):
        regenerate_responses(rows, tokenizer, parrot, output=out, batch_size=2, max_consecutive_errors=3)
    assert len(written(out)) == 2
    with pytest.raises(ValueError, match="pass resume"):
        regenerate_responses(rows, tokenizer, parrot, output=out)
    with out.open("a") as file:
        file.write('{"primary_id": "2", "input')  # killed while writing
    parrot = Parrot(tokenizer)
    regenerate_responses(rows, tokenizer, parrot, output=out, resume=True)
    assert [row["primary_id"] for row in written(out)] == [str(i) for i in range(8)]
    assert len(parrot.prompts) == 6


LONG = [{"id": f"c{i}", **chat(*("a", "x", "b", "x", "c", "x")[: 2 + 2 * (i % 3)])} for i in range(8)]
"""Conversations of one, two and three turns."""


def draw(asked: Sequence[Question]) -> list[Answer]:
    """A verifier that samples: four letters from its seed and its prompt."""
    answers = []
    for question in asked:
        random = Random(f"{question.seed} {question.prompt}")
        answers.append(Answer([random.randrange(10, 100) for _ in range(4)]))
    return answers


def test_a_file_cut_at_any_byte_is_completed_to_what_an_uninterrupted_run_writes(tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate_responses(LONG, tokenizer, draw, output=out, batch_size=3)
    whole = out.read_bytes()
    for num_bytes in Random(0).sample(range(1, len(whole)), 12):
        out.write_bytes(whole[:num_bytes])
        regenerate_responses(LONG, tokenizer, draw, output=out, batch_size=3, resume=True)
        assert out.read_bytes() == whole, num_bytes


def test_changed_data_is_completed_by_content_not_by_place(tokenizer, parrot, tmp_path):
    """`resume_a` and `resume_b` of the issue: the second holds new prompts before and among the first one's."""
    out = tmp_path / "out.jsonl"
    regenerate_responses([chat("one", "x"), chat("two", "x")], tokenizer, parrot, output=out)
    num_asked = len(parrot.prompts)
    changed = [chat("new", "x"), chat("two", "another answer"), chat("newer", "x"), chat("one", "x")]
    report = regenerate_responses(changed, tokenizer, parrot, output=out, resume=True)
    assert (report.num_conversations, report.num_already_done) == (2, 2)
    assert [row["text"] for row in written(out)] == [f"{word}{END}" for word in ("ONE", "TWO", "NEW", "NEWER")]
    assert len(parrot.prompts) == num_asked + 2


def test_an_id_that_asks_something_else_now_is_refused(tokenizer, parrot, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate_responses([{"id": "c0", **chat("one")}], tokenizer, parrot, output=out)
    with pytest.raises(ValueError, match=r"'c0'.*another prompt"):
        regenerate_responses([{"id": "c0", **chat("two")}], tokenizer, parrot, output=out, resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"verifier": "org/other"}, "verifier: +org/model -> org/other"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, r"chat_template_kwargs\.enable_thinking: none -> false"),
        ({"sampling_params": {"temperature": 0.7}}, r"sampling_params\.temperature: none -> 0\.7"),
        ({"stop_token_ids": [7]}, r"stop_token_ids: +\[.*\] -> \[7\]"),
    ],
)
def test_a_run_with_another_recipe_does_not_complete_a_file(tokenizer, parrot, tmp_path, change, named):
    out = tmp_path / "out.jsonl"
    options = {"output": out, "verifier": "org/model"}
    regenerate_responses([chat("one")], tokenizer, parrot, **options)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=named):
        regenerate_responses([chat("one"), chat("two")], tokenizer, parrot, resume=True, **{**options, **change})
    with pytest.raises(ValueError, match=r"chat_template_sha256: .* -> "):
        template = make_tokenizer(CHATML_WITH_GENERATION_BLOCKS)
        regenerate_responses([chat("one")], template, parrot, resume=True, **options)
    assert out.read_bytes() == before
    out.with_suffix(".recipe.json").unlink()
    with pytest.raises(ValueError, match=r"out\.recipe\.json' is missing"):
        regenerate_responses([chat("one")], tokenizer, parrot, resume=True, **options)


def test_equal_prompts_get_samples_of_their_own(tokenizer, tmp_path):
    rows = [{"prompt": "Write something about dict."}] * 4
    out = tmp_path / "out.jsonl"
    regenerate_responses(rows, tokenizer, draw, output=out, sampling_params={"temperature": 1.0, "seed": 0})
    texts = [row["text"] for row in written(out)]
    assert len(set(texts)) == 4
    regenerate_responses(
        rows,
        tokenizer,
        draw,
        output=tmp_path / "again.jsonl",
        batch_size=1,
        sampling_params={"temperature": 1.0, "seed": 0},
    )
    assert [row["text"] for row in written(tmp_path / "again.jsonl")] == texts
    regenerate_responses(
        rows, tokenizer, draw, output=tmp_path / "other.jsonl", sampling_params={"temperature": 1.0, "seed": 1}
    )
    assert not {row["text"] for row in written(tmp_path / "other.jsonl")} & set(texts)


def test_several_samples_of_a_prompt_are_one_conversation_and_more_can_be_added(tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    options = {"output": out, "sampling_params": {"temperature": 1.0}}
    row = {"id": "p", **chat("a", "x", "b", "x")}
    regenerate_responses([row], tokenizer, draw, num_samples=2, **options)
    before = written(out)
    assert [row["id"] for row in before] == ["p_gen0", "p_gen1", "p_sample1_gen0", "p_sample1_gen1"]
    assert {row["primary_id"] for row in before} == {"p"}  # a split keeps them together
    assert len({row["text"] for row in before}) == 4
    report = regenerate_responses([row], tokenizer, draw, num_samples=3, resume=True, **options)
    assert (report.num_already_done, report.num_conversations) == (2, 1)
    assert written(out)[:4] == before
    with pytest.raises(ValueError, match="num_samples=2 at temperature 0"):
        regenerate_responses(
            [row], tokenizer, draw, output=tmp_path / "0.jsonl", num_samples=2, sampling_params={"temperature": 0}
        )
    with pytest.raises(ValueError, match="num_samples=0"):
        regenerate_responses([row], tokenizer, draw, output=tmp_path / "0.jsonl", num_samples=0)


def test_rows_that_cannot_be_asked_are_counted(tokenizer, parrot, tmp_path):
    rows = [
        {"id": "r0", "body": "x"},
        chat("hi"),
        {"conversations": [{"role": "assistant", "content": "x"}]},
        chat("w" * 90),
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    calls = []
    report = regenerate_responses(
        data,
        tokenizer,
        parrot,
        output=tmp_path / "out.jsonl",
        max_prompt_tokens=80,
        progress=lambda *call: calls.append(call),
    )
    assert report.num_conversations == 1
    assert report.dropped == {
        "no prompt: name its column with prompt_field (--prompt-field)": 1,
        "no user turn to answer": 1,
    }
    bad = written(tmp_path / "out.quarantine.jsonl")
    assert [(row["file"], row["line"], row["id"]) for row in bad] == [(data, 1, "r0"), (data, 3, None)]
    assert bad[0]["reason"].endswith("the columns are id, body")
    assert (report.num_read, len(report.quarantine), report.num_failed) == (4, 2, 1)
    assert "longer than max_prompt_tokens=80" in written(report.errors_path)[0]["error"]
    assert calls[-1] == ("regenerate", 4, 4)


def test_a_tokenizer_without_template_and_a_wrong_output_name_are_refused(parrot, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        regenerate_responses([chat("hi")], tokenizer, parrot, output=tmp_path / "out.json")
    with pytest.raises(ValueError, match="no chat template"):
        regenerate_responses([chat("hi")], make_tokenizer(None), parrot, output=tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="returned 0 answers for 1"):
        regenerate_responses([chat("hi")], tokenizer, lambda asked: [], output=tmp_path / "out.jsonl")
    for rows, reason in (([], "no conversation to answer"), ([{"body": "x"}], "1 x no prompt")):
        with pytest.raises(ValueError, match=reason):
            regenerate_responses(rows, tokenizer, parrot, output=tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_conversations_is_limited_and_equal_ids_are_told_apart(tokenizer, parrot, tmp_path):
    rows = [{"id": "same", **chat("hi")}] * 3
    regenerate_responses(rows, tokenizer, parrot, output=tmp_path / "out.jsonl", limit=2)
    assert [row["primary_id"] for row in written(tmp_path / "out.jsonl")] == ["same", "same-1"]


@pytest.mark.parametrize(
    ("row", "shape", "questions"),
    [
        ({"prompt": "hi"}, "prompt", ["hi"]),
        ({"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]}, "prompt", ["hi"]),
        ({"question": "hi", "answer": "an old one"}, "question", ["hi"]),
        ({"instruction": "Translate.", "input": "", "output": "x"}, "instruction", ["Translate."]),
        ({"instruction": "Translate.", "input": "chat"}, "instruction + input", ["Translate.\n\nchat"]),
        ({"turns": ["one", "two"], "category": "writing"}, "turns", ["one", "two"]),
        ({"text": "hi"}, "text", ["hi"]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]}, "conversations", ["hi"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "messages", ["hi"]),
        ({"id": 7, "messages": [{"role": "user", "content": "hi"}], "prompt": "x"}, "messages", ["hi"]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompts_are_recognised_in_the_shapes_people_have(
    tokenizer, parrot, tmp_path, caplog, kind, row, shape, questions
):
    data = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(data, [row])
    else:
        datasets.Dataset.from_list([row]).to_parquet(str(data))
    with caplog.at_level("INFO"):
        report = regenerate_responses(data, tokenizer, parrot, output=tmp_path / "out.jsonl")
    assert [row["text"] for row in written(tmp_path / "out.jsonl")] == [
        question.upper() + END for question in questions
    ]
    assert report.prompts == f"prompts are in {shape}; the first: {questions[0]!r}"
    assert report.prompts in caplog.text


def test_a_long_first_prompt_is_shown_cut_between_its_quotes(tokenizer, parrot, tmp_path):
    report = regenerate_responses([{"prompt": "long " * 40}], tokenizer, parrot, output=tmp_path / "out.jsonl")
    shown = report.prompts.split("the first: ")[1]
    assert len(shown) == 80 and shown.startswith("'long long ") and shown.endswith("...'")


def test_any_column_can_be_named(tokenizer, parrot, tmp_path):
    row = {"task": "hi", **chat("no", "x")}
    report = regenerate_responses([row], tokenizer, parrot, output=tmp_path / "out.jsonl", prompt_field="task")
    assert [row["text"] for row in written(tmp_path / "out.jsonl")] == ["HI" + END]
    assert report.prompts.startswith("prompts are in task")
    for value in (None, "", 5, []):
        with pytest.raises(ValueError, match="1 x column 'task' holds no prompt"):
            regenerate_responses(
                [{"task": value}], tokenizer, parrot, output=tmp_path / "none.jsonl", prompt_field="task"
            )


@pytest.mark.parametrize(("case", "num_rows"), [("same_prompt", 4), ("resume_a", 7), ("regen_multi_turn", 24)])
def test_the_cases_are_answered(tokenizer, parrot, tmp_path, case, num_rows):
    path = CASES / f"{case}.jsonl"
    report = regenerate_responses(path, tokenizer, parrot, output=tmp_path / "out.jsonl")
    assert len({row["id"] for row in written(tmp_path / "out.jsonl")}) == report.num_rows
    assert report.num_read == report.num_conversations == len(path.read_text().splitlines())
    assert report.num_rows == num_rows


def test_a_conversation_cut_in_its_middle_gets_all_of_its_turns(tokenizer, tmp_path):
    """`regen_multi_turn` of the issue: 6 conversations of 4 turns; 21 of 24 rows came back."""
    out = tmp_path / "out.jsonl"
    regenerate_responses(CASES / "regen_multi_turn.jsonl", tokenizer, draw, output=out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for num_rows, cut in ((21, b""), (22, lines[22][:40])):
        out.write_bytes(b"".join(lines[:num_rows]) + cut)
        report = regenerate_responses(CASES / "regen_multi_turn.jsonl", tokenizer, draw, output=out, resume=True)
        assert (report.num_already_done, report.num_conversations) == (5, 1)
        assert out.read_bytes() == whole


NUM_KILLS = int(os.environ.get("SPECULATORS_NUM_KILLS", "3"))


def draw_slowly(asked: Sequence[Question]) -> list[Answer]:
    time.sleep(0.003)
    return draw(asked)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_runs_end_in_what_an_uninterrupted_one_writes(tokenizer, tmp_path):
    """Killed at a random moment, and the file cut at a random byte, as a full disk or a lost write leaves it."""
    out, random = tmp_path / "out.jsonl", Random(0)
    rows = [{**row, "id": f"{row['id']}-{n}"} for n in range(10) for row in LONG]
    regenerate_responses(rows, tokenizer, draw, output=out, batch_size=4)
    whole, num_written = out.read_bytes(), []
    for _ in range(NUM_KILLS):
        out.unlink()
        child = os.fork()
        if child == 0:
            try:
                regenerate_responses(rows, tokenizer, draw_slowly, output=out, batch_size=4)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            os.truncate(out, random.randint(0, out.stat().st_size))
        report = regenerate_responses(rows, tokenizer, draw, output=out, batch_size=4, resume=True)
        num_written.append(report.num_already_done)
        assert out.read_bytes() == whole
    assert any(0 < number < len(rows) for number in num_written), num_written


def test_threads_write_what_batches_write(tokenizer, tmp_path):
    for name, options in (("batches", {}), ("threads", {"threaded": True})):
        regenerate_responses(LONG, tokenizer, draw, output=tmp_path / f"{name}.jsonl", batch_size=3, **options)
    assert (tmp_path / "threads.jsonl").read_bytes() == (tmp_path / "batches.jsonl").read_bytes()
    with pytest.raises(ConnectionError, match="server gone"):
        regenerate_responses(
            [chat("bad")] * 40,
            tokenizer,
            Parrot(tokenizer, "bad"),
            output=tmp_path / "gone.jsonl",
            batch_size=3,
            threaded=True,
        )


def test_conversations_draw_temperatures_and_system_prompts_of_their_own(tokenizer, tmp_path):
    rows = [{"id": f"p{i}", **chat("hi", "x", "bye", "x")} for i in range(40)]
    rows[7]["conversations"] = [{"role": "system", "content": "own"}, *rows[7]["conversations"]]
    mix = {"temperatures": (0.5, 1.0), "system_prompts": ("Be brief.", "Rhyme.", "")}
    asked: list[Question] = []

    def generate(questions: Sequence[Question]) -> list[Answer]:
        asked.extend(questions)
        return draw(questions)

    regenerate_responses(rows, tokenizer, generate, output=tmp_path / "a.jsonl", batch_size=40, **mix)
    found = written(tmp_path / "a.jsonl")
    temperatures = [row["metadata"]["sampling_params"]["temperature"] for row in found]
    assert temperatures[::2] == temperatures[1::2] == [question.temperature for question in asked[:40]]
    assert 10 < temperatures[::2].count(0.5) < 30
    first_turns = [tokenizer.decode(row["input_ids"]).split(END)[0] for row in found]
    assert first_turns[::2] == first_turns[1::2] and "own" in first_turns[14]
    counts = Counter(first_turns[::2])
    assert set(counts) == {
        "<|im_start|>" + turn for turn in ("system\nBe brief.", "system\nRhyme.", "system\nown", "user\nhi")
    }
    assert min(counts["<|im_start|>system\nRhyme."], counts["<|im_start|>user\nhi"]) >= 5
    regenerate_responses(rows[5:], tokenizer, draw, output=tmp_path / "b.jsonl", batch_size=3, **mix)
    ids = ("id", "input_ids", "loss_mask")
    assert [[row[k] for k in ids] for row in written(tmp_path / "b.jsonl")] == [[r[k] for k in ids] for r in found[10:]]
    with pytest.raises(ValueError, match=r"temperatures: .* -> "):
        regenerate_responses(rows, tokenizer, draw, output=tmp_path / "a.jsonl", resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": (0.5, -1.0)}, r"temperatures=\[0\.5, -1\.0\]"),
        ({"temperatures": (0.0, 1.0), "num_samples": 2}, "temperature 0 gives equal answers"),
        ({"system_prompts": (5,)}, "system_prompts holds 5"),
    ],
)
def test_mixes_that_mean_nothing_are_refused(tokenizer, parrot, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        regenerate_responses([chat("hi")], tokenizer, parrot, output=tmp_path / "out.jsonl", **options)


def test_system_prompts_are_read_from_lines_or_a_json_list(tmp_path):
    for name, content in (("a.txt", "Be brief.\n\nRhyme.\n"), ("a.json", '["Be brief.", "", "Rhyme."]')):
        (tmp_path / name).write_text(content)
        assert read_system_prompts(tmp_path / name) == ["Be brief.", "", "Rhyme."]
    for name, content in (("b.json", "{}"), ("c.json", "["), ("d.txt", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="system prompts"):
            read_system_prompts(tmp_path / name)
