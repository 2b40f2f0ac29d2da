"""Resume: a run that was killed, at a step or between any two writes, ends with the same bits as one that was not."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from ppo_lab import SMALL, files, lasting, place, quiet

from rl import actor_critic, state
from rl.ppo import PpoRun
from truthward import models, shards
from truthward.ledger import Run, plan
from truthward.tracking import Tracker

KINDS = {
    "gae-lora": (),
    "lora-from-base": ("ppo.parent=sft",),
    "full": ("ppo.parent=sft", "ppo.tune=full"),
    "grpo-adaptive-ptx": (
        "ppo.advantage=grpo",
        "ppo.group_size=2",
        "ppo.kl_form=k3",
        "ppo.kl_target=0.1",
        "ppo.kl_horizon=50",
        "ppo.warmup_ratio=0.2",
        "ppo.ptx_coef=0.1",
        'ppo.ptx_data=["{home}/demonstrations.jsonl"]',
    ),
}


class Killed(BaseException):
    """Stands in for the power going off."""


def options(lab, kind: str) -> list[str]:
    return [option.format(home=lab.home) for option in KINDS[kind]]


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(kind, lab, tmp_path_factory) -> Run:
    """Three iterations without a break."""
    torch.manual_seed(1)
    return place(lab, tmp_path_factory.mktemp("whole")).run("ppo", *options(lab, kind))


# ------------------------------------------------------------------------------------------------------- at a step


@pytest.mark.parametrize(("iteration", "step"), [(0, "rollout"), (1, "score")])
def test_a_run_that_was_killed_ends_as_one_that_was_not(kind, lab, whole, tmp_path, monkeypatch, iteration, step):
    """Row 42: k iterations, a kill in the next one, resume, N - k: weights, optimizer, progress and metrics bit for bit."""
    copy = place(lab, tmp_path)
    method = getattr(PpoRun, step)

    def killing(self, *args):
        if self.progress.iteration == iteration:
            raise Killed
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PpoRun, step, killing)
        with pytest.raises(Killed):
            copy.run("ppo", *options(lab, kind))
    torch.manual_seed(999)  # a resumed process has another state of every global generator
    resumed = copy.run("ppo", *options(lab, kind))
    assert resumed.manifest["resumed"] == 1
    assert resumed.path.name == whole.path.name
    assert files(resumed) == files(whole)
    assert lasting(resumed) == lasting(whole)


def test_another_run_differs_in_all_that_is_compared(kind, lab, whole, tmp_path):
    """A control: with another weight of the KL the last weights, moments and metrics are others."""
    other = place(lab, tmp_path).run("ppo", *options(lab, kind), "ppo.kl_coef=0.2")
    one, two = files(other), files(whole)
    assert [n for n in one if n.endswith(".safetensors") and one[n] == two[n]] == []
    assert lasting(other) != lasting(whole)


def test_a_kill_between_metrics_and_checkpoint_leaves_no_row_twice(lab, tmp_path, monkeypatch):
    copy, log = place(lab, tmp_path), Tracker.log

    def killing(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", killing)
        with pytest.raises(Killed):
            copy.run("ppo")
    assert [row["step"] for row in lasting(copy.run("ppo"))] == [1, 2, 3]


def test_a_line_of_metrics_that_was_cut_off_is_made_again(lab, tmp_path, monkeypatch):
    copy, log = place(lab, tmp_path), Tracker.log

    def killing(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            self.path.write_text(self.path.read_text()[:-30])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", killing)
        with pytest.raises(Killed):
            copy.run("ppo")
    assert [row["step"] for row in lasting(copy.run("ppo"))] == [1, 2, 3]


def test_progress_is_what_was_saved(lab, tmp_path):
    """Iteration, step, KL coefficient, normalisation and both moments of every parameter come back."""
    copy = place(lab, tmp_path)
    with copy.ppo("ppo.kl_target=1.0", "ppo.kl_horizon=10") as ppo:
        ppo.iterate(quiet)
        state.save(ppo.run, ppo.progress, ppo.trainable, ppo.optimizer)
        moments = {n: ppo.optimizer.state[p] for n, p in ppo.trainable.items()}
    with copy.ppo("ppo.kl_target=1.0", "ppo.kl_horizon=10") as again:
        assert again.progress == ppo.progress
        assert (again.progress.iteration, again.progress.step) == (1, 4)
        assert again.progress.kl_coef != 0.05
        for name, parameter in again.trainable.items():
            assert torch.equal(parameter, ppo.trainable[name])
            found = again.optimizer.state[parameter]
            assert found.keys() == moments[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(found[key], value) for key, value in moments[name].items())


# ----------------------------------------------------------------------------------------------- between any two writes

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ppo.save_file")
SHORT = (*SMALL, "ppo.parent=sft", "ppo.minibatches=1", "ppo.micro_batch_size=4")


def kill_at(number: int, home: Path) -> None:
    """From now on, this process is killed at its n-th change of a file below a folder: kill -9, nothing is tidied up."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event == "open":
            changes = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and _below(args[0], home)
        else:  # shutil.rmtree removes by names relative to a folder that is open
            changes = event in CHANGES and (_below(args[0], home) or not os.path.isabs(os.fsdecode(args[0])))
        if changes:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for module in (shards, actor_critic, models):  # safetensors writes its files unseen by Python
        module.save_file = _announced(module.save_file)


def _below(path: object, home: Path) -> bool:
    return isinstance(path, str | os.PathLike) and str(path).startswith(str(home))


def _announced(save_file):
    def saving(tensors, path):
        sys.audit("ppo.save_file", str(path))
        save_file(tensors, path)
        sys.audit("ppo.save_file", str(path))

    return saving


def forked(work) -> int:
    """Do something in a process of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def record(run: Run) -> dict:
    """The manifest less times, and less how often it was begun."""
    passing = ("seconds", "seconds_before", "session_start", "started", "finished", "peak_memory_gb", "resumed")
    return {k: v for k, v in run.manifest.items() if k not in (*passing, "recipe", "git")}


def leftovers(run: Run) -> set[str]:
    """What stands in the run's folder but hidden scratch."""
    return {p.name for p in run.path.iterdir() if not p.name.startswith(".")}


def kill_and_resume(undisturbed: Run, copy, number: int) -> bool:
    """Kill a run at its n-th change and go on; False where it was over before that."""
    path = plan(copy.recipe(*SHORT))["ppo"].path
    shutil.rmtree(path, ignore_errors=True)

    def dying() -> None:
        kill_at(number, path)
        copy.run("ppo", *SHORT)

    status = forked(dying)
    assert status in (0, -signal.SIGKILL)
    if status == 0:
        return False
    assert forked(lambda: copy.run("ppo", *SHORT)) == 0, f"no resume after change {number}"
    run = Run.load(path)
    assert files(run) == files(undisturbed), f"after change {number}"
    assert lasting(run) == lasting(undisturbed), f"after change {number}"
    assert record(run) == record(undisturbed), f"after change {number}"
    assert leftovers(run) == leftovers(undisturbed), f"after change {number}"
    return True


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory) -> Run:
    return place(lab, tmp_path_factory.mktemp("undisturbed")).run("ppo", *SHORT)


@pytest.mark.parametrize("number", [1, 11, 21, 31, 41])
def test_a_kill_at_some_writes_costs_nothing(lab, undisturbed, tmp_path, number):
    """SIGKILL at the first, the eleventh, … change of a file; the rest are in the slow test."""
    assert kill_and_resume(undisturbed, place(lab, tmp_path), number)


@pytest.mark.slow
def test_a_kill_between_any_two_writes_costs_nothing(lab, undisturbed, tmp_path):
    """SIGKILL at every change of a file, one after the other, until a run gets through."""
    copy, number = place(lab, tmp_path), 1
    while kill_and_resume(undisturbed, copy, number):
        number += 1
    assert number > 40
