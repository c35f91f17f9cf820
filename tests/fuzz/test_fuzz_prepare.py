"""Files of damaged conversations through prepare-data: it never fails, and what was read is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz_toys import ODD_VALUES, mutated, watched
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from speculators import assets
from speculators.data_generation import prepare_data

TEMPLATES = sorted((Path(__file__).parents[1] / "data" / "templates").glob("*.jinja"))
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    {
        "primary_id": "b",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2+3?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "Add."},
            {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"},
            {"role": "assistant", "content": "Five.", "weight": 1},
        ],
        "tools": [ADD],
    },
    {"conversation": {"role": ["user", "assistant"], "content": ["a", "<think>b</think>c"]}, "tools": "[]"},
    {"primary_id": "b", "input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "prefix": True}] * 2},
    {"prompt": "no answer"},
]
DAMAGED_ROWS = st.sampled_from(ROWS).flatmap(mutated) | st.sampled_from(ROWS) | ODD_VALUES
LINES = DAMAGED_ROWS.map(lambda row: json.dumps(row).encode())
"""One line of a file each: whole, cut off, or no text at all."""
DAMAGED_LINES = st.one_of(
    *[LINES] * 4,
    st.tuples(LINES, st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]]),
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ")),
)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    found = {}
    for template in TEMPLATES:
        tokenizer = AutoTokenizer.from_pretrained(assets.tiny_verifier_path(), bos_token="<|im_start|>")
        tokenizer.chat_template = template.read_text()
        found[template.stem] = tokenizer
    return found


def test_damaged_conversations_are_accounted_for(tokenizers, tmp_path):
    data, output = tmp_path / "rows.jsonl", tmp_path / "prepared"

    @given(
        st.lists(DAMAGED_LINES, min_size=5, max_size=12),
        st.sampled_from(sorted(tokenizers)),
        st.sampled_from([24, 64, 4096]),
        st.none() | st.integers(1, 4),
    )
    def run(lines, template, seq_length, max_samples):
        data.write_bytes(b"\n".join(lines))
        with watched():
            prepared = prepare_data(
                str(assets.tiny_verifier_path()),
                data,
                output=output,
                tokenizer=tokenizers[template],
                seq_length=seq_length,
                max_samples=max_samples,
                num_workers=1,
                overwrite=True,
                allow_empty_output=True,
                drop_reasoning=True,
            )
        manifest = prepared.manifest
        num_lines = sum(bool(line.strip()) for line in data.read_bytes().split(b"\n"))
        rows = manifest.units["rows"]
        for unit in manifest.units.values():
            assert unit["read"] == unit["written"] + unit["quarantined"] + unit["filtered"]
        assert rows["read"] == num_lines or (max_samples is not None and rows["read"] <= num_lines)
        bad = output / "quarantine.jsonl"
        listed = [json.loads(line) for line in bad.read_text().splitlines()] if bad.exists() else []
        assert len(listed) == rows["quarantined"] and all(entry["reason"] for entry in listed)
        made = list(prepared.dataset())
        assert len(made) == manifest.num_rows <= (max_samples or manifest.num_rows)
        for row in made:
            assert len(row["input_ids"]) == len(row["loss_mask"]) <= seq_length
            assert 0 < int(row["loss_mask"].sum()) < len(row["loss_mask"]) or seq_length < 4096

    run()
