"""The card of an exported directory: what it may say of speed, and that it names nothing of this machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from speculators.checkpoint.engine_profile import Serving, profile_named
from speculators.deploy.card import model_card, shown_name, speed_sentence


def report(value: float, low: float) -> dict[str, Any]:
    speedup = {"value": value, "low": low, "high": 2 * value - low}
    row = {"num_speculative_tokens": 4, "acceptance_length": {"value": 2.0}, "speedup": speedup, "num_prompts": 20}
    return {"verifier": "/home/me/verifier", "dataset": "/home/me/heldout.jsonl", "rows": [row]}


def card(verifier: str, measured: dict[str, Any] | None = None, serving: Serving | None = None) -> str:
    method = {"method": "eagle", "model": "/home/me/out/drafter", "num_speculative_tokens": 4}
    config: Any = SimpleNamespace(speculators_model_type="eagle")
    return model_card(
        config,
        name="drafter",
        format_name="eagle",
        profile=profile_named("vllm-0.33"),
        serving=serving or Serving(verifier, method),
        verifier=verifier,
        report=measured,
    )


@pytest.mark.parametrize(
    ("value", "low", "said"),
    [
        (1.45, 1.30, "Measured below, the verifier answers faster: 1.45x the speed of plain decoding."),
        (
            1.05,
            0.98,
            "Measured below: 1.05x the speed of plain decoding, which its interval does not tell from no gain "
            "(from 0.98x).",
        ),
        (0.88, 0.80, "Measured below, it does not pay: 0.88x the speed of plain decoding."),
    ],
)
def test_faster_is_said_of_an_interval_above_one_alone(value, low, said):
    assert speed_sentence(report(value, low)) == said
    written = card("org/verifier", report(value, low))
    assert said in written and ("faster" in written) is (low > 1)
    assert "faster" not in card("org/verifier") and "Its speed was not measured." in card("org/verifier")


def test_a_card_names_no_path_of_this_machine():
    written = card("/home/me/verifier", report(1.45, 1.30))
    assert "/home" not in written
    assert "base_model: verifier  # a directory here: write the hub id of the verifier" in written
    said = '{"method": "eagle", "model": "./drafter", "num_speculative_tokens": 4}'
    assert f"vllm serve verifier --speculative-config '{said}'" in written
    assert "Local engine, verifier `verifier`, prompts of `heldout.jsonl`." in written
    cached = "/home/me/.cache/huggingface/hub/models--org--big-7b/snapshots/0123abc"
    assert shown_name(cached) == "org/big-7b"
    assert "base_model: org/big-7b\n" in card(cached)


@pytest.mark.parametrize("home", ["/home/jürgen", '/home/it\'s "me"', "/home/a\\b"])
def test_it_names_none_that_the_command_writes_otherwise(home):
    settings = {"method": "eagle", "model": f"{home}/out/drafter", "num_speculative_tokens": 4}
    written = card(f"{home}/verifier", serving=Serving(f"{home}/verifier", settings))
    assert "home" not in written
    said = '{"method": "eagle", "model": "./drafter", "num_speculative_tokens": 4}'
    assert f"    vllm serve verifier --speculative-config '{said}'\n" in written


def test_the_directory_of_an_mtp_layer_is_the_model_itself():
    settings = {"method": "mtp", "num_speculative_tokens": 1}
    written = card("/home/jürgen/verifier", serving=Serving("/home/jürgen/out/drafter", settings))
    assert "home" not in written
    said = '{"method": "mtp", "num_speculative_tokens": 1}'
    assert f"    vllm serve ./drafter --speculative-config '{said}'\n" in written


def test_a_card_says_licence_and_use(tmp_path):
    written = card("org/verifier")
    assert "license: other\nlicense_name: that-of-the-base-model\n" in written
    assert "license_link: https://huggingface.co/org/verifier\n" in written
    assert 'speculators generate --verifier org/verifier --method ./drafter --prompt "..."' in written
    assert 'Engine.from_pretrained("org/verifier", "./drafter").chat("...").text' in written
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A verifier\n")
    assert "\nlicense: apache-2.0\n" in card(str(tmp_path))
