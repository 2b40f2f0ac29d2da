"""Checkpoints that are whole, a disk that refuses, SIGTERM, hung steps, clocks that are set, and ranks that differ."""

import errno
import json
import math
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from truthward.errors import Interrupted, TrainingFault
from truthward.guard import ranks, rules
from truthward.guard.interruptions import Watchdog, stop_on_request
from truthward.guard.storage import damage, newest_whole, refusal
from truthward.guard.watch import Guard
from truthward.ledger import Run
from truthward.tables import Guard as Table


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


# --------------------------------------------------------------------------------------------------------------- storage


def checkpoint(folder):
    folder.mkdir(parents=True)
    save_file({"a": torch.arange(100.0), "b": torch.zeros(0)}, folder / "weights.safetensors")
    save_file({}, folder / "empty.safetensors")
    torch.save({"state": {}, "x": torch.ones(50)}, folder / "optimizer.pt")
    (folder / "progress.json").write_text('{"step": 3}')
    (folder / "note.txt").write_text("")
    return folder


def test_a_whole_checkpoint_has_no_damage(tmp_path):
    assert damage(checkpoint(tmp_path / "c")) == ""


@pytest.mark.parametrize("name", ["weights.safetensors", "empty.safetensors", "optimizer.pt", "progress.json"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_file_cut_anywhere_is_found(tmp_path, name, share):
    file = checkpoint(tmp_path / "c") / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert damage(tmp_path / "c").startswith(f"{name} is cut off")


def test_damaged_checkpoints_are_put_aside_and_the_one_before_is_taken(run):
    folders = [checkpoint(run.path / "checkpoints" / f"iteration-0000{n}") for n in (1, 2, 3)]
    for folder in folders[1:]:
        (folder / "progress.json").write_text("{")
    (run.path / "checkpoints" / "damaged-iteration-00003").mkdir()  # from an earlier time
    assert newest_whole(folders, run) == folders[0]
    names = {p.name for p in folders[0].parent.iterdir()}
    assert names == {"iteration-00001", "damaged-iteration-00002", "damaged-iteration-00003", "damaged-iteration-00003.1"}
    assert [(i["kind"], i["step"]) for i in run.manifest["incidents"]] == [
        ("damaged checkpoint", 3),
        ("damaged checkpoint", 2),
    ]
    assert newest_whole([], run) is None


def test_a_refusal_of_the_disk_is_told_from_other_errors(tmp_path):
    assert "No space" in refusal(OSError(errno.ENOSPC, "No space left on device"))
    assert refusal(ValueError("Error while serializing: I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.EROFS, "Read-only file system")
    assert "Read-only" in refusal(wrapped)
    assert refusal(FileNotFoundError(errno.ENOENT, "No such file")) == ""
    assert refusal(ValueError("I/O error: not found (os error 2)")) == ""
    assert refusal(zipfile.BadZipFile("nothing")) == ""


# ---------------------------------------------------------------------------------------------------- SIGTERM, hung steps


def test_sigterm_only_makes_a_request(run):
    guard = Guard(Table(), run, rules.TRAINER)
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_request() as request:
        request.obey(guard, 3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
        with pytest.raises(Interrupted, match="after step 4"):
            request.obey(guard, 4)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [(i["kind"], i["step"]) for i in run.manifest["incidents"]] == [("interrupted", 4)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_limit_of_a_step(run):
    """Twenty times the median step, but never less than hang_seconds."""
    clock = Clock()
    guard = Guard(Table(hang_seconds=60.0, hang_factor=20.0), run, rules.TRAINER)
    with Watchdog(guard, clock=clock, end=lambda code: None) as dog:
        assert dog.limit == 60
        for step, seconds in enumerate((1, 1, 2, 30), 1):
            clock.now += seconds
            dog.beat(step)
        assert list(dog.steps) == [1, 1, 2, 30]
        assert dog.limit == 60
        for step in range(5, 9):
            clock.now += 10
            dog.beat(step)
        assert dog.limit == 20 * 10


def test_a_hung_step_leaves_stacks_and_an_incident_and_ends_the_process(run, capsys):
    ended, clock = threading.Event(), Clock()
    codes = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    guard = Guard(Table(hang_seconds=0.2), run, rules.TRAINER)
    with Watchdog(guard, rank=1, clock=clock, end=end) as dog:
        clock.now = 0.1
        dog.beat(7)
        assert not ended.wait(0.5)  # real time goes by, the clock does not
        clock.now = 60.0
        assert ended.wait(5)
    assert codes == [TrainingFault.exit_code]
    assert "test_a_hung_step" in (run.path / "stacks-rank1.txt").read_text()
    (entry,) = run.manifest["incidents"]
    assert (entry["kind"], entry["step"], entry["stacks"]) == ("hung", 8, "stacks-rank1.txt")
    assert "step 8" in capsys.readouterr().err


def test_a_clock_that_is_set_is_not_time_that_passes(run, monkeypatch):
    """Seconds are of the monotonic clock; on resume, what is not on record is never negative."""
    run.record(status="running")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    run.finish()
    assert 0 <= run.manifest["seconds"] < 60


# ----------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_that_agree_and_ranks_that_do_not():
    weights = [torch.ones(3), torch.tensor([math.nan]), torch.tensor(2.0, dtype=torch.bfloat16)]
    one = ranks.standing(5, "abc", weights)
    assert ranks.disagreement([one, ranks.standing(5, "abc", [w.clone() for w in weights])]) == {}
    moved = [torch.ones(3), torch.tensor([math.nan]), torch.tensor(2.015625, dtype=torch.bfloat16)]
    assert ranks.disagreement([one, one, ranks.standing(5, "abc", moved)])["ranks"] == [2]
    assert ranks.disagreement([one, one, ranks.standing(6, "abc", weights)])["metric"] == "step"
    assert ranks.disagreement([one, ranks.standing(5, "abd", weights)])["metric"] == "fingerprint"


def rank(number: int, folder: str, moved: float) -> None:
    """One of two processes that train side by side; each says how the comparison ended."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    this = Run.find(Path(folder) / str(number))
    this.path.mkdir()
    try:
        ranks.check_ranks(4, [torch.ones(5) + moved * number], this)
        said = "agree"
    except TrainingFault as fault:
        said = str(fault)
    (this.path / "said").write_text(said)
    dist.destroy_process_group()


@pytest.mark.parametrize("moved", [0.0, 1e-7, 1.0])
def test_two_processes_compare_their_weights(tmp_path, moved):
    """1 + 1e-7 is another number in fp32: the last bit counts."""
    torch.multiprocessing.spawn(rank, (str(tmp_path), moved), nprocs=2)
    said = [(tmp_path / str(n) / "said").read_text() for n in (0, 1)]
    if not moved:
        assert said == ["agree", "agree"]
        assert not (tmp_path / "0" / "manifest.json").exists()
    else:
        assert all("differ from the others in weights at step 4" in words for words in said)
        written = json.loads((tmp_path / "0" / "manifest.json").read_text())
        assert [i["kind"] for i in written["incidents"]] == ["ranks disagree"]
        assert not (tmp_path / "1" / "manifest.json").exists()


def test_a_single_process_has_nothing_to_compare(run):
    ranks.check_ranks(4, [torch.ones(5)], run)
    assert run.manifest == {}
