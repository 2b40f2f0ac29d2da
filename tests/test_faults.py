"""Faults put into real runs of a tiny model: within how many steps each is found, what is lost, and what the run ends with
beside one that nothing disturbed. ``docs/guard.md`` has the table; faults of process and disk are in test_faults_process."""

import math
import os
import signal

import pytest
import torch
from fault_lab import AT, SFT, STEPS, disturb, found, last_loss, same, weights
from ppo_lab import files, lasting, place
from test_ppo_resume import forked

from rl.dpo import SoftDpoTrainer
from rl.update import Learner
from sft.trainer import LeanSftTrainer
from truthward import models, trainers
from truthward.errors import TrainingFault
from truthward.guard.watch import Guard
from truthward.ledger import Run, plan
from truthward.score import answer_sums
from truthward.tracking import read_metrics

# ------------------------------------------------------------------------------------------------------------ no fault


class Unguarded(trainers.TrainerCallback):
    """What the guard's place is taken by, to see that it changes nothing."""

    act = None

    def __init__(self, *args) -> None:
        pass


def test_an_undisturbed_run_is_the_same_without_the_guard(copy, undisturbed, monkeypatch):
    monkeypatch.setattr(trainers, "Guarding", Unguarded)
    assert same(copy.run("sft", *SFT), undisturbed)


def test_so_is_an_undisturbed_ppo(lab, tmp_path, monkeypatch):
    guarded = place(lab, tmp_path / "guarded").run("ppo")
    assert guarded.manifest["incidents"] == []
    monkeypatch.setattr(Guard, "observe", lambda self, row: None)
    monkeypatch.setattr(Guard, "calm", True)
    without = place(lab, tmp_path / "without").run("ppo")
    assert files(guarded) == files(without)
    assert lasting(guarded) == lasting(without)


# --------------------------------------------------------------------------------------------------------- in the batches


def test_a_nan_in_a_batch_costs_that_batch(copy, undisturbed, monkeypatch):
    """Found before the optimizer steps on it: weights and moments stay, and the run ends where it would have."""
    seen = {}

    def change(self, inputs, loss):
        seen.setdefault(self.state.global_step, [p.detach().clone() for p in self.model.parameters() if p.requires_grad])
        spoilt = self.state.global_step == AT and not self.accelerator.sync_gradients  # one of two micro-batches
        return loss() * math.nan if spoilt else loss()

    disturb(monkeypatch, LeanSftTrainer, change)
    run = copy.run("sft", *SFT)
    assert found(run, "metric", "value") == [("not finite", AT + 1, "skipped", "grad_norm", "nan")]
    assert all(torch.equal(a, b) for a, b in zip(seen[AT], seen[AT + 1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[AT + 1], seen[AT + 2], strict=True))
    row = read_metrics(run)[AT]
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, 1.0)
    assert all(t.isfinite().all() for t in weights(run).values())
    assert last_loss(run) < 1.06 * last_loss(undisturbed)


def test_nothing_but_nan_goes_back_twice_and_stops(copy, monkeypatch):
    """From one step on every loss is NaN: batches are left out, then the run goes back, but not forever."""
    disturb(monkeypatch, LeanSftTrainer, lambda self, i, loss: loss() * (math.nan if self.state.global_step >= AT else 1.0))
    options = (*SFT, "guard.skips=4")
    with pytest.raises(TrainingFault, match=r"not finite at step 24"):
        copy.run("sft", *options)
    run = Run.load(plan(copy.recipe(*options))["sft"].path)
    acts = [(step, action) for _, step, action in found(run) if action != "skipped"]
    assert acts == [(AT + 3, "rolled back"), (AT + 4, "rolled back"), (AT + 4, "stopped")]
    checkpoints = {p.name for p in (run.path / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-12", "checkpoint-18"}  # nothing was written while it was not calm
    before = found(run)
    with pytest.raises(TrainingFault, match=r"not finite at step 24"):
        copy.run("sft", *options)  # the same command stops at the same place, with the same record
    assert found(Run.load(run.path)) == before


def test_a_label_flipped_shard_is_left_out(lab, tmp_path, monkeypatch):
    """Five DPO batches with chosen and rejected changed over: found at the third, then left out one by one."""
    options = ("dpo.epochs=40", "dpo.checkpoint_every=5", "dpo.learning_rate=3e-3")
    undisturbed = place(lab, tmp_path / "undisturbed").run("dpo", *options)
    assert undisturbed.manifest["incidents"] == []
    steps = len(read_metrics(undisturbed))
    shard = range(steps - 17, steps - 12)

    def change(self, inputs, loss):
        if self.state.global_step in shard:
            inputs["pairs"] = inputs["pairs"].flip(1)
        return loss()

    disturb(monkeypatch, SoftDpoTrainer, change)
    run = place(lab, tmp_path / "flipped").run("dpo", *options)
    acts = [(step, action) for kind, step, action in found(run) if kind == "spike of loss"]
    first = shard[0] + 1
    assert acts == [(first, "noted"), (first + 2, "rolled back"), *((first + k, "skipped") for k in range(5))]
    assert last_loss(run) == pytest.approx(last_loss(undisturbed), abs=0.001)


def too_fast(trainer: LeanSftTrainer, hit: list[int]) -> None:
    """Up to five steps at a hundred times the rate, and no more once the run has gone back."""
    step = trainer.state.global_step
    if hit and step < hit[-1]:
        hit.append(STEPS)
    if AT <= step < AT + 5 and step > max(hit, default=-1) and trainer.accelerator.sync_gradients:
        hit.append(step)
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 100


def test_a_rate_a_hundred_times_too_high_is_undone(copy, undisturbed, monkeypatch):
    seen: list[int] = []
    used = {}  # the rate that the optimizer steps with, the last time that a step was made

    def change(self, inputs, loss):
        used[self.state.global_step] = self.optimizer.param_groups[0]["lr"]
        too_fast(self, seen)
        return loss()

    disturb(monkeypatch, LeanSftTrainer, change)
    run = copy.run("sft", *SFT)
    (back,) = [(step, kind) for kind, step, action in found(run) if action == "rolled back"]
    assert AT + 1 < back[0] <= AT + 4  # the first such step shows in the next loss; three in a row
    after = [row["learning_rate"] for row in read_metrics(run)][18:]
    planned = [row["learning_rate"] for row in read_metrics(undisturbed)][18:]
    assert after == pytest.approx([rate / 2 for rate in planned]) == [used[step] for step in range(18, STEPS)]
    assert last_loss(run) < 1.25 * last_loss(undisturbed)  # half the rate over the second half


def test_a_kill_after_going_back_changes_nothing(copy, lab, tmp_path, monkeypatch):
    """The lower rate and what was seen are on record: the run ends as one that went back and was not killed."""
    seen: list[int] = []
    with monkeypatch.context() as patch:
        disturb(patch, LeanSftTrainer, lambda self, inputs, loss: (too_fast(self, seen), loss())[1])
        whole = place(lab, tmp_path / "whole").run("sft", *SFT)

    def dying() -> None:
        seen: list[int] = []
        compute = LeanSftTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            too_fast(self, seen)
            if len(seen) and self.state.global_step == 19:  # again at this step: it has gone back
                os.kill(os.getpid(), signal.SIGKILL)
            return compute(self, *args, **kwargs)

        LeanSftTrainer.compute_loss = compute_loss
        copy.run("sft", *SFT)

    assert forked(dying) == -signal.SIGKILL
    resumed = copy.run("sft", *SFT)
    assert same(resumed, whole)
    assert found(resumed) == found(whole)


# ------------------------------------------------------------------------------------------------------------------- PPO


def test_a_nan_in_a_minibatch_of_ppo_costs_that_minibatch(lab, tmp_path, monkeypatch):
    minibatch = Learner.minibatch

    def spoilt(self, batch, scores, targets, rows, progress):
        found = minibatch(self, batch, scores, targets, rows, progress)
        if progress.step == 5:
            self.stepper.optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        return found

    monkeypatch.setattr(Learner, "minibatch", spoilt)
    run = place(lab, tmp_path).run("ppo")
    assert found(run, "optimizer_step", "value") == [("not finite", 2, "skipped", 5, "inf")]
    second = read_metrics(run)[1]
    assert (second["skipped"], second["steps"]) == (1, 4)
    assert math.isfinite(second["grad_norm"])
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    assert all(t.isfinite().all() for t in weights(run).values())


def test_an_iteration_of_nan_goes_back_and_stops(lab, tmp_path, monkeypatch):
    minibatch = Learner.minibatch

    def spoilt(self, batch, scores, targets, rows, progress):
        found = minibatch(self, batch, scores, targets, rows, progress)
        if progress.iteration == 1:
            self.stepper.optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)
        return found

    monkeypatch.setattr(Learner, "minibatch", spoilt)
    copy = place(lab, tmp_path)
    with pytest.raises(TrainingFault, match="not finite at step 2"):
        copy.run("ppo")
    run = Run.load(plan(copy.recipe())["ppo"].path)
    assert [(s, a) for _, s, a in found(run) if a != "skipped"] == [(2, "rolled back")] * 2 + [(2, "stopped")]
    assert {p.name for p in (run.path / "checkpoints").iterdir()} == {"iteration-00000", "iteration-00001"}


def test_probes_ask_held_out_questions_of_the_policy_and_of_what_it_was(lab, tmp_path):
    """MC2 as the evals' scorer finds it; no change before anything is learned, and a change after."""
    options = ("ppo.parent=sft", "guard.probe_every=1", "guard.probe_questions=4", "ppo.learning_rate=1e-2")
    with place(lab, tmp_path / "start").ppo(*options) as ppo:
        start = ppo.probe.after(0)
        model = models.load(ppo.run.parent("model"))
        shares = [torch.tensor(sums).softmax(0)[:1].sum().item() for sums in answer_sums(model, ppo.probe.items)]
        assert len(shares) == 4
        assert start["probe/truth"] == pytest.approx(sum(shares) / 4, abs=1e-5)
        assert start["probe/change"] == pytest.approx(0, abs=1e-6)
    run = place(lab, tmp_path / "run").run("ppo", *options)
    changes = [row["probe/change"] for row in read_metrics(run)]
    assert len(changes) == 3
    assert all(abs(change) > 1e-6 for change in changes)
