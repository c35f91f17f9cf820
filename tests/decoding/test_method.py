"""What a user may write for a method."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.decoding.method import parse_method, parse_methods


def test_none_means_plain_decoding():
    assert parse_method("none", 4).speculative_config is None


def test_a_word_is_a_method_and_k_is_filled_in():
    assert parse_method("ngram", 4).speculative_config == {"method": "ngram", "num_speculative_tokens": 4}
    assert parse_method("ngram", None).speculative_config == {"method": "ngram", "num_speculative_tokens": 4}
    assert parse_method("suffix", None).speculative_config == {"method": "suffix"}


def test_json_wins_over_the_general_k():
    method = parse_method('{"method": "suffix", "num_speculative_tokens": 8}', 4)
    assert (method.name, method.speculative_config["num_speculative_tokens"]) == ("suffix", 8)


def test_a_checkpoint_is_named_by_what_it_is_and_names_never_clash(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"speculators_model_type": "eagle3"}')
    methods = parse_methods([str(tmp_path), "none", str(tmp_path), str(tmp_path)], 3)
    assert [method.name for method in methods] == ["eagle3", "none", "eagle3-2", "eagle3-3"]
    assert methods[0].speculative_config == {"model": str(tmp_path), "num_speculative_tokens": 3}


def test_a_name_that_is_no_path_may_be_a_model_of_the_hub():
    assert parse_method("org/drafter", 4).speculative_config == {"model": "org/drafter", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{not json", "is not"), ("no/such/place", "no such directory"), ("./place", "no such directory")],
)
def test_what_is_no_method_is_an_error(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_method(text, 4)


def test_what_has_a_directory_and_a_dict_are_methods_too(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"speculators_model_type": "mlp"}')
    assert parse_method(tmp_path, 2).speculative_config == {"model": str(tmp_path), "num_speculative_tokens": 2}
    given = {"method": "ngram", "num_speculative_tokens": 7}
    assert parse_method(given).speculative_config == given
    with pytest.raises(ValueError, match="no such directory"):
        parse_method(Path("nowhere"))
