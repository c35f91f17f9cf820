"""Messages of configs built in Python, word for word: as the command line says them, without pydantic's dump."""

from __future__ import annotations

import shutil
from dataclasses import fields

import pytest
from pydantic import ValidationError

from speculators import assets
from speculators.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.decoding import Engine, SamplingParams, parse_method
from speculators.decoding.config import SpeculativeConfig
from speculators.evaluation.config import EvaluateConfig, ParityConfig, ServerConfig
from speculators.model import SpeculatorModel
from speculators.proposals import GreedyTokenProposalConfig, TokenProposalConfig
from speculators.train.config import TrainConfig
from speculators.training_keys import DraftKeys, HeadLossArgs

VERIFIER = str(assets.tiny_verifier_path())
GREEDY = {"proposal_type": "greedy", "speculative_tokens": 0}
KINDS = ("dflash", "dspark", "eagle", "eagle3", "medusa", "mlp", "mtp", "peagle")
TAGS = "<all names>"
"""Stands for every registered name: other tests of a run may have registered toys."""


def train_config() -> TrainConfig:
    return TrainConfig(verifier={"verifier_name_or_path": "v"})


MODELS = {
    # pydantic models by every door: the constructor, `model_validate`, `from_dict`, inside one another, assignment
    "a value of a verifier": (
        lambda: VerifierConfig(name_or_path=3),
        "name_or_path: must be a valid string, got 3\narchitectures is required",
    ),
    "validated": (lambda: VerifierConfig.model_validate({"name_or_path": "v"}), "architectures is required"),
    "from JSON": (lambda: VerifierConfig.model_validate_json('{"name_or_path": "v"}'), "architectures is required"),
    "inside another": (
        lambda: SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GREEDY],
            default_proposal_method="greedy",
            verifier={"name_or_path": 1},
        ),
        "proposal_methods.0.speculative_tokens: must be greater than or equal to 1, got 0\n"
        "verifier.name_or_path: must be a valid string, got 1\nverifier.architectures is required",
    ),
    "a rule of our own": (
        lambda: SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[],
            default_proposal_method="greedy",
            verifier={"name_or_path": "v", "architectures": []},
        ),
        "default_proposal_method 'greedy' must match the proposal_type of one of the configured proposal_methods; "
        "available: []",
    ),
    "a proposal": (
        lambda: GreedyTokenProposalConfig(speculative_tokens="many"),
        "speculative_tokens: must be a valid integer, got 'many'",
    ),
    "a literal": (lambda: GreedyTokenProposalConfig(proposal_type="x"), "proposal_type: must be 'greedy', got 'x'"),
    "an unknown proposal": (
        lambda: TokenProposalConfig.model_validate({"proposal_type": "greedi"}),
        "proposal_type 'greedi' does not match any of the expected tags: 'greedy'. Did you mean 'greedy'?",
    ),
    "no proposal type": (lambda: TokenProposalConfig(), "proposal_type is required"),
    "an unknown speculator": (
        lambda: SpeculatorModelConfig.from_dict({"speculators_model_type": "eagl3"}),
        f"speculators_model_type 'eagl3' does not match any of the expected tags: {TAGS}. Did you mean 'eagle3'?",
    ),
    "keys of training": (
        lambda: DraftKeys(num_layers=0, draft_attn_impl="flash", num_layrs=2),
        "num_layers: must be greater than or equal to 1, got 0\n"
        "draft_attn_impl: must be 'simple_flex_attention', 'sdpa' or 'eager', got 'flash'\n"
        "num_layrs: Extra inputs are not permitted. Did you mean 'num_layers'?",
    ),
    "keys of an algorithm": (lambda: HeadLossArgs(), "head_weight_decay is required"),
    "a training run": (
        lambda: TrainConfig(verifier={}, draft={"num_layrs": 2}, trainer={"epochs": -1}),
        "verifier.verifier_name_or_path is required\n"
        "draft.num_layrs: Extra inputs are not permitted. Did you mean 'num_layers'?\n"
        "trainer.epochs: must be greater than or equal to 1, got -1",
    ),
    "a frozen config": (
        lambda: setattr(train_config(), "seed", 3),
        "seed cannot be set: this config does not change; make another one",
    ),
    "a long value": (
        lambda: DraftKeys(num_layers=[0] * 200),
        f"num_layers: must be a valid integer, got {str([0] * 200)[:200]}...",
    ),
    "what to draft with": (
        lambda: SpeculativeConfig(method="ngram", num_speculative_tokens=0),
        "num_speculative_tokens: must be greater than 0, got 0",
    ),
    "an old flag of vLLM": (
        lambda: SpeculativeConfig(speculative_model="m", num_speculative_tokens=3),
        "speculative_model is retired: say model",
    ),
    "two old flags": (
        lambda: SpeculativeConfig(speculative_disable_mqa_scorer=True, ngram_prompt_lookup_max=4),
        "speculative_disable_mqa_scorer is retired: drafts are always scored in one pass: leave it out; "
        "ngram_prompt_lookup_max is retired: say prompt_lookup_max",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_built_in_python_says_what_is_wrong_in_plain_words(name):
    build, message = MODELS[name]
    with pytest.raises(ValidationError) as caught:
        build()
    names = SpeculatorModelConfig.available_names()
    assert set(KINDS) <= set(names)
    assert str(caught.value) == message.replace(TAGS, ", ".join(f"'{kind}'" for kind in names))


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_every_drafter_does(kind):
    config_class = SpeculatorModel.get_class(kind).config_class
    for build in (lambda v: config_class(**v), SpeculatorModelConfig.from_dict, SpeculatorModelConfig.model_validate):
        with pytest.raises(ValidationError) as caught:
            build({"speculators_model_type": kind, "speculators_config": {"algorithm": 3}})
        lines = str(caught.value).splitlines()
        assert lines[0] == "speculators_config.algorithm: must be a valid string, got 3"
        assert lines[1:4] == [
            f"speculators_config.{name} is required"
            for name in ("proposal_methods", "default_proposal_method", "verifier")
        ]
        assert {error["type"] for error in caught.value.errors()} >= {"string_type", "missing"}  # as pydantic's own


RECORDS = {
    # settings without pydantic
    "no count": (lambda: SamplingParams(n="2"), "n='2' must be an integer, at least 1"),
    "no list": (lambda: SamplingParams(stop=5), "stop=5 must be a list"),
    "no list of words": (lambda: SamplingParams(bad_words=3), "bad_words=3 must be a list"),
    "no switch": (lambda: SamplingParams(ignore_eos="no"), "ignore_eos='no' must be True or False"),
    "no bias": (lambda: SamplingParams(logit_bias=3), "logit_bias=3 must map token ids to numbers"),
    "sampling of an evaluation": (
        lambda: EvaluateConfig(verifier="v", data="d", temperature=-1),
        "temperature=-1 must be 0 (greedy) or more",
    ),
    "no prompts": (
        lambda: EvaluateConfig(verifier="v", data="d", num_prompts=0),
        "num_prompts=0 must be an integer, at least 1",
    ),
    "no repeats": (
        lambda: EvaluateConfig(verifier="v", data="d", num_repeats=0),
        "num_repeats=0 must be an integer, at least 1",
    ),
    "half a batch": (
        lambda: EvaluateConfig(verifier="v", data="d", batch_size=0.5),
        "batch_size=0.5 must be an integer, at least 1",
    ),
    "warm-up": (
        lambda: EvaluateConfig(verifier="v", data="d", num_warmup=-1),
        "num_warmup=-1 must be an integer, at least 0",
    ),
    "dtype": (
        lambda: EvaluateConfig(verifier="v", data="d", dtype="int8"),
        "dtype='int8' is not supported; use float32, bfloat16, float16",
    ),
    "clients": (
        lambda: ServerConfig(server="s", data="d", num_clients=(0,)),
        "concurrency [0]: at least one client is needed",
    ),
    "time": (lambda: ServerConfig(server="s", data="d", timeout_s=0), "timeout_s=0 must be more than 0 seconds"),
    "parity": (lambda: ParityConfig(checkpoint="c", max_tokens=0), "max_tokens=0 must be an integer, at least 1"),
    "an unknown setting": (
        lambda: SamplingParams(tempratur=1),
        "unknown setting of SamplingParams 'tempratur'. Did you mean 'temperature'? There are: "
        + ", ".join(sorted(field.name for field in fields(SamplingParams))),
    ),
    "an unknown setting of the gate": (
        lambda: ParityConfig(checkpoint="c", max_token=1),
        "unknown setting of ParityConfig 'max_token'. Did you mean 'max_tokens'? There are: batch_size, checkpoint, "
        "device, dtype, max_prompt_tokens, max_tokens, num_prompts, num_speculative_tokens, trust_remote_code, "
        "verifier, vllm",
    ),
    "an unknown setting of an evaluation": (
        lambda: EvaluateConfig(verifier="v", data="d", method="ngram"),
        "unknown setting of EvaluateConfig 'method'. Did you mean 'methods'? There are: "
        + ", ".join(sorted(field.name for field in fields(EvaluateConfig))),
    ),
    "an unknown setting of a server": (
        lambda: ServerConfig(server="s", data="d", timeout=1),
        "unknown setting of ServerConfig 'timeout'. Did you mean 'timeout_s'? There are: "
        + ", ".join(sorted(field.name for field in fields(ServerConfig))),
    ),
    "a method's name": (
        lambda: parse_method("eagle3"),
        'method eagle3 drafts with a model, and none is named: give its directory, or {"method": "eagle3", '
        '"model": "..."}',
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_settings_say_what_is_wrong_when_they_are_made(name):
    build, message = RECORDS[name]
    with pytest.raises(ValueError, match=r".") as caught:
        build()
    assert str(caught.value) == message


def test_one_method_needs_no_list():
    assert EvaluateConfig(verifier="v", data="d", methods="ngram").methods == ("ngram",)


@pytest.mark.parametrize(("name", "method"), [("my-eagle3-llama", "eagle3"), ("small-DFlash", "dflash")])
def test_a_method_that_was_guessed_from_a_name_is_the_reason_of_the_error(tmp_path, name, method):
    path = str(shutil.copytree(VERIFIER, tmp_path / name))
    guess = f"(method '{method}' was guessed from '{method}' in its name; "
    guess += f'{{"method": "draft_model", "model": "{path}"}} says that it is a whole language model)'
    with pytest.raises(ValueError, match="needs a speculators checkpoint") as caught:
        Engine.from_pretrained(VERIFIER, path, num_speculative_tokens=2)
    assert str(caught.value).endswith(guess)
    with pytest.raises(ValueError, match="needs a speculators checkpoint") as caught:
        Engine.from_pretrained(VERIFIER, {"method": method, "model": path, "num_speculative_tokens": 2})
    assert "was guessed from" not in str(caught.value)  # it was said
    config = SpeculativeConfig(method="draft_model", model=path, num_speculative_tokens=2)
    assert config.method == "draft_model"  # the way out
