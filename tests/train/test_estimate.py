"""What a run is said to need is what it takes."""

import itertools
import json
from importlib.resources import files

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.cli.app import main
from speculators.data_generation import LocalSource
from speculators.nn.decoder import recompute_mlps, recomputes_mlps
from speculators.train.__main__ import main as module_main
from speculators.train.algorithm import ALGORITHMS
from speculators.train.config import TrainConfig
from speculators.train.distributed import Ranks, own_part, ranks_to_estimate
from speculators.train.estimate import estimate_run, records_near
from speculators.train.events import ConfigError, Note, ignore
from speculators.train.memory import LEAST_CHUNK, at_length, chunk_sizes, probe_lengths, random_row
from speculators.train.run import build, build_drafter, estimate, train
from speculators.train.trainer import Trainer
from speculators.utils.util import LiveBytes


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    path = tmp_path_factory.mktemp("verifier")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, max_position_embeddings=4096, **sizes, **heads)).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 rows of 512 tokens, half of them supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (16, 512), generator=generator).tolist()
    rows = [{"input_ids": row, "loss_mask": ([0] * 64 + [1] * 64) * 4, "seq_len": 512} for row in ids]
    path = tmp_path_factory.mktemp("data")
    Dataset.from_list(rows).save_to_disk(path)
    return path


def config_of(algorithm, verifier, data, output, **keys):
    paths = {"verifier_name_or_path": str(verifier), "data_path": str(data), "save_path": str(output)}
    rest = {"speculator_type": algorithm, "total_seq_len": 2048, "epochs": 2, "train_data_ratio": 1.0}
    return TrainConfig.from_flat({**paths, **rest, **keys})


def test_live_bytes_are_those_that_live_at_once():
    kept = torch.zeros(100)
    with LiveBytes([kept]) as counted:
        first = torch.zeros(1000)
        first.view(10, 100).add_(kept)  # in place, and a view: nothing new
        second = first + 1
        del first, second
        torch.zeros(500)
    assert (counted.peak, counted.live) == (8000, 0)


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "medusa", "mtp"])
def test_the_peak_of_a_step_is_what_was_said(algorithm, verifier, data, tmp_path, monkeypatch):
    """On rows twice as long as the longer probe, in bf16: the tensors that two optimizer steps of the trainer make, and
    those that are there before. Closer than 1.15 either way."""
    monkeypatch.setattr("speculators.train.memory.PROBE_TOKENS", 256)
    keys = {"total_seq_len": 1024} | ({"max_anchors": 64, "block_size": 4} if algorithm == "dflash" else {})
    drafter = build(config_of(algorithm, verifier, data, tmp_path / "run", **keys), Ranks(), ignore)
    trainer, said = drafter.trainer, drafter.memory()
    batches = [dict(batch) for batch, _ in zip(trainer.train_loader.batches(), range(2), strict=False)]
    there = [*trainer.model.parameters(), *trainer.model.buffers()]
    before = sum(tensor.numel() * tensor.element_size() for tensor in there)
    with LiveBytes([*there, *(tensor for batch in batches for tensor in batch.values())]) as counted:
        for batch in batches:
            trainer.backward(batch, is_last=True)
            trainer.step()
    states = sum(batches[0][name].nbytes for name in batches[0] if "hidden_states" in name)
    verifier_bytes = sum(param.nbytes for param in drafter.verifier.parameters())
    measured = before + counted.peak + states + verifier_bytes
    assert measured / 1.15 < said.total_bytes < measured * 1.15
    assert said.states_bytes == states and said.verifier_bytes == verifier_bytes


def allocated_at_most(run):
    """Bytes that the allocator gave out at once, of those given inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(("shards", "rows_a_step"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_what_each_of_several_ranks_holds_was_said(shards, rows_a_step, verifier, data, tmp_path):
    """Of eagle3 in bf16: weights, moments and the allocator's peak in a later step of rank 0, by what FSDP2 and
    DistributedDataParallel (whose buckets were there before the step) allocate themselves."""
    keys = {"total_seq_len": 256, "gradient_accumulation_steps": rows_a_step, "fsdp_shard": shards}
    config = config_of("eagle3", verifier, data, tmp_path / "run", **keys)
    with ranks_to_estimate(2, 60.0) as ranks:
        drafter = build_drafter(config, ranks, ignore)
        trainer, said = drafter.trainer, drafter.memory()
        row = random_row(trainer.model, config, 256, drafter.hidden_size, 0.5)

        def step():
            for number in range(rows_a_step):
                trainer.backward(row, is_last=number + 1 == rows_a_step)
            trainer.step()

        step()
        peak = allocated_at_most(step)
        held = [own_part(param) for param in trainer.params]
        kept = [state for optimizer in trainer.optimizers.optimizers for state in optimizer.state.values()]
        moments = sum(own_part(value).nbytes for state in kept for value in state.values())
    whole = sum(param.numel() for param in trainer.params) * 4
    assert said.weights_bytes == sum(part.numel() for part in held) * 4 == (whole / 2 if shards else whole)
    assert said.optimizer_bytes == pytest.approx(moments, rel=0.001)
    buckets = 0 if shards else whole
    told = said.gradients_bytes + said.activations_bytes
    assert told / 1.05 < buckets + peak < told * 1.05


def gradients(trainer, row):
    trainer.parallel.module.train()
    torch.manual_seed(0)
    loss, _ = trainer.forward(trainer.parallel.module, row, trainer.config.train_call_kwargs)
    loss.backward()
    found = [param.grad for param in trainer.params if param.grad is not None]
    trainer.optimizers.zero_grad()
    return loss.detach(), *found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_chunks_change_the_last_bits_and_recomputing_changes_none(algorithm, verifier, data, tmp_path):
    """Of loss and gradients in fp32, for chunks of one row (16), some and the device's own choice."""
    keys = {"total_seq_len": 128, "hidden_states_dtype": "float32"}
    config = config_of(algorithm, verifier, data, tmp_path / "run", **keys)
    trainer = build_drafter(config, Ranks(), ignore).trainer
    row = random_row(trainer.model, config, 128, 64, 0.5)
    whole = gradients(trainer, row)
    for trainer.chunk_elements in (1, 40 * 1024):
        torch.testing.assert_close(gradients(trainer, row), whole, rtol=2e-5, atol=2e-6)
    trainer.chunk_elements = None
    if recompute_mlps(trainer.model):
        again = gradients(trainer, row)
        assert all(torch.equal(*pair) for pair in zip(again, whole, strict=True))
    else:
        assert algorithm in ("medusa", "mlp")


def test_a_drafter_recomputes_where_it_was_asked_to_or_refuses(verifier, data, tmp_path):
    keys = {"total_seq_len": 128, "gradient_checkpointing": True}
    drafter = build_drafter(config_of("mtp", verifier, data, tmp_path / "run", **keys), Ranks(), ignore)
    assert recomputes_mlps(drafter.trainer.model)
    with pytest.raises(ValueError, match="MedusaDraftModel has no feed-forward layer to recompute; leave it out"):
        build_drafter(config_of("medusa", verifier, data, tmp_path / "other", **keys), Ranks(), ignore)


def test_a_limit_picks_what_fits_and_refuses_what_cannot(verifier, data, tmp_path):
    """First the chunks shrink, then feed-forward layers recompute; a step of the trainer stays under the limit."""
    keys = {"total_seq_len": 256, "vllm_endpoint": "http://localhost:1/v1"}

    def limited(limit_bytes):
        config = config_of("eagle3", verifier, data, tmp_path / "run", **keys, max_memory=f"{limit_bytes}")
        heard = []
        drafter = build_drafter(config, Ranks(), heard.append)
        [said] = [event.text for event in heard if isinstance(event, Note) and "--max-memory" in event.text]
        return drafter, drafter.memory(), said

    free = build_drafter(config_of("eagle3", verifier, data, tmp_path / "run", **keys), Ranks(), ignore).memory()
    drafter, fitted, said = limited(free.total_bytes)
    assert fitted == free and drafter.trainer.chunk_elements is None and "chunks as without it" in said

    drafter, fitted, said = limited(free.total_bytes - 1)
    chosen = drafter.trainer.chunk_elements
    assert fitted.total_bytes < free.total_bytes and chosen < 1 << 22 and f"chunks of {chosen:,} logits" in said
    assert not recomputes_mlps(drafter.trainer.model)

    drafter.trainer.chunk_elements = LEAST_CHUNK
    smallest = drafter.memory().total_bytes
    drafter, fitted, said = limited(smallest - 1)
    assert fitted.total_bytes < smallest and recomputes_mlps(drafter.trainer.model) and "recomputed" in said
    trainer = drafter.trainer
    row = random_row(trainer.model, drafter.config, 256, 64, 0.5)
    there = [*trainer.model.parameters(), *trainer.model.buffers(), *row.values()]
    with LiveBytes(there) as counted:
        for _ in range(2):
            trainer.backward(row, is_last=True)
            trainer.step()
    before = sum(tensor.nbytes for tensor in there)
    assert before + counted.peak < 1.05 * smallest

    with pytest.raises(ValueError, match=r"total-seq-len 256 takes .* Ways out: a smaller --total-seq-len, --fsdp"):
        limited(smallest // 2)
    with pytest.raises(ValueError, match=r"What stays between .* Ways out: --fsdp-shard .* --draft-vocab-size"):
        limited(1000)
    with pytest.raises(ConfigError, match="--max-memory much: 'much' is no number of bytes"):
        limited("much")


def test_chunks_are_tried_until_they_cannot_shrink_and_each_size_once(verifier, data, tmp_path, monkeypatch):
    """Chunks have 16 rows at least, here of 1,024 logits. And a device that cannot hold any step is said to be one."""
    assert chunk_sizes(1 << 18, 100_000) == [1 << 18, 1 << 17, 100_000]
    assert chunk_sizes(1 << 16, 1 << 16) == chunk_sizes(1 << 16, 1 << 20) == [1 << 16]
    tried, forward = [], Trainer.forward

    def forward_without_memory(self, *args):
        tried.append(self.chunk_elements)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def counted_forward(self, *args):
        tried.append(self.chunk_elements)
        return forward(self, *args)

    monkeypatch.setattr("speculators.train.memory.LEAST_CHUNK", 1)
    monkeypatch.setattr(Trainer, "forward", counted_forward)
    keys = {"total_seq_len": 256, "max_memory": "1TB", "vllm_endpoint": "http://localhost:1/v1"}
    estimate_run(build_drafter(config_of("eagle3", verifier, data, tmp_path / "run", **keys), Ranks(), ignore))
    assert tried == [None, None]  # to fit and to estimate: a step whose bytes are counted and one that is timed
    tried.clear()
    monkeypatch.setattr(Trainer, "forward", forward_without_memory)
    with pytest.raises(ValueError, match=r"no memory left for a step on a row of --total-seq-len 256. Ways out: a sm"):
        build_drafter(config_of("eagle3", verifier, data, tmp_path / "run", **keys), Ranks(), ignore)
    assert tried == [None, 16 * 1024, None, 16 * 1024]  # without and with recomputing


def test_under_a_limit_a_step_that_the_card_cannot_hold_is_one_that_does_not_fit(verifier, data, tmp_path, monkeypatch):
    """The allocator refuses chunks above 2^18 logits; what the failed steps left is gone."""
    forward = Trainer.forward

    def forward_on_a_small_card(self, *args):
        found = forward(self, *args)
        if (self.chunk_elements or 1 << 22) > 1 << 18:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    keys = {"total_seq_len": 256, "max_memory": "1TB"}
    free = build_drafter(config_of("eagle3", verifier, data, tmp_path / "run", **keys), Ranks(), ignore)
    monkeypatch.setattr(Trainer, "forward", forward_on_a_small_card)
    drafter = build_drafter(config_of("eagle3", verifier, data, tmp_path / "run", **keys), Ranks(), ignore)
    assert drafter.trainer.chunk_elements == 1 << 18
    assert torch.equal(drafter.trainer.ranks.random_state()["cpu"], free.random_state["cpu"])
    assert all(param.grad is None for param in drafter.trainer.params)


def test_a_limited_run_continues_with_the_same_bits(verifier, data, tmp_path):
    keys = {"total_seq_len": 256, "contract_check": False, "parity_gate": False, "scheduler_type": "none"}
    keys |= {"allow_changed_settings": True, "train_data_ratio": 0.5}
    free = estimate(config_of("eagle3", verifier, data, tmp_path / "run", **keys)).memory.total_bytes
    keys["max_memory"] = f"{free - 1}"
    train(config_of("eagle3", verifier, data, tmp_path / "whole", **keys, max_steps=4))
    for max_steps in (2, 4):
        train(config_of("eagle3", verifier, data, tmp_path / "parts", **keys, max_steps=max_steps))
    whole, parts = (load_file(tmp_path / name / "0" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_is_said_without_the_verifier_is_what_it_takes(verifier, data, tmp_path, monkeypatch):
    """Nothing is trained, written or loaded."""
    monkeypatch.setattr("speculators.train.run.load_verifier", lambda *args, **keys: pytest.fail("loads the verifier"))
    monkeypatch.setattr(LocalSource, "read", lambda *args: pytest.fail("computes states"))
    config = config_of(
        "eagle3", verifier, data, tmp_path / "run", total_seq_len=512, cache_hidden_states=True, peak_tflops=2.0
    )
    found = estimate(config)
    assert not (tmp_path / "run").exists()
    assert (found.num_steps, found.tokens_per_epoch, found.supervised_per_epoch) == (32, 16 * 512, 16 * 256)
    assert found.num_trained_tokens == 2 * 16 * 256
    memory = found.memory
    assert memory.states_bytes == 512 * 4 * 64 * 2 and found.stored_states_bytes == 16 * memory.states_bytes
    assert memory.gradients_bytes == memory.weights_bytes and memory.verifier_bytes > 0 and found.step_s > 0
    assert found.step_flop == found.probes[0].model_flop > 0 and found.floor_s == found.step_flop / 2e12
    assert f"{found.step_flop / 1e12:.3g} TFLOP per step, {found.floor_s:.3g} s at the card's peak" in str(found)
    assert found.disk_bytes == 2 * memory.checkpoint_bytes + found.stored_states_bytes
    assert [probe.num_tokens for probe in found.probes] == [512]
    assert "no record of eagle3 near 8,192 tokens" in found.sentence()


@pytest.mark.parametrize(
    ("keys", "num_checkpoints", "num_epochs"),
    [
        ({"epochs": 4, "checkpoint_freq": 0.25}, 4, 4),  # a later one of an epoch replaces the one before
        ({"epochs": 6, "checkpoint_freq": 2}, 4, 6),  # 0, 2, 4 and the last
        ({"epochs": 4, "max_steps": 5}, 2, 2),
        ({"epochs": 4, "save_best": True, "train_data_ratio": 0.5}, 1, 4),
    ],
)
def test_as_many_checkpoints_are_said_as_a_run_leaves(verifier, data, tmp_path, keys, num_checkpoints, num_epochs):
    """Of four steps per epoch."""
    config = config_of("medusa", verifier, data, tmp_path / "run", **keys, contract_check=False, parity_gate=False)
    found = estimate(config)
    assert (found.num_checkpoints, found.num_epochs) == (num_checkpoints, num_epochs)
    train(config)
    assert len([path for path in (tmp_path / "run").iterdir() if path.name.isdigit()]) == num_checkpoints


def test_every_door_estimates_and_trains_nothing(verifier, data, tmp_path, capsys):
    words = ["--estimate", "--verifier", str(verifier), "--data", str(data), "--output", str(tmp_path / "run")]
    assert module_main([*words, "--speculator-type", "medusa", "--total-seq-len", "256"]) == 0
    assert "memory of each rank" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_command_prints_tables_or_json(verifier, data, tmp_path, capsys):
    words = ["train", "--estimate", "--verifier", str(verifier), "--data", str(data), "--output", str(tmp_path / "run")]
    assert main([*words, "--speculator-type", "medusa", "--total-seq-len", "256", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["estimates"]
    assert found["memory"]["total_bytes"] > found["memory"]["weights_bytes"] > 0
    assert found["time_s"] == pytest.approx(found["step_s"] * found["num_steps"])
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_the_same_memory(verifier, data, tmp_path):
    config = config_of("eagle3", verifier, data, tmp_path / "run", total_seq_len=256, dry_run=True)
    heard = []
    train(config, on_event=heard.append)
    memory = estimate(config_of("eagle3", verifier, data, tmp_path / "other", total_seq_len=256)).memory
    assert Note(str(memory)) in heard


def test_the_value_at_a_length_is_on_the_line():
    assert at_length([(512, 3.0)], 512) == 3.0
    assert at_length([(512, 3.0), (1024, 5.0)], 2048) == 9.0
    assert probe_lengths(1024, 0, 0.5) == [1024] and probe_lengths(8192, 0, 0.5) == [512, 1024]
    assert probe_lengths(8192, 512, 0.5) == [1280, 2560] and probe_lengths(2048, 512, 0.5) == [2048]


def test_records_name_their_command_and_are_near():
    records = json.loads(files("speculators.assets").joinpath("acceptance.json").read_text())
    told = {"verifier", "data", "on_policy", "command"}
    fields = told | {"speculator_type", "num_trained_tokens", "num_drafts", "acceptance_length"}
    assert records and all(set(record) == fields and record["command"] for record in records)
    assert all(1.0 <= record["acceptance_length"] <= record["num_drafts"] + 1 for record in records)
    [first, *_] = records
    assert first in records_near(first["speculator_type"], first["num_trained_tokens"] * 3)
    assert first not in records_near(first["speculator_type"], first["num_trained_tokens"] * 5)
    assert records_near("no_such_algorithm", 100_000) == []
