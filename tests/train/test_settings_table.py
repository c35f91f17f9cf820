"""No setting is dropped in silence: every flag beside every source of shape, weights and states, walked against the
table of `train.keys`: used (what is built differs), refused (by name), as the checkpoint says, or said to be idle."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import yaml
from drafter_toys import decoder_config
from transformers import MambaConfig

from speculators.model import SpeculatorModel
from speculators.train import run, sources
from speculators.train.algorithm import ALGORITHMS, Algorithm
from speculators.train.config import ConfigError, TrainConfig
from speculators.train.distributed import Ranks
from speculators.train.events import Note
from speculators.train.flags import flag_of, is_kind
from speculators.train.keys import EQUAL, GROUPS, IDLE, REFUSED, USED, DataKeys, DraftKeys, RunKeys, group_of
from speculators.train.recipe import FREE_KEYS, HASHED_KEYS, LENGTH_KEYS, recipe_of
from speculators.verifier import load_verifier

ALGORITHM = "eagle3"
OWN = SpeculatorModel.get_class(ALGORITHM).training_args.model_fields
KEYS = [*group_of(), *OWN]
OUTSIDE = {
    *("verifier_name_or_path", "trust_remote_code", "data_path", "save_path", "speculator_type", "plugins"),
    *("rank_timeout", "dry_run", "estimate", "contract_check", "parity_gate", "logger", "log_dir", "run_name"),
    *("verifier_device", "verifier_device_map", "verifier_tp", "estimate_ranks", "max_memory"),
    *("loss_implementation", "gradient_checkpointing", "deterministic_cuda", "seed", "cache_hidden_states"),
}
"""Read by `train` around what is built, or seen in numbers alone: their value is in the configuration."""
STATES = {"computed": {}, "served": {"vllm_endpoint": "http://localhost:1/v1"}, "stored": {"on_missing": "warn"}}
EXAMPLES: dict[str, Any] = {
    "target_layer_ids": [1, 2, 4],
    "full_attention_indices": [0],
    "draft_vocab_size": 12,
    "loss_fn": "ce",
    "draft_arch": "qwen3",
    "draft_hidden_act": "gelu",
    "total_seq_len": 16,
    "muon_lr": 0.5,
    "train_data_ratio": 0.5,
    "max_steps": 3,
    "scheduler_warmup_steps": 2,
    "scheduler_warmup_ratio": 0.5,
    "scheduler_total_steps": 7,
    "eval_prompts": 2,
    "max_memory": "1TB",
    "plugins": ["json"],
    "run_name": "x",
    "hidden_states_memory_gb": 0.0,
    "num_layers": 2,
    "vllm_endpoint": "http://localhost:2/v1",
    "norm_before_fc": False,
    "verifier_device": "cpu",
    "verifier_device_map": "auto",
    "checkpoint_freq": 0.5,
}
OVERRULES = {
    ("cache_hidden_states", "on_missing"),
    ("from_pretrained", "draft_config"),
    ("on_missing", "vllm_endpoint"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, verifier_path, data_path):
    """A verifier, its data with frequencies, maps and states, a drafter and the config of one."""
    folder = tmp_path_factory.mktemp("settings")
    torch.save({token: 64 - token for token in range(1, 64)}, folder / "token_freq.pt")
    (folder / "draft.json").write_text(json.dumps(decoder_config("llama", vocab_size=64).to_dict()))
    kept = torch.zeros(64, dtype=torch.bool)
    kept[:12] = True
    torch.save(kept, folder / "t2d.pt")
    torch.save(torch.zeros(12, dtype=torch.int64), folder / "d2t.pt")
    base = {
        "speculator_type": ALGORITHM,
        "verifier_name_or_path": str(verifier_path),
        "data_path": shutil.copytree(data_path, folder / "data").as_posix(),
        "total_seq_len": 64,
        "hidden_states_dtype": "float32",
        "parity_gate": False,
        "contract_check": False,
    }
    made = {**base, "save_path": str(folder / "made"), "target_layer_ids": [1, 3, 5], "max_steps": 1}
    states = {"cache_hidden_states": True, "hidden_states_path": str(folder / "states"), "epochs": 1}
    verifier = load_verifier(str(verifier_path), dtype=torch.float32)
    maps = {"d2t_path": str(folder / "d2t.pt"), "t2d_path": str(folder / "t2d.pt")}
    config = TrainConfig.from_sources(cli={**made, **states, **maps, "max_steps": None, "ttt_steps": 1})
    result = run.train(config, verifier=verifier)
    shutil.copytree(folder / "states", folder / "other_states")
    return SimpleNamespace(folder=folder, base=base, verifier=verifier, checkpoint=str(result.checkpoint), maps=maps)


def example(key: str, place: SimpleNamespace, algorithm: str = ALGORITHM, field: Any = None) -> Any:
    """A valid value that is not the default."""
    paths = {
        "from_pretrained": place.checkpoint,
        "draft_config": str(place.folder / "draft.json"),
        "token_freq_path": str(place.folder / "token_freq.pt"),
        "hidden_states_path": str(place.folder / "other_states"),
        **place.maps,
    }
    given = {**EXAMPLES, **paths}
    if key in given:
        return given[key]
    groups = (OWN, *(group.model_fields for group in (RunKeys, *GROUPS.values())))
    field = field or next(keys[key] for keys in groups if key in keys)
    default = Algorithm(algorithm).defaults.get(key, field.default)
    if is_kind(field.annotation, bool):
        return not default
    choices = [value for value in get_args(field.annotation) if isinstance(value, str) and value != default]
    if choices:
        return choices[0]
    if isinstance(default, str):
        return str(place.folder / key)
    return 3 if default is None else default + 1 if isinstance(default, int) else default / 2


def config_with(place: SimpleNamespace, source: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    layers = {} if "from_pretrained" in source else {"target_layer_ids": [1, 3, 5]}
    stored = {"hidden_states_path": str(place.folder / "states")} if source.get("on_missing") else {}
    return TrainConfig.from_sources(
        cli={**place.base, "save_path": str(place.folder / "run"), **layers, **stored, **source, **given}
    )


def built(config: TrainConfig, place: SimpleNamespace, monkeypatch) -> str:
    """What a run is made of, as text."""
    asked: list[Any] = []

    def server(*args, **settings):
        asked.append((args, settings))
        served = SimpleNamespace(max_model_len=None, root=config.verifier.verifier_name_or_path)
        return SimpleNamespace(served=served, capture=args[1], read=None)

    monkeypatch.setattr(sources, "VllmSource", server)
    monkeypatch.setattr(sources, "check_stored_states", lambda *args: None)
    monkeypatch.setattr(run, "write_provenance", lambda *args: None)
    heard: list[Any] = []
    trainer = run.build(config, Ranks(), heard.append, place.verifier).trainer
    model, loader = trainer.model, trainer.train_loader
    source = loader.read.__self__.source
    layers = getattr(model.config, "transformer_layer_config", None)
    facts = [
        model.config.to_dict(),
        getattr(layers, "_attn_implementation", None),
        None if getattr(model, "t2d", None) is None else model.t2d.nonzero().flatten().tolist(),
        trainer.config,
        trainer.schedule,
        (loader.num_threads, loader.num_ahead, loader.collate.max_len, len(loader.read.__self__)),
        (type(source).__name__, str(getattr(source, "directory", ""))),
        asked,
        None if trainer.decoder is None else trainer.decoder.prompts,
    ]
    return "\n".join(map(str, facts))


def needed_beside(key: str, place: SimpleNamespace) -> dict[str, Any]:
    """What a key needs to be valid."""
    return {
        "draft_vocab_size": {"token_freq_path": str(place.folder / "token_freq.pt")},
        "token_freq_path": {"draft_vocab_size": 11},
        "estimate_ranks": {"estimate": True},
        "on_missing": {"hidden_states_path": str(place.folder / "states")},
    }.get(key, {})


def walk(place: SimpleNamespace, source: dict[str, Any], keys: list[str], monkeypatch) -> dict[str, str]:
    """Returns key -> what the table says, each shown to be so."""
    algorithm, outcomes, plain = Algorithm(ALGORITHM), {}, ""
    for key in (key for key in keys if key not in source and key not in place.base):
        value, beside = example(key, place), dict(needed_beside(key, place))
        if key in place.maps:
            beside |= place.maps
        if "from_pretrained" in source and key in ("draft_vocab_size", "token_freq_path"):
            value, beside = (13, {}) if key == "draft_vocab_size" else (value, {})
        values = {**config_with(place, source, {}).flatten(), **beside, key: value}
        outcome, because = algorithm.reading(key, values)
        if (key, next(iter(source), None)) in OVERRULES:  # the source itself is refused beside it
            with pytest.raises(ConfigError, match=f"leave out {flag_of(next(iter(source)))}"):
                config_with(place, source, {key: value})
            continue
        outcomes[key] = outcome
        if outcome == REFUSED:
            with pytest.raises(ConfigError, match=f"leave out .*{flag_of(key)}") as raised:
                config_with(place, source, {**beside, key: value})
            assert because in str(raised.value)
            continue
        config = config_with(place, source, {**beside, key: value})
        assert config.flatten()[key] == value
        if outcome == EQUAL:
            check_equal(place, source, config, key, beside)
        elif outcome == IDLE:
            assert config.idle[key] == because
        elif key not in OUTSIDE:
            plain = plain or built(config_with(place, source, {}), place, monkeypatch)
            assert built(config, place, monkeypatch) != plain, key
    return outcomes


def check_equal(place, source, config, key, beside) -> None:
    """Another value is refused by name, the checkpoint's own accepted."""
    if key in place.maps:
        run.build_model(config, None)  # the checkpoint's own maps
        return
    with pytest.raises(ValueError, match=rf"{flag_of(key)}: +\S"):
        run.build_model(config, None)
    cls = SpeculatorModel.get_class(ALGORITHM)
    recorded = getattr(SpeculatorModel.from_pretrained(place.checkpoint).config, cls.recorded_keys.get(key, key))
    assert run.build_model(config_with(place, source, {**beside, key: recorded}), None) is not None


SHAPE_KEYS = [*DraftKeys.model_fields, *OWN]


def test_every_key_of_a_new_drafter(place, monkeypatch):
    outcomes = walk(place, {}, KEYS, monkeypatch)
    refused = {key for key, outcome in outcomes.items() if outcome == REFUSED}
    assert refused == {"mask_token_id", "block_size", "max_anchors", "scheduler_num_cosine_cycles"}
    assert EQUAL not in outcomes.values()
    idle = {key for key, outcome in outcomes.items() if outcome == IDLE}
    assert idle == {
        *("server_states_path", "request_timeout", "max_retries", "generation_validation_retries"),
        *("num_workers", "prefetch_factor", "log_dir", "run_name"),
    }


def test_every_key_of_shape_beside_a_checkpoint(place, monkeypatch):
    outcomes = walk(place, {"from_pretrained": place.checkpoint}, SHAPE_KEYS, monkeypatch)
    assert {key for key, outcome in outcomes.items() if outcome == USED} == {
        *("draft_attn_impl", "ttt_steps", "ttt_step_loss_decay")
    }
    assert {key for key, outcome in outcomes.items() if outcome == EQUAL} == {
        *("target_layer_ids", "draft_vocab_size", "d2t_path", "t2d_path"),
        *("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output", "embed_requires_grad"),
    }


def test_every_key_of_shape_beside_a_draft_config(place, monkeypatch):
    outcomes = walk(place, {"draft_config": str(place.folder / "draft.json")}, SHAPE_KEYS, monkeypatch)
    shaping = {"num_layers", "draft_arch", "draft_hidden_act", "sliding_window", "full_attention_indices"}
    refused = {key for key, outcome in outcomes.items() if outcome == REFUSED}
    assert refused == shaping | {"mask_token_id", "block_size"} | {"from_pretrained"} & outcomes.keys()


@pytest.mark.parametrize("states", STATES)
def test_every_key_of_the_data(place, monkeypatch, states):
    outcomes = walk(place, STATES[states], list(DataKeys.model_fields), monkeypatch)
    idle = {key for key, outcome in outcomes.items() if outcome == IDLE}
    server = {"server_states_path", "request_timeout", "max_retries", "generation_validation_retries"}
    assert (
        idle
        == {
            "computed": server | {"num_workers", "prefetch_factor"},
            "served": {"prefetch_in_process"},
            "stored": server | {"hidden_states_memory_gb", "prefetch_in_process"},
        }[states]
    )
    assert (outcomes.get("vllm_endpoint") == REFUSED) == (states == "stored")


def test_every_key_when_a_run_is_continued(place):
    """What shapes the result is in the recipe, which is compared; the rest may change."""
    config = config_with(place, {}, {})
    model = run.build_model(config, run.load_verifier_config(config.verifier.verifier_name_or_path, False))
    before = recipe_of(config, Ranks(), model, None)
    assert set(KEYS) - set(before) - FREE_KEYS - HASHED_KEYS == set()
    for key in set(KEYS) - FREE_KEYS - HASHED_KEYS - {"speculator_type", *place.base}:
        given = {**needed_beside(key, place), key: example(key, place)}
        try:
            changed = config_with(place, {}, given)
        except ConfigError:  # refused before anything is compared
            continue
        assert recipe_of(changed, Ranks(), model, None) != before, key
    assert FREE_KEYS.isdisjoint(LENGTH_KEYS)


def test_what_has_no_effect_is_said(place, monkeypatch):
    heard = []
    monkeypatch.setattr(run, "write_provenance", lambda *args: None)
    config = config_with(place, {}, {"num_workers": 3, "run_name": "x"})
    run.build(config, Ranks(), heard.append, place.verifier)
    said = [event.text for event in heard if isinstance(event, Note) and "has no effect" in event.text]
    assert said == [
        "--num-workers has no effect: states are computed in process",
        "--run-name has no effect: there is no --logger",
    ]


def test_maps_of_another_vocabulary_beside_a_checkpoint_are_refused(place, tmp_path):
    other = torch.zeros(64, dtype=torch.bool)
    other[20:32] = True
    torch.save(other, tmp_path / "t2d.pt")
    torch.save(torch.full((12,), 20), tmp_path / "d2t.pt")
    maps = {"d2t_path": str(tmp_path / "d2t.pt"), "t2d_path": str(tmp_path / "t2d.pt")}
    config = config_with(place, {"from_pretrained": place.checkpoint}, maps)
    with pytest.raises(ValueError, match="--d2t-path and --t2d-path are another draft vocabulary"):
        run.build_model(config, None)


@pytest.mark.parametrize("algorithm", ["eagle", "medusa", "mlp", "mtp", "peagle"])
def test_keys_that_mean_nothing_to_an_algorithm_are_refused(algorithm):
    for key in SpeculatorModel.get_class(algorithm).unread_keys:
        given = {"speculator_type": algorithm, "verifier_name_or_path": "m", key: [1, 2] if "layer_ids" in key else 3}
        if key == "draft_attn_impl":
            given[key] = "sdpa"
        elif key.endswith("_path"):
            given |= {"d2t_path": "a", "t2d_path": "b", key: "c"}
        with pytest.raises(ConfigError, match=f"'{algorithm}' has no use for it: leave out .*{flag_of(key)}"):
            TrainConfig.from_sources(cli=given)


# -- every drafter, as far as its configuration ------------------------------------------------------------------------

NO_CONFIDENCE = {"enable_confidence_head": False}
DEPENDENT = [  # drafter, what makes the key mean nothing, the key, why
    ("eagle", {"top_k_weight": 0}, {"top_k": 5}, "--top-k-weight is 0"),
    ("eagle", {"distillation_weight": 0}, {"loss_fn": "ce"}, "--distillation-weight is 0"),
    ("eagle", {"ttt_steps": 1}, {"detach_steps": False}, "--ttt-steps is 1"),
    ("eagle3", {"ttt_steps": 1}, {"ttt_step_loss_decay": 0.5}, "--ttt-steps is 1"),
    ("medusa", {"num_heads": 1}, {"head_weight_decay": 0.5}, "there is one head"),
    ("mlp", {"n_predict": 1}, {"head_weight_decay": 0.5}, "there is one step"),
    ("mtp", {"num_speculative_steps": 1}, {"step_weight_beta": 0.5}, "there is one step"),
    ("peagle", {"num_depths": 1}, {"down_sample_ratio": 0.5}, "--num-depths is 1"),
    ("peagle", {"num_depths": 1}, {"down_sample_ratio_min": 0.5}, "--num-depths is 1"),
    ("peagle", {"num_depths": 1}, {"max_anchors": 5}, "--num-depths is 1"),
    ("dflash", {"per_position_loss_weight": "fixed-exp-decay"}, {"dpace_alpha": 0.3}, "loss-weight is not dpace"),
    ("dflash", {"per_position_loss_weight": "dpace"}, {"dflash_decay_gamma": 3}, "loss-weight is dpace"),
    (
        *("dflash", {"num_layers": 2, "full_attention_indices": [0, 1]}),
        *({"sliding_window_non_causal": True}, "every layer has full attention"),
    ),
    ("dspark", {}, {"dpace_alpha": 0.3}, "loss-weight is not dpace"),
    ("dspark", {"per_position_loss_weight": "dpace", **NO_CONFIDENCE}, {"dflash_decay_gamma": 3}, "no confidence head"),
    ("dspark", {"markov_rank": 0}, {"markov_head_type": "rnn"}, "leaves no Markov head"),
    ("dspark", {"markov_rank": 0}, {"confidence_head_with_markov": False}, "leaves no Markov head"),
    ("dspark", NO_CONFIDENCE, {"confidence_head_with_markov": False}, "leaves no confidence head"),
    ("dspark", NO_CONFIDENCE, {"confidence_head_alpha": 0.5}, "leaves no confidence head"),
    ("dspark", NO_CONFIDENCE, {"confidence_target": "greedy"}, "leaves no confidence head"),
]


@pytest.mark.parametrize(("algorithm", "without", "given", "because"), DEPENDENT)
def test_a_key_that_means_nothing_without_another_is_refused(algorithm, without, given, because):
    [(key, value)] = given.items()
    base = {"speculator_type": algorithm, "verifier_name_or_path": "m"}
    with pytest.raises(ConfigError, match=f"{because}.*: leave out {flag_of(key)}"):
        TrainConfig.from_sources(cli={**base, **without, **given})
    with_another = {"per_position_loss_weight": "dpace"} if key == "dpace_alpha" else {}
    if key == "dflash_decay_gamma":
        with_another = {"per_position_loss_weight": "fixed-exp-decay"}
    assert TrainConfig.from_sources(cli={**base, **with_another, **given}).flatten()[key] == value
    by_hand = TrainConfig.from_flat({**base, **without, **given})  # one dict for all drafters: said, not refused
    assert because in by_hand.idle[key]
    assert key not in yaml.safe_load(by_hand.dump_yaml()).get(algorithm, {})


ALONE = {  # what a key needs to mean something
    "dpace_alpha": {"per_position_loss_weight": "dpace"},
    "dflash_decay_gamma": {"per_position_loss_weight": "fixed-exp-decay"},
    "d2t_path": {"t2d_path": "t"},
    "t2d_path": {"d2t_path": "d"},
    "muon_momentum": {"optimizer": "muon"},
    "scheduler_num_cosine_cycles": {"scheduler_type": "cosine"},
    "token_freq_path": {"draft_vocab_size": 11},
    "estimate_ranks": {"estimate": True},
}


def reading_alone(name: str, key: str, place: SimpleNamespace) -> str:
    """Returns what the table says of a key given alone (with what it needs), and shows the configuration to do so."""
    algorithm = Algorithm(name)
    model = next(keys for keys in (algorithm.keys, RunKeys, *GROUPS.values()) if key in keys.model_fields)
    value = example(key, place, name, model.model_fields[key])
    needed = {"optimizer": "muon"} if key.startswith("muon_") else ALONE.get(key, {})
    base = {"verifier_name_or_path": "m", "speculator_type": name}
    given = {**base, **needed, key: value}
    outcome, because = algorithm.reading(key, {**TrainConfig.from_sources(cli=base).flatten(), **given})
    if key in getattr(algorithm.keys, "command_line_only", ()):
        outcome, because = REFUSED, "leave this key out"
    if outcome == REFUSED:
        with pytest.raises(ConfigError, match=flag_of(key)) as raised:
            TrainConfig.from_sources(cli=given)
        assert because in str(raised.value)
        return outcome
    config = TrainConfig.from_sources(cli=given)
    assert config.flatten()[key] == value, key
    assert config.idle.get(key, "") == (because if outcome == IDLE else "")
    return outcome


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_key_of_every_drafter_is_used_refused_or_said_to_be_idle(place, name):
    algorithm = SpeculatorModel.get_class(name)
    own, generic = set(algorithm.training_args.model_fields), set(group_of())
    outside = {"speculator_type", "plugins", "verifier_name_or_path"}
    outcomes = {key: reading_alone(name, key, place) for key in (own | generic) - outside}
    refused = {key for key, outcome in outcomes.items() if outcome == REFUSED}
    shapes = set(getattr(algorithm.training_args, "command_line_only", ()))
    assert refused == (set(algorithm.unread_keys) | shapes) - outside
    assert {key for key, outcome in outcomes.items() if outcome == IDLE} & own == (
        {"norm_output"} if name == "peagle" else set()
    )
    assert EQUAL not in outcomes.values()


def test_a_directory_of_states_that_is_not_there_is_not_passed_over(place):
    config = config_with(place, {}, {"hidden_states_path": str(place.folder / "nowhere")})
    with pytest.raises(ValueError, match=r"--hidden-states-path .*nowhere does not exist: correct it"):
        run.build(config, Ranks(), lambda event: None, place.verifier)


def test_a_verifier_without_attention_is_refused_before_the_data_is_read(tmp_path):
    MambaConfig(hidden_size=16, num_hidden_layers=6, vocab_size=64).save_pretrained(tmp_path)
    config = TrainConfig.from_sources(cli={"verifier_name_or_path": str(tmp_path), "data_path": "/nowhere"})
    with pytest.raises(ValueError, match=r"is a mamba and has no attention heads.*--draft-config.*hidden_size 16"):
        run.build(config, Ranks(), lambda event: None)
