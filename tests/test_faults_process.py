"""Faults of the process and the disk: nothing is lost, and the run ends with the bits of one that nothing disturbed."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_lab import AT, SFT, disturb, found, same
from lab import ROOT, Lab
from ppo_lab import files, lasting, place
from test_ppo_resume import Killed, forked

from rl.ppo import PpoRun
from sft.trainer import LeanSftTrainer
from truthward import stage
from truthward.errors import Interrupted, TrainingFault
from truthward.ledger import Run, plan
from truthward.recipe import load_recipe

# ------------------------------------------------------------------------------------------------------------ the process


def hit(call, at: int = AT) -> None:
    """Let something happen in the middle of a step."""
    compute = LeanSftTrainer.compute_loss
    done: list[int] = []

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == at and not done:
            done.append(at)
            call()
        return compute(self, *args, **kwargs)

    LeanSftTrainer.compute_loss = compute_loss


def start(copy: Lab, disturbance, *more: str) -> int:
    """SFT in a process of its own, as its script runs it; its exit code, or minus the signal that ended it."""

    def work() -> None:
        disturbance()
        os._exit(stage.guarded(lambda: copy.run("sft", *SFT, *more)))

    return forked(work)


def sft_run(copy: Lab) -> Run:
    return Run.load(plan(copy.recipe(*SFT))["sft"].path)


def test_kill_9_loses_nothing(copy, undisturbed):
    assert start(copy, lambda: hit(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    assert same(copy.run("sft", *SFT), undisturbed)


def test_sigterm_ends_the_step_and_writes_a_checkpoint(copy, undisturbed):
    assert start(copy, lambda: hit(lambda: os.kill(os.getpid(), signal.SIGTERM))) == Interrupted.exit_code == 143
    run = sft_run(copy)
    assert run.manifest["status"] == "running"
    assert found(run) == [("interrupted", AT + 1, "stopped after the step")]
    assert (run.path / "checkpoints" / f"checkpoint-{AT + 1}" / "trainer_state.json").exists()
    assert same(copy.run("sft", *SFT), undisturbed)


@pytest.mark.slow
def test_sigterm_to_the_whole_pipeline_reaches_its_stage(tmp_path):
    """``truthward run`` passes it on, waits for the stage's checkpoint, and ends with its exit code."""
    options = [f"runs={tmp_path}", "model.threads=1", 'stages=["base","sft"]', 'evals.models=["base"]', "sft.epochs=2"]
    words = [sys.executable, "-m", "truthward", "run", "recipes/tiny.toml", *options]
    path = plan(load_recipe("recipes/tiny.toml", options))["sft"].path
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True) as process:
        for _ in range(12_000):
            assert process.poll() is None
            if (path / "checkpoints" / "checkpoint-5" / "trainer_state.json").exists():
                break
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == Interrupted.exit_code
    run = Run.load(path)
    ((kind, step, _),) = found(run)
    assert kind == "interrupted"
    assert (path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").exists()


def test_sigterm_ends_an_iteration_of_ppo_and_loses_nothing(lab, tmp_path):
    undisturbed = place(lab, tmp_path / "whole").run("ppo")
    copy = place(lab, tmp_path / "copy")

    def work() -> None:
        score = PpoRun.score

        def scored(self, batch):
            if self.progress.iteration == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return score(self, batch)

        PpoRun.score = scored
        os._exit(stage.guarded(lambda: copy.run("ppo")))

    assert forked(work) == 143
    run = Run.load(plan(copy.recipe())["ppo"].path)
    assert found(run) == [("interrupted", 2, "stopped after the step")]
    resumed = copy.run("ppo")
    assert files(resumed) == files(undisturbed)
    assert lasting(resumed) == lasting(undisturbed)


def test_a_hung_step_ends_the_process_and_loses_nothing(copy, undisturbed):
    """``hang_seconds`` is no part of a fingerprint, so that the same run goes on with others."""
    hasty = ("guard.hang_seconds=3.0", "guard.hang_factor=2.0")
    begun = time.monotonic()
    assert start(copy, lambda: hit(lambda: time.sleep(100)), *hasty) == TrainingFault.exit_code
    assert time.monotonic() - begun < 60
    run = sft_run(copy)
    assert "compute_loss" in (run.path / "stacks-rank0.txt").read_text()
    assert found(run) == [("hung", AT + 1, "stopped")]
    assert 3 < run.manifest["incidents"][0]["seconds"] < 10
    assert same(copy.run("sft", *SFT), undisturbed)


@pytest.mark.parametrize("jump", [1e8, -1e8])
def test_a_clock_that_jumps_changes_nothing(copy, undisturbed, monkeypatch, jump):
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def change(self, inputs, loss):
        offset[0] = jump if self.state.global_step >= AT else 0.0
        return loss()

    disturb(monkeypatch, LeanSftTrainer, change)
    run = copy.run("sft", *SFT)
    assert same(run, undisturbed)
    assert run.manifest["incidents"] == []
    assert 0 <= run.manifest["seconds"] < 300


@pytest.mark.parametrize("jump", [1e8, -1e8])
def test_files_from_another_time_do_not_count_as_time(copy, jump):
    """On resume only what lies between the manifest's last write and the last of all is added, never less than nothing."""
    assert start(copy, lambda: hit(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    run = sft_run(copy)
    for path in run.path.rglob("*"):  # as if all had been written then
        os.utime(path, (time.time() + jump, time.time() + jump))
    assert 0 <= copy.run("sft", *SFT).manifest["seconds"] < 300


# -------------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_cut_in_half_is_put_aside(copy, undisturbed, name):
    assert start(copy, lambda: hit(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    file = sft_run(copy).path / "checkpoints" / "checkpoint-18" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run = copy.run("sft", *SFT)
    assert found(run) == [("damaged checkpoint", 18, "put aside")]
    assert (run.path / "checkpoints" / "damaged-checkpoint-18" / name).exists()
    assert same(run, undisturbed)


def test_a_checkpoint_of_ppo_cut_in_half_is_put_aside(lab, tmp_path, monkeypatch):
    undisturbed = place(lab, tmp_path / "whole").run("ppo")
    copy, score = place(lab, tmp_path / "copy"), PpoRun.score

    def killing(self, batch):
        if self.progress.iteration == 2:
            raise Killed
        return score(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PpoRun, "score", killing)
        with pytest.raises(Killed):
            copy.run("ppo")
    file = plan(copy.recipe())["ppo"].path / "checkpoints" / "iteration-00002" / "shard-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run = copy.run("ppo")
    assert found(run) == [("damaged checkpoint", 2, "put aside")]
    assert files(run) == files(undisturbed)
    assert lasting(run) == lasting(undisturbed)


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(copy, undisturbed, capfd):
    """No file may grow beyond a few kB from some step on: the next checkpoint cannot be written."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    assert start(copy, lambda: hit(full)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    run = sft_run(copy)
    assert (run.manifest["status"], run.manifest["incidents"]) == ("running", [])
    assert {p.name for p in (run.path / "checkpoints").iterdir()} == {"checkpoint-12", "checkpoint-18"}
    assert not [p for p in run.path.rglob(".*") if p.name != ".lock"]
    assert same(copy.run("sft", *SFT), undisturbed)


def read_only(folder: Path) -> None:
    """From now on every write below a folder is refused, as on a disk that was mounted again for reading only."""

    def hook(event: str, args: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        if writes and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(folder)):
            raise OSError(30, "Read-only file system", str(args[0]))

    sys.addaudithook(hook)


@pytest.mark.parametrize("at", [None, AT])
def test_a_read_only_directory_is_said_in_one_line_and_loses_nothing(copy, undisturbed, capfd, at):
    def disturbance() -> None:
        if at is None:
            read_only(copy.runs)
        else:
            hit(lambda: read_only(copy.runs))

    assert start(copy, disturbance) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "Read-only file system" in said[0]
    assert same(copy.run("sft", *SFT), undisturbed)
