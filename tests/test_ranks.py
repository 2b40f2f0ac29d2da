"""Many ranks: the same losses and weights as one, under every stage of ZeRO, and the same run after any number of ranks.

All jobs of a test go through one start of the ranks, since importing the libraries takes longer than they do.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import ROOT, Lab, distillation
from safetensors.torch import load_file, save_file
from torch import nn

from truthward import ranks, shards
from truthward.errors import TrainingFault, UserError
from truthward.ledger import Run, joint_directory, plan
from truthward.stage import guarded
from truthward.tables import Launch
from truthward.tracking import read_metrics

WARN = 'unexplained="warn"'
# sizes that divide alike whatever the ranks; a rate at which PPO's clipping does not turn on rounding
ALIKE = {
    "sft": ["sft.packing=false", "sft.micro_batch_size=1"],
    "reward": [],
    "dpo": [],
    "ppo": ["ppo.learning_rate=1e-4"],
}
WAYS = {
    "ranks": ["launch.zero=0"],
    "zero1": ["launch.zero=1"],
    "zero2": ["launch.zero=2"],
    "zero3": ["launch.zero=3"],
    "zero3-recomputed": ["launch.zero=3", "launch.gradient_checkpointing=true", "launch.deepspeed={small}"],
}
CLOSE = 1e-5


def start(jobs: list[dict[str, Any]], folder: Path, count: int = 2, *, check: bool = True, restarts: int = 0) -> Any:
    """Run jobs of :mod:`rank_jobs` on so many ranks."""
    file = folder / f"jobs-{count}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        f"--max-restarts={restarts}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, str(ROOT / "tests" / "rank_jobs.py"), str(file)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def job(lab: Lab, stage: str, count: int, *overrides: str) -> dict[str, Any]:
    return {
        "home": str(lab.home),
        "runs": str(lab.runs),
        "stage": stage,
        "overrides": [WARN, f"launch.ranks={count}", *overrides],
    }


def bare(lab: Lab, runs: Path, *stages: str) -> Lab:
    """A copy of the lab in which these stages have not been run."""
    made = lab.copy(runs)
    for stage in stages:
        for path in made.runs.glob(f"*/{stage}-*"):
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
    return made


def replayed(lab: Lab) -> list[str]:
    return [f"dpo.replay={lab.home / 'prompts.jsonl'}", "dpo.replay_tokens=6"]


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Of the model, and of PPO's critic or the preference model's head where there is one."""
    files = [file for folder in (run.model_dir, run.path / "critic") for file in sorted(folder.glob("*.safetensors"))]
    return {f"{file.parent.name}/{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


def all_shared_out(folder: Path) -> Path:
    """Settings under which ZeRO-3 cuts tiny weights too, which it would leave whole."""
    (folder / "small.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return folder / "small.json"


def found(lab: Lab, stage: str, *overrides: str) -> Run:
    return Run.load(plan(lab.recipe(WARN, *overrides))[stage].path)


def assert_alike(got: Run, expected: Run, *, steps: bool = True) -> None:
    """The same weights, losses and gradient norms."""
    assert (got.done, expected.done) == (True, True)
    ours, theirs = weights(got), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        torch.testing.assert_close(ours[name], each, atol=CLOSE, rtol=0, msg=lambda text, n=name: f"{got.path}: {n}: {text}")
    if steps:
        rows, expected_rows = read_metrics(got), read_metrics(expected)
        assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
        loss = "loss/policy" if got.stage == "ppo" else "loss"
        for row, like in zip(rows, expected_rows, strict=True):
            assert row[loss] == pytest.approx(like[loss], abs=CLOSE)
            assert row["grad_norm"] == pytest.approx(like["grad_norm"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "distill", "reward", "dpo", "ppo"])
def test_two_ranks_do_what_one_does_under_every_stage_of_zero(lab, tmp_path, stage):
    """DPO with replayed answers: the first rank samples them, each holds the policy to its own."""
    alone, sizes = bare(lab, tmp_path / "alone", stage), distillation(lab) if stage == "distill" else ALIKE[stage]
    sizes = [*sizes, *replayed(lab)] if stage == "dpo" else sizes
    expected = alone.run(stage, WARN, *sizes)
    labs, small = {way: bare(lab, tmp_path / way, stage) for way in WAYS}, all_shared_out(tmp_path)
    launch = {way: [text.format(small=small) for text in settings] for way, settings in WAYS.items()}
    start([job(labs[way], stage, 2, *sizes, *launch[way]) for way in WAYS], tmp_path)
    for way in WAYS:
        assert_alike(found(labs[way], stage, *sizes), expected)


@pytest.mark.slow
def test_whole_weights_and_offloading_do_what_one_rank_does(lab, tmp_path):
    """Full-parameter training, and what ZeRO keeps on the host, beside one rank; tiny weights are shared out too."""
    small = f"launch.deepspeed={all_shared_out(tmp_path)}"
    ways = {
        "sft": [
            ["sft.tune=full", "sft.learning_rate=1e-3", *ALIKE["sft"]],
            ["launch.zero=3", 'launch.offload="all"', small],
        ],
        "dpo": [
            ["dpo.tune=full", "ppo.parent=sft", "dpo.learning_rate=1e-3", *replayed(lab)],
            ["launch.zero=2", 'launch.offload="optimizer"'],
        ],
        "ppo": [["ppo.tune=full", "ppo.parent=sft", "ppo.learning_rate=1e-5", "ppo.iterations=2"], ["launch.zero=3", small]],
    }
    jobs, pairs = [], []
    for stage, (settings, launch) in ways.items():
        alone, together = (bare(lab, tmp_path / f"{stage}-{name}", stage) for name in ("alone", "together"))
        pairs.append((alone.run(stage, WARN, *settings), together, stage, settings))
        jobs.append(job(together, stage, 2, *settings, *launch))
    start(jobs, tmp_path)
    for expected, together, stage, settings in pairs:
        assert_alike(found(together, stage, *settings), expected)


@pytest.mark.slow
def test_in_bf16_the_losses_are_near_those_of_one_rank(lab, tmp_path):
    """Under ZeRO-3 with every weight cut; reference log-probabilities and losses stay in fp32, so DPO begins at ln 2."""
    half, small = "model.dtype=bfloat16", f"launch.deepspeed={all_shared_out(tmp_path)}"
    alone = bare(lab, tmp_path / "alone")
    for stage in ("base", "sft", "constitution", "reward"):
        alone.run(stage, WARN, half)
    together = alone.copy(tmp_path / "together")
    sizes = {"dpo": ALIKE["dpo"], "ppo": [*ALIKE["ppo"], "ppo.parent=sft", "ppo.iterations=1"]}
    expected = {stage: alone.run(stage, WARN, half, *settings) for stage, settings in sizes.items()}
    start([job(together, stage, 2, half, "launch.zero=3", small, *sizes[stage]) for stage in sizes], tmp_path)
    (dpo, like), (ppo, one) = (
        (read_metrics(found(together, stage, half, *sizes[stage])), read_metrics(expected[stage])) for stage in sizes
    )
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [row["loss"] for row in dpo] == pytest.approx([row["loss"] for row in like], rel=0.05)
    assert ppo[0]["loss/value"] == pytest.approx(one[0]["loss/value"], rel=0.05)


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_goes_on_with_other_ranks_and_another_stage_of_zero(lab, tmp_path):
    """Two ranks under ZeRO-3, the last one killed at the second step; finished by one rank under ZeRO-2."""
    settings = {"dpo": ["dpo.checkpoint_every=1"], "ppo": ALIKE["ppo"]}
    labs = {stage: bare(lab, tmp_path / f"{stage}-cut", stage) for stage in settings}
    whole = {stage: bare(lab, tmp_path / f"{stage}-whole", stage).run(stage, WARN, *settings[stage]) for stage in settings}
    for stage in settings:
        cut = job(labs[stage], stage, 2, *settings[stage], "launch.zero=3") | {"fault": "killed", "at": 2}
        assert start([cut], tmp_path, check=False).returncode != 0
        assert not found(labs[stage], stage, *settings[stage]).done
    start([job(labs[stage], stage, 1, *settings[stage], "launch.zero=2") for stage in settings], tmp_path, count=1)
    for stage in settings:
        run = found(labs[stage], stage, *settings[stage])
        assert run.manifest["resumed"] == 1
        assert_alike(run, whole[stage])


@pytest.mark.slow
def test_ranks_that_are_started_again_after_a_kill_end_as_if_nothing_had_happened(lab, tmp_path):
    made, settings = bare(lab, tmp_path / "cut", "reward"), ["reward.checkpoint_every=1", "launch.zero=2"]
    expected = bare(lab, tmp_path / "whole", "reward").run("reward", WARN, "reward.checkpoint_every=1")
    start([job(made, "reward", 2, *settings) | {"fault": "killed", "at": 3}], tmp_path, restarts=1)
    run = found(made, "reward", *settings)
    assert run.manifest["resumed"] == 1
    assert_alike(run, expected)


@pytest.mark.slow
def test_ranks_under_zero_go_back_together_to_the_last_good_checkpoint(lab, tmp_path):
    """DeepSpeed has stepped by the time that a loss is seen, so that every rank starts again from the checkpoint before."""
    made, settings = bare(lab, tmp_path / "dpo", "dpo"), ["dpo.checkpoint_every=1", "launch.zero=3"]
    done = start([job(made, "dpo", 2, *settings) | {"fault": "not finite", "at": 2}], tmp_path, restarts=1)
    assert "goes back to its last good checkpoint, at a lower rate" in done.stderr
    run = found(made, "dpo", *settings)
    last = run.manifest["incidents"][-1]
    assert (run.done, last["kind"], last["step"], last["action"]) == (True, "not finite", 4, "rolled back")
    rates = {row["step"]: row["learning_rate"] for row in read_metrics(run)}
    usual = {row["step"]: row["learning_rate"] for row in read_metrics(Run.load(next(lab.runs.glob("*/dpo-*"))))}
    assert rates == {step: pytest.approx(rate * (1.0 if step == 1 else 0.5)) for step, rate in usual.items()}


@pytest.mark.slow
def test_a_hung_rank_ends_all_within_its_bound_with_every_ranks_stacks(lab, tmp_path):
    made = bare(lab, tmp_path / "hung", "sft")
    settings = [*ALIKE["sft"], "launch.zero=2", "guard.hang_seconds=8.0"]
    done = start([job(made, "sft", 2, *settings) | {"fault": "hung", "at": 2}], tmp_path, check=False)
    assert done.returncode != 0
    assert re.search(r"error: rank 1 on \S+: step 3 of .* did not end in", done.stderr)
    run = found(made, "sft", *settings)
    assert not run.done
    stacks = {path.name: path.read_text() for path in run.path.glob("stacks-rank*.txt")}
    assert "befall" not in stacks.get("stacks-rank0.txt", "")
    assert "rank_jobs.py" in stacks["stacks-rank1.txt"], "the last rank's says where it hung"


@pytest.mark.slow
def test_a_full_disk_at_one_rank_ends_all_with_one_clear_error_and_nothing_is_lost(lab, tmp_path):
    made, settings = bare(lab, tmp_path / "full", "ppo"), [*ALIKE["ppo"], "launch.zero=3"]
    expected = bare(lab, tmp_path / "whole", "ppo").run("ppo", WARN, *ALIKE["ppo"])
    done = start([job(made, "ppo", 2, *settings) | {"fault": "disk", "at": 2}], tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.count("No space left on device") == 1
    assert "to do: make room" in done.stderr
    run = found(made, "ppo", *settings)
    assert [p.name for p in sorted((run.path / "checkpoints").iterdir())] == ["iteration-00000", "iteration-00001"]
    start([job(made, "ppo", 2, *settings)], tmp_path)
    assert_alike(found(made, "ppo", *settings), expected)


# ------------------------------------------------------------------------------------------------------------- pieces


def test_parts_of_any_number_of_ranks_make_the_whole(tmp_path):
    """Two files with stretches of 5 and 3 of a parameter of 8, read by one that holds all of it."""
    one = {"w|0|weight": torch.arange(5.0), "w|0|exp_avg": torch.arange(5.0) + 10, "w|0|step": torch.tensor([7.0])}
    two = {"w|5|weight": torch.arange(5.0, 8), "w|5|exp_avg": torch.arange(5.0, 8) + 10, "w|5|step": torch.tensor([7.0])}
    save_file(one, tmp_path / "shard-00000-of-00002.safetensors")
    save_file(two, tmp_path / "shard-00001-of-00002.safetensors")
    parameter = nn.Parameter(torch.zeros(2, 4))
    optimizer = torch.optim.AdamW([parameter])
    shards.read(tmp_path, {"w": parameter}, optimizer)
    assert parameter.flatten().tolist() == list(range(8))
    assert optimizer.state[parameter]["exp_avg"].flatten().tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    assert optimizer.state[parameter]["step"] == 7
    saved = shards.Saved(tmp_path)
    assert saved.stretch("w", "weight", 3, 4).tolist() == [3, 4, 5, 6]


def test_what_is_written_is_read_back_bit_by_bit(tmp_path):
    parameter, other = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))
    optimizer = torch.optim.AdamW([parameter, other], lr=0.1)
    (parameter.sum() * other.sum()).backward()
    optimizer.step()
    shards.write(tmp_path, {"a.b": parameter, "c": other}, optimizer)
    again = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7))
    fresh = torch.optim.AdamW(again, lr=0.1)
    shards.read(tmp_path, dict(zip(("a.b", "c"), again, strict=True)), fresh)
    for old, new in zip((parameter, other), again, strict=True):
        assert torch.equal(old, new)
        assert {k: v.tolist() for k, v in optimizer.state[old].items()} == {
            k: v.tolist() for k, v in fresh.state[new].items()
        }


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["shard-00000-of-00002.safetensors"], "parts [1] of 2 are missing"),
        (["shard-00000-of-00001.safetensors", "shard-00001-of-00002.safetensors"], "parts of 1 and 2 ranks lie together"),
        (["shard-00000-of-00001.safetensors"], ""),
        ([], ""),
    ],
)
def test_missing_parts_are_seen_without_reading_them(tmp_path, names, fault):
    for name in names:
        save_file({"w|0|weight": torch.zeros(1)}, tmp_path / name)
    assert shards.missing(tmp_path) == fault


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    save_file({"w|0|weight": torch.zeros(4)}, tmp_path / "shard-00000-of-00001.safetensors")
    for name, size in (("v", 4), ("w", 5)):
        parameter = nn.Parameter(torch.zeros(size))
        with pytest.raises(UserError, match=f"does not hold {name}"):
            shards.read(tmp_path, {name: parameter}, torch.optim.AdamW([parameter]))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/build/gloo/tcp/pair.cc:5] Connection closed by peer [10.0.0.2]:1"), "Connection closed by peer"),
        (torch.distributed.DistBackendError("NCCL timed out"), "NCCL timed out"),
        (RuntimeError("shapes differ"), ""),
        (ValueError("gloo/"), ""),
    ],
)
def test_an_error_of_a_collective_is_told_as_a_lost_rank(monkeypatch, capsys, error, said):
    def work():
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not said:
        with pytest.raises(type(error)):
            guarded(work)
        return
    assert guarded(work) == TrainingFault.exit_code
    told = capsys.readouterr().err
    assert told.startswith("error: rank 1 on ")
    assert f"waited for another rank in vain: {said}" in told
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(type(error)):
        guarded(work)


def test_as_many_processes_as_the_recipe_says(monkeypatch):
    with pytest.raises(UserError, match=r"the recipe wants 4 ranks .*and there are 1"):
        ranks.join(Launch(ranks=2, hosts=2, rendezvous="a:1"), 1.0)
    ranks.join(Launch(), 1.0)
    assert (ranks.rank(), ranks.count(), ranks.first()) == (0, 1, True)


def test_a_single_process_shares_gathers_and_leads_alone(tmp_path):
    assert ranks.share(3) == 3
    assert ranks.gather("a") == ["a"]
    assert ranks.lead(lambda: 5) == 5
    assert not ranks.any_of(False)
    with joint_directory(tmp_path / "made") as folder:
        (folder / "x").write_text("y")
    assert (tmp_path / "made" / "x").read_text() == "y"
    with pytest.raises(ValueError, match="broken"), joint_directory(tmp_path / "other"):
        raise ValueError("broken")
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
