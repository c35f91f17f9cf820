"""prepare_data: from raw rows to a directory, every row accounted for, nothing half-written."""

from __future__ import annotations

import errno
import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from chats import chat, family_tokenizer, write_jsonl

from speculators.data_generation import PreparedData, inspect_mask, load_raw_dataset, prepare_data
from speculators.data_generation.conversations import RENDERED_TEXT
from speculators.data_generation.preprocessing import build_speculator_training_dataset, load_and_preprocess_dataset

CHATS = [chat("hi", "hello"), chat("a", "b", "c", "d"), chat("one", "two")]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "chats.jsonl", CHATS)


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_prepared_directory_is_a_saved_dataset_in_torch_format(model_dir, data, tmp_path):
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100)
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert loaded.column_names == ["input_ids", "loss_mask", "seq_len"]
    assert loaded.format["type"] == "torch"
    assert loaded[0]["input_ids"].dtype == torch.int64
    assert len(loaded) == 4 == prepared.manifest.num_rows
    for row in prepared.dataset():
        assert len(row["input_ids"]) == len(row["loss_mask"]) == row["seq_len"]
    assert entries(tmp_path / "out") == [
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "manifest.json",
        "state.json",
        "token_freq.pt",
    ]


def test_the_manifest_counts_what_a_naive_count_counts(model_dir, data, tmp_path):
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100)
    rows = list(prepared.dataset())
    supervised = Counter(
        int(token) for row in rows for token, bit in zip(row["input_ids"], row["loss_mask"], strict=True) if bit
    )
    manifest = prepared.manifest
    assert prepared.token_freq() == supervised
    assert manifest.num_supervised_tokens == supervised.total()
    assert manifest.num_tokens == sum(len(row["input_ids"]) for row in rows)
    assert manifest.longest_row == max(len(row["input_ids"]) for row in rows)
    assert manifest.num_read == 3
    assert manifest.recipe.verifier == model_dir
    assert PreparedData.open(tmp_path / "out").manifest == manifest


def test_every_bad_row_is_counted_under_its_reason(model_dir, tmp_path, caplog):
    rows = [
        chat("hi", "hello"),
        {"text": "no turns"},
        {"conversations": []},
        {"conversations": [{"role": "user", "content": "alone"}]},
        {"conversations": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"content": "who?"}]},
        {"conversations": chat("a", "b")["conversations"], "image": "cat.png"},
        {"input_ids": [7, 8, 9], "loss_mask": [0, 0, 0]},
        chat("a" * 200, "b"),
    ]
    path = tmp_path / "bad.jsonl"
    write_jsonl(path, rows)
    path.write_text(path.read_text() + '{"conversations": [{"ro\n')
    with caplog.at_level(logging.WARNING):
        manifest = prepare_data(model=model_dir, data=str(path), output=tmp_path / "out", seq_length=100).manifest
    assert manifest.num_read == 10
    assert manifest.num_rows == 1
    assert manifest.dropped == {
        "no 'conversations' (or input_ids + loss_mask)": 1,
        "empty conversation": 1,
        "no assistant turn": 1,
        "a turn has no content": 1,
        "a turn has no role": 1,
        "row has images (only text is supported)": 1,
        "no supervised token": 1,
        "turn's prompt fills the whole window (seq_length)": 1,
        "line is not valid JSON (cut off in writing?)": 1,
    }
    assert all(reason in caplog.text for reason in manifest.dropped)


CASES = Path(__file__).parent / "cases"


def quarantined(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "quarantine.jsonl").read_text().splitlines()]


def prepared_case(name: str, model: str, output: Path, **options):
    return prepare_data(model=model, data=CASES / name, output=output, seq_length=200, **options).manifest


def test_read_is_written_plus_quarantined_plus_filtered_by_unit(model_dir, tmp_path):
    manifest = prepared_case("bad_rows.jsonl", model_dir, tmp_path / "out")
    assert manifest.units == {
        "conversations": {"read": 12, "written": 5, "quarantined": 7, "filtered": 0},
        # one answer each, two in ok2 and in openassistant, whose first is context; weirdrole's narrator counts as one
        "turns": {"read": 8, "written": 6, "quarantined": 0, "filtered": 2},
        "rows": {"read": 12, "written": 5, "quarantined": 7, "filtered": 0},
    }
    assert manifest.num_rows == 6
    file = str(CASES / "bad_rows.jsonl")
    assert quarantined(tmp_path / "out") == [
        {"file": file, "line": line, "id": row_id, "reason": reason}
        for line, row_id, reason in (
            (3, "noassistant", "no assistant turn"),
            (4, "emptyconv", "empty conversation"),
            (5, "nullcontent", "a turn has no content"),
            (6, "image", "a turn has parts that are not text (only text is supported)"),
            (8, "numcontent", "a turn's content is not text"),
            (9, "nothing", f"no 'conversations' (or input_ids + loss_mask): {RENDERED_TEXT}"),
            (11, "pretok_zero", "no supervised token"),
        )
    ]
    assert PreparedData.open(tmp_path / "out").manifest == manifest
    assert "12: 5 written, 7 quarantined, 0 filtered" in str(manifest.facts()["conversations read"])


def test_one_bad_row_does_not_end_the_run(base_model_dir, tmp_path):
    for name, num_written, line, reason in (
        ("one_bad_token_row.jsonl", 2, 2, "input_ids and loss_mask differ in length: 3 input_ids but 2 loss_mask"),
        ("cut_line.jsonl", 1, 2, "line is not valid JSON (cut off in writing?)"),
    ):
        manifest = prepared_case(name, base_model_dir, tmp_path / name)
        assert manifest.num_rows == num_written
        (bad,) = quarantined(tmp_path / name)
        assert bad["line"] == line
        assert bad["reason"].startswith(reason)


def test_places_are_named_in_directories_and_tables_too(base_model_dir, tmp_path):
    rows = [{"input_ids": [5, 6], "loss_mask": [0, 1]}, {"input_ids": [5, 6], "loss_mask": [0, 0]}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n\n" + "".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "in" / "b.parquet"))
    prepare_data(model=base_model_dir, data=tmp_path / "in", output=tmp_path / "out", seq_length=200)
    places = [(Path(bad["file"]).name, bad.get("line"), bad.get("row")) for bad in quarantined(tmp_path / "out")]
    assert places == [("a.jsonl", 4, None), ("b.parquet", None, 1)]


def test_what_a_limit_leaves_out_is_filtered_and_counts_add_up(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b", "c", "d") for _ in range(5)])
    manifest = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=200, max_samples=3).manifest
    assert manifest.units["turns"] == {"read": 10, "written": 3, "quarantined": 0, "filtered": 7}
    assert manifest.units["conversations"] == {"read": 5, "written": 2, "quarantined": 0, "filtered": 3}
    assert manifest.dropped == {"beyond max_samples": 7}


def test_rows_of_one_conversation_are_one_conversation(base_model_dir, tmp_path):
    tokens = [{"primary_id": i // 2, "input_ids": [5 + i, 6], "loss_mask": [0, 1]} for i in range(6)]
    data = write_jsonl(tmp_path / "rows.jsonl", tokens)
    units = prepare_data(model=base_model_dir, data=data, output=tmp_path / "out", seq_length=9).manifest.units
    assert (units["conversations"]["written"], units["rows"]["written"]) == (3, 6)


def test_reasoning_that_the_template_drops_is_an_error_unless_asked_for(tmp_path):
    for family in ("deepseek_r1", "qwen3"):
        family_tokenizer(family).save_pretrained(tmp_path / family)
    options = {"data": CASES / "thought_in_content.jsonl", "seq_length": 200}
    with pytest.raises(ValueError, match=r"reasoning dropped by the template: 1 rows.*--drop-reasoning"):
        prepare_data(model=str(tmp_path / "deepseek_r1"), output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    asked = prepare_data(model=str(tmp_path / "deepseek_r1"), output=tmp_path / "out", drop_reasoning=True, **options)
    assert asked.manifest.num_without_reasoning == 1
    kept = prepare_data(model=str(tmp_path / "qwen3"), output=tmp_path / "kept", **options)
    (row,) = kept.dataset()
    supervised = row["input_ids"][row["loss_mask"].bool()]
    assert family_tokenizer("qwen3").decode(supervised) == "<think>\nIt is 2.\n</think>\n\nTwo.<|im_end|>"


def test_calls_with_differing_arguments_are_rows_of_one_file(tmp_path):
    family_tokenizer("mistral_v3").save_pretrained(tmp_path / "verifier")
    manifest = prepare_data(
        model=str(tmp_path / "verifier"),
        data=[CASES / "tool_args_differ.jsonl", CASES / "tool_call_openai.jsonl"],
        output=tmp_path / "out",
        seq_length=1000,
    ).manifest
    assert manifest.units["turns"] == {"read": 6, "written": 6, "quarantined": 0, "filtered": 0}


def test_the_date_that_a_template_asks_for_is_part_of_the_recipe(tmp_path):
    family_tokenizer("gpt_oss").save_pretrained(tmp_path / "verifier")
    data = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    options = {"model": str(tmp_path / "verifier"), "data": data, "output": tmp_path / "out", "seq_length": 300}
    first = prepare_data(**options, chat_template_kwargs={"template_date": "2026-01-31"})
    assert first.manifest.recipe.template_date == "2026-01-31"
    with pytest.raises(ValueError, match=r"template_date: +2026-01-31 -> .*\n.*gives the template the date again"):
        prepare_data(**options)
    assert prepare_data(**options, chat_template_kwargs={"template_date": "2026-01-31"}).reused


def test_unknown_roles_become_the_assistants_with_one_warning_each(model_dir, tmp_path, caplog):
    turns = [{"from": "human", "value": "a"}, {"from": "bard", "value": "b"}]
    data = write_jsonl(tmp_path / "roles.jsonl", [{"conversations": turns}] * 3)
    with caplog.at_level(logging.WARNING):
        manifest = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100).manifest
    assert manifest.num_rows == 3
    assert manifest.unknown_roles == {"bard": 3}
    assert caplog.text.count("'bard'") == 1


def test_pre_tokenised_rows_pass_through_without_a_chat_template(base_model_dir, tmp_path):
    rows = [{"input_ids": [7, 8, 9, 10], "loss_mask": [0, 0, 1, 1]}, {"input_ids": [5, 6], "loss_mask": [0, 1]}]
    data = write_jsonl(tmp_path / "tokens.jsonl", rows)
    prepared = prepare_data(model=base_model_dir, data=data, output=tmp_path / "out", seq_length=3)
    found = {tuple(row["input_ids"].tolist()): row["loss_mask"].tolist() for row in prepared.dataset()}
    assert found == {(7, 8, 9): [0, 0, 1], (5, 6): [0, 1]}
    assert prepared.token_freq() == {6: 1, 9: 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3], "loss_mask": [0, 1]}, "3 input_ids but 2 loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [0, 5]}, "only 0 and 1"),
        ({"input_ids": [1, 2, 3], "loss_mask": [0, 0.5, 1]}, r"0\.5; only 0 and 1"),
        ({"input_ids": [1, 2.5, 3], "loss_mask": [0, 0, 1]}, r"no token id: 2\.5"),
        ({"input_ids": [1, 10_000], "loss_mask": [0, 1]}, "tokenised for another model"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1]}, "all tokens are supervised.*all 2"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "none of the 1 rows .* 1 x no supervised token"),
    ],
)
def test_wrong_pre_tokenised_rows_are_refused(base_model_dir, tmp_path, row, message):
    data = write_jsonl(tmp_path / "tokens.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        prepare_data(model=base_model_dir, data=data, output=tmp_path / "out", seq_length=10)
    assert not (tmp_path / "out").exists()


def test_a_model_without_chat_template_and_a_missing_model_are_named(base_model_dir, data, tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        prepare_data(model=base_model_dir, data=data, output=tmp_path / "out")
    with pytest.raises(ValueError, match="no-such-model"):
        prepare_data(model=str(tmp_path / "no-such-model"), data=data, output=tmp_path / "out")
    assert entries(tmp_path) == ["chats.jsonl"]


def test_an_empty_data_set_is_an_error_unless_allowed(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"no rows in .*empty\.jsonl"):
        prepare_data(model=model_dir, data=data, output=tmp_path / "out")
    assert entries(tmp_path) == ["empty.jsonl"]
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", allow_empty_output=True)
    assert len(prepared.dataset()) == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["torch.save", "datasets.Dataset.save_to_disk"])
def test_a_full_disk_or_ctrl_c_leaves_nothing(model_dir, data, tmp_path, monkeypatch, error, function):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(function, fail)
    with pytest.raises(type(error)):
        prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100)
    assert entries(tmp_path) == ["chats.jsonl"]


def test_a_failing_overwrite_keeps_the_old_data(model_dir, data, tmp_path, monkeypatch):
    before = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100).manifest

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(OSError, match="No space"):
        prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=50, overwrite=True)
    assert PreparedData.open(tmp_path / "out").manifest == before
    assert entries(tmp_path) == ["chats.jsonl", "out"]


def test_the_same_recipe_is_reused_and_another_one_is_named(model_dir, data, tmp_path):
    out = tmp_path / "out"
    first = prepare_data(model=model_dir, data=data, output=out, seq_length=100)
    again = prepare_data(model=model_dir, data=data, output=out, seq_length=100)
    assert not first.reused
    assert again.reused
    assert again.manifest == first.manifest
    with pytest.raises(ValueError, match=r"seq_length: +100 -> 50\npass overwrite"):
        prepare_data(model=model_dir, data=data, output=out, seq_length=50)
    write_jsonl(Path(data), CHATS[:1])
    with pytest.raises(ValueError, match=r"sources_sha256: .* -> "):
        prepare_data(model=model_dir, data=data, output=out, seq_length=100)
    replaced = prepare_data(model=model_dir, data=data, output=out, seq_length=100, overwrite=True)
    assert len(replaced.dataset()) == 1


def test_a_verifier_given_by_a_link_is_written_down_by_the_link_and_is_the_one_it_leads_to(model_dir, data, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(model_dir)
    prepared = prepare_data(model=str(link), data=data, output=tmp_path / "out", seq_length=100)
    assert prepared.manifest.recipe.verifier == str(link)
    assert prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100).reused


def test_overwrite_never_deletes_what_preparing_did_not_write(model_dir, data, tmp_path):
    out = tmp_path / "out"
    prepare_data(model=model_dir, data=data, output=out, seq_length=100)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        prepare_data(model=model_dir, data=data, output=out, seq_length=50, overwrite=True)
    assert (out / "thesis.txt").read_text() == "precious"


def test_overwriting_the_rows_removes_the_hidden_states_of_the_old_ones(model_dir, data, tmp_path):
    out = tmp_path / "out"
    prepare_data(model=model_dir, data=data, output=out, seq_length=100)
    (out / "hidden_states").mkdir()
    (out / "hidden_states" / "hs_0.safetensors").touch()
    prepare_data(model=model_dir, data=data, output=out, seq_length=50, overwrite=True)
    assert not (out / "hidden_states").exists()


def test_token_frequencies_are_also_written_where_asked(model_dir, data, tmp_path):
    options = {"model": model_dir, "data": data, "output": tmp_path / "out", "seq_length": 100}
    prepared = prepare_data(**options, token_freq_path=tmp_path / "one.pt")
    prepare_data(**options, token_freq_path=tmp_path / "two.pt")
    for name in ("one.pt", "two.pt"):
        assert torch.load(tmp_path / name, weights_only=True) == prepared.token_freq()


def test_rows_depend_on_the_seed_and_not_on_the_number_of_workers(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "many.jsonl", [chat(f"ask {i}", f"say {i}") for i in range(150)])

    def rows(name: str, **options) -> list[list[int]]:
        prepared = prepare_data(model=model_dir, data=data, output=tmp_path / name, seq_length=100, **options)
        return [row["input_ids"].tolist() for row in prepared.dataset()]

    one = rows("one", num_workers=1)
    assert rows("two", num_workers=2) == one
    other = rows("other", seed=1)
    assert other != one
    assert sorted(other) == sorted(one)
    assert rows("few", max_samples=10) == one[:10]


def test_the_turns_of_a_conversation_stay_together(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "many.jsonl", [chat(f"ask {i}", "b", "c", f"say {i}") for i in range(20)])
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=200)
    rows = [row["input_ids"].tolist() for row in prepared.dataset()]
    assert len(rows) == 40
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert second[: len(first)] == first


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_regenerated_turns_of_a_conversation_stay_together(model_dir, tmp_path, kind):
    """Three turns a conversation in two files whose ids are the same; the first token tells the conversation."""
    for part, base in (("one", 10), ("two", 50)):
        rows = [
            {"primary_id": str(i), "input_ids": [base + i] + [4] * turn + [5], "loss_mask": [0] * (turn + 1) + [1]}
            for turn in (1, 2, 3)
            for i in range(20)
        ]
        if kind == "jsonl":
            write_jsonl(tmp_path / f"{part}.jsonl", rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{part}.parquet")
    sources = [tmp_path / f"{part}.{kind}" for part in ("one", "two")]
    prepared = prepare_data(model=model_dir, data=sources, output=tmp_path / "out", seq_length=200)
    firsts = [row["input_ids"][0].item() for row in prepared.dataset()]
    assert len(firsts) == 120
    assert firsts[::3] == firsts[1::3] == firsts[2::3]
    assert firsts[::3] != sorted(firsts[::3])


def test_minimum_valid_tokens_drops_short_answers(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", [chat("a", "b"), chat("a", "a much longer answer")])
    manifest = prepare_data(
        model=model_dir, data=data, output=tmp_path / "out", seq_length=100, minimum_valid_tokens=5
    ).manifest
    assert manifest.num_rows == 1
    assert manifest.dropped == {"fewer supervised tokens than minimum_valid_tokens": 1}
    with pytest.raises(ValueError, match="minimum_valid_tokens=-1"):
        prepare_data(model=model_dir, data=data, output=tmp_path / "no", minimum_valid_tokens=-1)


def test_inspect_mask_shows_raw_and_prepared_rows_alike(model_dir, data, tmp_path):
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100)
    raw = inspect_mask(data, model=model_dir, num_rows=1)
    assert [(span.supervised, span.text) for span in raw[0].spans] == [
        (False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "hello<|im_end|>"),
        (False, "\n"),
    ]
    shown = inspect_mask(prepared.path, num_rows=10)
    assert len(shown) == 4
    assert raw[0].spans in [row.spans for row in shown]
    assert raw[0].num_supervised == sum(span.stop - span.start for span in raw[0].spans if span.supervised)


def test_progress_is_told(model_dir, data, tmp_path):
    calls = []
    prepare_data(
        model=model_dir, data=data, output=tmp_path / "out", seq_length=100, progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == ("tokenise", 3, 3)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved", "dict", "directory"])
def test_raw_rows_are_the_same_from_every_kind_of_source(tmp_path, kind):
    table = datasets.Dataset.from_list(CHATS)
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(CHATS))
    elif kind == "jsonl":
        write_jsonl(path, CHATS)
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "dict":
        datasets.DatasetDict({"train": table}).save_to_disk(str(path))
    else:
        (path / "deep").mkdir(parents=True)
        write_jsonl(path / "a.jsonl", CHATS[:1])
        (path / "deep" / "b.json").write_text(json.dumps(CHATS[1:]))
    rows = load_raw_dataset(path)
    assert [rows[i]["conversations"] for i in range(len(rows))] == [row["conversations"] for row in CHATS]


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "utlrachat", "hf:", "hf:a:b:c:d", "hf://datasets/a/b/c.txt"])
def test_a_source_that_is_none_is_named(source):
    with pytest.raises(ValueError, match=r"(is not|must name|does not exist and is no preset)"):
        load_raw_dataset(source)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "notes.txt").write_text("hi")
    (tmp_path / "empty").mkdir()
    for name in ("broken.json", "broken.parquet", "notes.txt", "empty"):
        with pytest.raises(ValueError, match=name):
            load_raw_dataset(tmp_path / name)


def test_the_contracts_in_memory_functions_give_the_same_rows(model_dir, tokenizer, data, tmp_path):
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100)
    dataset, _ = load_and_preprocess_dataset(
        model_dir, [data], seq_length=100, token_freq_path=tmp_path / "freq.pt", skip_token_freq=False
    )
    assert [row["input_ids"].tolist() for row in dataset] == [r["input_ids"].tolist() for r in prepared.dataset()]
    assert torch.load(tmp_path / "freq.pt", weights_only=True) == prepared.token_freq()
    built = build_speculator_training_dataset(datasets.Dataset.from_list(CHATS), tokenizer, max_length=100)
    assert len(built) == 4
    with pytest.raises(ValueError, match="begins with http://"):
        build_speculator_training_dataset(CHATS, tokenizer, render_endpoint="localhost:8000")


def test_a_manifest_without_the_keys_of_later_versions_is_read(model_dir, data, tmp_path):
    prepared = prepare_data(model=model_dir, data=data, output=tmp_path / "out", seq_length=100)
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    for key in ("drop_reasoning", "template_date"):
        del values["recipe"][key]
    path.write_text(json.dumps(values))
    assert PreparedData.open(tmp_path / "out").manifest == prepared.manifest
