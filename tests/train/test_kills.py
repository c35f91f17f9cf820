"""A run that was killed anywhere and continued by the same command leaves, byte for byte, what it would have left, and
nothing else; its curve has no gap.

`make kills` kills eight kinds of run before every change that they make to their directory, before every step of their
optimizers, and 20 times at random each (half an hour); the tests kill before one change of each kind. Random kills are
drawn anew each time there: SPECULATORS_KILLS_SEED, which they print, draws the same again.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from killed_runs import ENDED_BY_ANOTHER_RANK, ERROR, KILLED, STOPPED_BY_SIGNAL, Ended, Run, RunServer
from torch.distributed.checkpoint import FileSystemReader

from speculators.train.events import PACE

EVERYTHING = os.environ.get("SPECULATORS_KILLS") == "all"
NUM_RANDOM = 20 if EVERYTHING else 2
SEED = int(os.environ.get("SPECULATORS_KILLS_SEED", random.randrange(10**6) if EVERYTHING else 0))
WRITING, TRAINING, ELSEWHERE = "inside the write of a checkpoint", "between two steps", "elsewhere"
SOON_S = 10.0
"""Between the event and the end of the last rank; it is a tenth of a second on an idle machine."""
ALGORITHMS: dict[str, dict[str, Any]] = {"eagle3": {}, "dflash": {"block_size": 4}}
MATRIX = [
    (algorithm, optimizer, num_ranks)
    for num_ranks in (1, 2)
    for algorithm in ALGORITHMS
    for optimizer in ("adamw", "muon")
]
IN_TESTS = [("eagle3", "muon", 1, 1), ("dflash", "adamw", 1, 2), ("dflash", "muon", 2, 5)]
"""With the share of places: every one, every second or every fifth."""


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed: how to start it, and what it leaves."""

    run: Run
    contents: dict[str, Any]
    curve: dict[tuple[str, int], list[float]]
    places: list[list[str]]
    """By rank."""
    time_s: float

    @property
    def root(self) -> Path:
        return Path(self.run.settings["save_path"])

    def number_of(self, place: str, occurrence: int = 1, rank: int = 0) -> int:
        return [number for number, name in enumerate(self.places[rank], start=1) if name == place][occurrence - 1]


@pytest.fixture(scope="module")
def serve():
    server = RunServer([str(Path(__file__).parents[2] / "src")])
    yield server
    server.close()


@pytest.fixture(scope="module")
def make_whole(serve, tmp_path_factory, verifier_path, data_path):
    """Makes the undisturbed run of a kind once."""
    made: dict[tuple, Whole] = {}

    def make(algorithm: str, optimizer: str, num_ranks: int, **changes: Any) -> Whole:
        key = (algorithm, optimizer, num_ranks, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("killed")
            settings = {
                **ALGORITHMS[algorithm],
                "speculator_type": algorithm,
                "verifier_name_or_path": str(verifier_path),
                "data_path": str(data_path),
                "save_path": str(folder / "run"),
                "optimizer": optimizer,
                "num_layers": 1,
                "target_layer_ids": [1, 3, 5],
                "max_anchors": 6,  # fewer than there are: every step draws
                "total_seq_len": 64,
                "epochs": 2,
                "checkpoint_freq": 0.5,  # the end of an epoch replaces the directory of its middle
                "train_data_ratio": 0.8,
                "hidden_states_dtype": "float32",
                "rank_timeout": 10,
                "parity_gate": False,
                "contract_check": False,
                **changes,
            }
            run = Run(settings, str(folder / "notes"), num_ranks)
            ended = serve(run)
            assert ended.codes == [0] * num_ranks, ended.output
            places = [Path(run.notes, f"places{rank}.txt").read_text().splitlines() for rank in range(num_ranks)]
            root = Path(settings["save_path"])
            made[key] = Whole(run, contents(root), curve(run), places, ended.time_s)
        return made[key]

    return make


def contents(root: Path) -> dict[str, Any]:
    """Everything in a directory: files by bytes, links by targets, directories; the curve without its speeds."""
    return {str(entry.relative_to(root)): content(entry) for entry in root.rglob("*")}


def content(entry: Path) -> Any:
    if entry.is_symlink():
        return os.readlink(entry)
    if entry.is_dir():
        return "directory"
    if entry.name == "metrics.jsonl":
        lines = [json.loads(line) for line in entry.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in PACE} for line in lines]
    if entry.name == ".metadata":  # of parts; each has a random number of its own
        metadata = FileSystemReader(entry.parent).read_metadata()
        return metadata.state_dict_metadata, metadata.storage_data
    if entry.name == "checksums.json":
        recorded = json.loads(entry.read_text())["crc32"]
        return {name: crc for name, crc in recorded.items() if not name.endswith(".metadata")}
    return entry.read_bytes()


def curve(run: Run) -> dict[tuple[str, int], list[float]]:
    """Returns (training or validation, step) -> learning rate and loss, each the same however often it was reported."""
    points: dict[tuple[str, int], list[float]] = {}
    for line in Path(run.notes, "curve.jsonl").read_text().splitlines():
        kind, step, *values = json.loads(line)
        assert points.setdefault((kind, step), values) == values, f"{kind} at step {step} differs after a resume"
    return points


def begin_anew(whole: Whole) -> None:
    shutil.rmtree(whole.root, ignore_errors=True)
    Path(whole.run.notes, "curve.jsonl").unlink(missing_ok=True)


def assert_continues_to_the_same_end(
    serve: Callable[[Run], Ended], whole: Whole, at: str, beside: Sequence[str] = ()
) -> None:
    """Runs the command to its end. `beside`: directories that it may leave beside those of the undisturbed run."""
    ended = serve(whole.run)
    assert ended.codes == [0] * whole.run.num_ranks, f"{at}: {ended.output}"
    assert_is_the_same_end(whole, at, beside)


def assert_is_the_same_end(whole: Whole, at: str, beside: Sequence[str] = ()) -> None:
    for name in beside:
        shutil.rmtree(whole.root / name)
    left = contents(whole.root)
    assert left.keys() == whole.contents.keys(), at
    assert [name for name in left if left[name] != whole.contents[name]] == [], at
    assert curve(whole.run) == whole.curve, at


def kill(serve: Callable[[Run], Ended], run: Run) -> Ended:
    """Starts the command and kills the rank `run.who`, if it gets so far; checks that all others end soon.

    A rank that was killed before it had met the others is missed after `rank_timeout` only.
    """
    ended = serve(run)
    if ended.codes != [0] * run.num_ranks:
        others = {code for rank, code in enumerate(ended.codes) if rank != run.who}
        assert ended.codes[run.who] == KILLED and others <= {ENDED_BY_ANOTHER_RANK, 0}, f"{run}: {ended}"
        assert run.place is None or ended.time_s < SOON_S, f"{run}: {ended}"
    return ended


@pytest.mark.parametrize(("algorithm", "optimizer", "num_ranks", "share"), IN_TESTS)
def test_killed_at_every_kind_of_place_a_run_ends_as_if_nothing_had_happened(
    serve, make_whole, algorithm, optimizer, num_ranks, share
):
    """One run after the other dies, each at the first place of another kind, until one of them gets to the end."""
    whole = make_whole(algorithm, optimizer, num_ranks)
    kinds = [(who, place) for who in range(num_ranks) for place in dict.fromkeys(whole.places[who])][::share]
    begin_anew(whole)
    num_killed, at = 0, []
    for who, place in kinds:
        at.append(f"{place} of rank {who}")
        ended = kill(serve, replace(whole.run, event="kill half-written", place=place, who=who))
        num_killed += KILLED in ended.codes
        if KILLED not in ended.codes:
            assert_continues_to_the_same_end(serve, whole, f"killed at {at}")
            begin_anew(whole)
            at = []
    assert_continues_to_the_same_end(serve, whole, f"killed at {at}")
    assert num_killed > 0.8 * len(kinds)


@pytest.mark.skipif(not EVERYTHING, reason="`make kills`: half an hour")
@pytest.mark.parametrize(("algorithm", "optimizer", "num_ranks"), MATRIX)
def test_killed_at_every_place_a_run_ends_as_if_nothing_had_happened(
    serve, make_whole, algorithm, optimizer, num_ranks
):
    whole, num_killed = make_whole(algorithm, optimizer, num_ranks), 0
    for who in range(num_ranks):
        for number, place in enumerate(whole.places[who], start=1):
            for event in ("kill", "kill half-written") if ".partial" in place else ("kill",):
                begin_anew(whole)
                killed = kill(serve, replace(whole.run, event=event, place=number, who=who))
                at = f"{event} of rank {who} before place {number} ({place})"
                assert killed.codes[who] == KILLED, at
                assert_continues_to_the_same_end(serve, whole, at)
                num_killed += 1
    print(f"{algorithm} {optimizer} {num_ranks} ranks: killed {num_killed} times, each time at another place")


@pytest.mark.parametrize(("algorithm", "optimizer", "num_ranks"), MATRIX if EVERYTHING else [("dflash", "muon", 2)])
def test_killed_at_random_times_a_run_ends_as_if_nothing_had_happened(
    serve, make_whole, algorithm, optimizer, num_ranks
):
    whole = make_whole(algorithm, optimizer, num_ranks)
    draw = random.Random(f"{SEED} {algorithm} {optimizer} {num_ranks}")
    died: Counter[str] = Counter()
    while died.total() < NUM_RANDOM:
        begin_anew(whole)
        told = f"SPECULATORS_KILLS_SEED={SEED}: killed"
        for _ in range(draw.randint(1, 3)):
            after_s, who = draw.uniform(0.2, 1.0) * whole.time_s, draw.randrange(num_ranks)
            if KILLED in kill(serve, replace(whole.run, event="kill", after_s=after_s, who=who)).codes:
                places = Path(whole.run.notes, f"places{who}.txt").read_text().splitlines()
                told += f"; rank {who} after {after_s:.3f} s, before its place {len(places) + 1}"
                died[where(whole.root, places)] += 1
        assert_continues_to_the_same_end(serve, whole, told)
    print(f"{algorithm} {optimizer} {num_ranks} ranks: killed at random {dict(died)}, SPECULATORS_KILLS_SEED={SEED}")


def where(root: Path, places: Sequence[str]) -> str:
    """Says where a run died that had passed these places, and left `root` so."""
    if [*root.glob(".*.partial*")]:
        return WRITING
    return TRAINING if places and re.fullmatch(r"(Tensor|AdamW|Muon)\.\w+", places[-1]) else ELSEWHERE


def test_killed_while_it_stores_verifier_states_a_run_ends_as_if_nothing_had_happened(serve, make_whole, tmp_path):
    states = tmp_path / "states"
    whole = make_whole("eagle3", "muon", 1, cache_hidden_states=True, hidden_states_path=str(states))
    stored = contents(states)
    for place in ("os.rename .store.json.partial store.json", "open states-N-N.shard", "Muon.step"):
        begin_anew(whole)
        shutil.rmtree(states)
        assert kill(serve, replace(whole.run, event="kill half-written", place=place)).codes == [KILLED]
        assert any(name.endswith(".partial") for name in contents(states)) == ("rename" in place)
        assert_continues_to_the_same_end(serve, whole, place)
        assert contents(states) == stored


def test_a_rank_that_dies_before_it_met_the_others_ends_them_with_one_error(serve, make_whole):
    whole = make_whole("dflash", "muon", 2)
    begin_anew(whole)
    impatient = replace(whole.run, settings={**whole.run.settings, "rank_timeout": 1})
    ended = serve(replace(impatient, event="kill", who=1))
    assert ended.codes == [ENDED_BY_ANOTHER_RANK, KILLED], ended
    assert "rank 0: another rank ended or did not answer within --rank-timeout" in ended.output
    assert_continues_to_the_same_end(serve, whole, "before the ranks met")


# -- parts of several ranks (--fsdp-shard) -----------------------------------------------------------------------------

PARTS = ".N.partial/sharded_state"
IN_SHARDED = [
    (0, "open .N.partial/.training_record.json.partial"),  # the consolidated file is there, no part is
    (1, f"open {PARTS}/__N_N.distcp"),
    (0, f"open {PARTS}/.metadata.tmp"),  # every part is there
    (1, "Muon.step"),
]


def test_killed_while_the_parts_of_ranks_are_written_a_run_ends_as_if_nothing_had_happened(serve, make_whole):
    """Each of the runs, one after the other, dies at the first such place; the others hear of it and say so."""
    whole = make_whole("dflash", "muon", 2, fsdp_shard=True)
    begin_anew(whole)
    for who, place in IN_SHARDED:
        ended = kill(serve, replace(whole.run, event="kill half-written", place=place, who=who))
        assert ended.codes[who] == KILLED and ended.codes[1 - who] == ENDED_BY_ANOTHER_RANK, f"{place}: {ended}"
        assert f"rank {1 - who}: another rank ended or did not answer within --rank-timeout" in ended.output, place
    assert_continues_to_the_same_end(serve, whole, f"killed at {IN_SHARDED}")


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_a_part_with_a_changed_byte_falls_back_to_the_checkpoint_before_on_all_ranks(serve, make_whole, name):
    """Of data, which torch does not notice; a part of rank 1 is read by rank 1 alone."""
    whole = make_whole("dflash", "muon", 2, fsdp_shard=True)
    if contents(whole.root).keys() != whole.contents.keys():
        assert_continues_to_the_same_end(serve, whole, "before the damage")
    part = whole.root / "1" / "sharded_state" / name
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    ended = serve(whole.run)
    assert ended.codes == [0, 0], ended.output
    assert f"checkpoint {whole.root}/1 cannot be read (sharded_state/{name} has changed" in ended.output
    assert "It is now 1.damaged, and the run continues from the one before" in ended.output
    assert f"continuing from {whole.root}/0 at step" in ended.output
    assert_is_the_same_end(whole, name, beside=("1.damaged",))


# -- other ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("who", "changes"), [(0, {}), (1, {"fsdp_shard": True})])
def test_a_signal_to_one_of_two_ranks_saves_in_the_middle_of_an_epoch_and_ends_both(serve, make_whole, who, changes):
    whole = make_whole("dflash", "muon", 2, **changes)
    begin_anew(whole)
    ended = serve(replace(whole.run, event="SIGTERM", place=whole.number_of("Tensor.backward", 1, rank=who), who=who))
    assert ended.codes == [STOPPED_BY_SIGNAL] * 2 and ended.time_s < SOON_S, ended
    saved = json.loads((whole.root / "interrupted" / "training_state.json").read_text())
    assert saved == {"epoch": 0, "local_step": 1, "global_step": 1}
    assert f"saved {whole.root}/interrupted: run the same command to continue from there" in ended.output
    assert_continues_to_the_same_end(serve, whole, "SIGTERM", beside=("interrupted",))


@pytest.mark.parametrize(
    ("num_ranks", "event", "reason", "who"),
    [
        (1, "full disk", "File too large", 0),
        (1, "read-only", "Permission denied", 0),
        (2, "full disk", "File too large", 0),
        (2, "read-only", "Permission denied", 0),
        (2, "full disk", "rank 1: .*File too large", 1),
    ],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_loses_nothing(
    serve, make_whole, event, reason, num_ranks, who
):
    """Rank 1 writes a part of its own with --fsdp-shard."""
    whole = make_whole("dflash", "muon", 2, **({"fsdp_shard": True} if who else {}))
    whole = whole if num_ranks == 2 else make_whole("eagle3", "muon", 1)
    begin_anew(whole)
    place = f"open {PARTS}/__N_N.distcp" if who else "os.mkdir .N.partial"
    number = whole.number_of(place, 3, rank=who)  # of the second epoch
    ended = serve(replace(whole.run, event=event, place=number, who=who))
    whole.root.chmod(0o755)
    assert ended.codes[0] == ERROR and set(ended.codes[1:]) <= {ERROR, ENDED_BY_ANOTHER_RANK}, ended
    assert ended.time_s < SOON_S
    failed = (
        rf"rank 0: OSError: checkpoint {whole.root}/1 could not be written \(.*{reason}.*older checkpoints are intact"
    )
    assert re.search(failed, ended.output), ended.output
    left = contents(whole.root)
    assert "0/model.safetensors" in left and "epoch0_end" in left
    assert not [name for name in left if name.startswith(("1", ".")) and name != ".run.lock"], left
    assert_continues_to_the_same_end(serve, whole, event)


def test_a_run_in_a_read_only_directory_is_refused_at_once(serve, make_whole):
    whole = make_whole("eagle3", "muon", 1)
    begin_anew(whole)
    whole.root.mkdir()
    ended = serve(replace(whole.run, event="read-only", place=1))
    whole.root.chmod(0o755)
    assert ended.codes == [ERROR] and str(whole.root) in ended.output and "ermission" in ended.output
    assert contents(whole.root) == {}
