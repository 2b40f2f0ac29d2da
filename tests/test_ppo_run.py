"""A whole PPO run: what moves and what never does, exact resume, and what is on disk afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from rl.ppo import PpoRun
from truthward import models
from truthward.ledger import Run, plan
from truthward.tensors import positions, token_logprobs
from truthward.tracking import Tracker, read_metrics

BEGIN = "ppo.iterations=3"


def quiet(n: int) -> None:
    """A progress bar that isn't there."""


class Killed(BaseException):
    """Stands in for the power going off."""


def contents(run: Run) -> dict[str, bytes]:
    """Every file of the last checkpoint, the model and the critic, but for the folder that the run happens to be in."""
    last, home = max((run.path / "checkpoints").iterdir()), str(run.path.parent).encode()
    files = [p for folder in (last, run.model_dir, run.path / "critic") for p in folder.iterdir()]
    assert {"weights.safetensors", "optimizer.safetensors", "progress.json", "head.safetensors"} < {p.name for p in files}
    return {str(p.relative_to(run.path)): p.read_bytes().replace(home, b"") for p in files}


def lasting(run: Run) -> list[dict]:
    """Metrics but the clock's."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in read_metrics(run)]


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> Run:
    """Three iterations without a break."""
    return lab.copy(tmp_path_factory.mktemp("whole") / "runs").run("ppo", BEGIN)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", ["rollout", "update"])
@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_a_run_that_was_killed_ends_as_one_that_was_not(lab, whole, tmp_path, monkeypatch, iteration, step):
    """k iterations, a kill in the next one, resume, N - k: weights, optimizer, progress and metrics bit for bit."""
    copy = lab.copy(tmp_path / "runs")
    method = getattr(PpoRun, step)

    def killing(self, *args):
        if self.progress.iteration == iteration:
            raise Killed
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PpoRun, step, killing)
        with pytest.raises(Killed):
            copy.run("ppo", BEGIN)
    torch.manual_seed(999)  # a resumed process has another state of every global generator
    resumed = copy.run("ppo", BEGIN)
    assert resumed.manifest["resumed"] == 1
    assert resumed.path.name == whole.path.name
    assert contents(resumed) == contents(whole)
    assert lasting(resumed) == lasting(whole)


def test_a_kill_between_checkpoint_and_metrics_loses_no_row(lab, whole, tmp_path, monkeypatch):
    copy, log = lab.copy(tmp_path / "runs"), Tracker.log

    def killing(self, step, metrics):
        if step == 2:
            raise Killed
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", killing)
        with pytest.raises(Killed):
            copy.run("ppo", BEGIN)
    assert lasting(copy.run("ppo", BEGIN)) == lasting(whole)


def test_a_checkpoint_that_was_cut_off_is_passed_over(lab, whole, tmp_path, monkeypatch):
    """A kill while the second checkpoint is being written leaves the first."""
    from rl import state

    copy, write, calls = lab.copy(tmp_path / "runs"), state.save_file, []

    def killing(tensors, path):
        write(tensors, path)
        calls.append(path)
        if len(calls) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", killing)
        with pytest.raises(Killed):
            copy.run("ppo", BEGIN)
    resumed = copy.run("ppo", BEGIN)
    assert contents(resumed) == contents(whole)
    assert lasting(resumed) == lasting(whole)


# ------------------------------------------------------------------------------------------------------- what moves


@pytest.fixture(scope="module")
def before_and_after(lab, tmp_path_factory):
    """A run in memory, with every parameter and buffer and what the reference and the reward say, before and after."""
    with lab.copy(tmp_path_factory.mktemp("moves") / "runs").ppo(BEGIN) as ppo:
        batch = ppo.rollout(quiet)
        seen = []
        for _ in range(2):
            state = {n: t.detach().clone() for n, t in ppo.actor_critic.state_dict().items()}
            seen.append((state, ppo.score(batch)))
            if len(seen) == 1:
                for _ in range(3):
                    ppo.iterate(quiet)
        yield ppo, *seen


def test_what_is_frozen_stays_bit_identical(before_and_after):
    """Base, reference and preference model, head included."""
    ppo, (before, _), (after, _) = before_and_after
    frozen = [n for n in before if n not in ppo.trainable]
    assert {"reward_head.weight"} < set(frozen)
    assert any(".reference." in n for n in frozen)
    assert all(torch.equal(before[n], after[n]) for n in frozen)


def test_everything_that_is_trained_moves(before_and_after):
    """Every matrix of the policy's and the critic's adapters, and the value head."""
    ppo, (before, _), (after, _) = before_and_after
    assert {n.split(".")[-2] for n in ppo.trainable if ".lora_" in n} == {"policy", "value"}
    assert [n for n in ppo.trainable if torch.equal(before[n], after[n])] == []


def test_the_reference_and_the_preference_model_never_change_their_mind(before_and_after):
    """Row 44: the same answers get the same reference log-probabilities and scores after the run as before it."""
    _, (_, before), (_, after) = before_and_after
    assert torch.equal(before.ref_logprobs, after.ref_logprobs)
    assert torch.equal(before.scores, after.scores)
    assert not torch.equal(before.old_logprobs, after.old_logprobs)
    assert not torch.equal(before.values, after.values)


def test_the_optimizer_holds_what_is_trained_and_nothing_else(before_and_after):
    """Row 31: AdamW over the fixed list, with epsilon 1e-5 and no weight decay."""
    ppo, *_ = before_and_after
    (group,) = ppo.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in ppo.trainable.values()}
    assert {n for n, p in ppo.actor_critic.named_parameters() if p.requires_grad} == ppo.trainable.keys()
    assert (group["eps"], group["weight_decay"]) == (1e-5, 0.0)


# ---------------------------------------------------------------------------------------------------------- the update


@pytest.fixture
def watched(lab, tmp_path, monkeypatch):
    """A run whose minibatches and rates are written down: rows, and the rate at that step."""
    seen: list[tuple[list[int], float]] = []
    method = PpoRun._minibatch

    def watching(self, batch, scores, targets, rows, totals):
        seen.append((rows.tolist(), self.optimizer.param_groups[0]["lr"]))
        return method(self, batch, scores, targets, rows, totals)

    monkeypatch.setattr(PpoRun, "_minibatch", watching)

    def make(*overrides: str):
        return lab.copy(tmp_path / "runs").ppo(*overrides), seen

    return make


def test_each_pass_takes_every_row_once_in_a_new_order(watched):
    """Row 34: 2 passes of 2 minibatches over 8 rows, shuffled by seed, pass and iteration."""
    opened, seen = watched("ppo.target_kl=1e9")
    with opened as ppo:
        ppo.iterate(quiet)
        ppo.iterate(quiet)
    passes = [seen[i][0] + seen[i + 1][0] for i in range(0, 8, 2)]
    assert [len(rows) for rows, _ in seen] == [4] * 8
    assert all(sorted(p) == list(range(8)) for p in passes)
    assert len({tuple(p) for p in passes}) == 4


def test_the_rate_falls_in_a_line_to_zero(watched):
    """Row 32: 3 iterations of 4 steps: rate (1 - step/12), step 0 to 11."""
    opened, seen = watched("ppo.target_kl=1e9", "ppo.learning_rate=1e-3")
    with opened as ppo:
        for _ in range(3):
            ppo.iterate(quiet)
    assert [rate for _, rate in seen] == pytest.approx([1e-3 * (1 - step / 12) for step in range(12)])


def test_a_policy_that_has_moved_too_far_ends_the_iteration(watched):
    """Row 35: before the first step KL(old || new) is 0, after it more than 1e-9, so the second step is the last."""
    opened, seen = watched("ppo.target_kl=1e-9")
    with opened as ppo:
        metrics = ppo.iterate(quiet)
    assert (metrics["steps"], metrics["stopped_early"], len(seen)) == (2, 1.0, 2)


def test_gradients_are_clipped_to_the_global_norm(lab, tmp_path, monkeypatch):
    """Row 33: what reaches the optimizer has norm 0.01 over all parameters together; the metric is the norm before."""
    norms = []
    with lab.copy(tmp_path / "runs").ppo("ppo.max_grad_norm=0.01") as ppo:
        step = ppo.optimizer.step
        flat = lambda: torch.cat([p.grad.flatten() for p in ppo.trainable.values()])  # noqa: E731
        monkeypatch.setattr(ppo.optimizer, "step", lambda: (norms.append(flat().norm().item()), step()))
        metrics = ppo.iterate(quiet)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    assert metrics["grad_norm"] > 0.1


# ---------------------------------------------------------------------------------------------------------- on disk


def test_the_checkpoint_holds_no_pickle(whole):
    """Two checkpoints of safetensors and JSON; nothing that runs code when it is read."""
    folders = sorted(p.name for p in (whole.path / "checkpoints").iterdir())
    assert folders == ["iteration-00002", "iteration-00003"]
    files = [p for p in whole.path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"}
    for path in files:
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())


@torch.no_grad()
def last_state(lab, whole: Run, tmp_path: Path) -> tuple[PpoRun, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The run at its end, restored from its checkpoint, with a batch and what its policy and critic say of it."""
    runs = lab.copy(tmp_path / "runs")
    shutil.copytree(whole.path, plan(runs.recipe(BEGIN))["ppo"].path)
    with runs.ppo(BEGIN) as ppo:
        assert ppo.progress.iteration == 3
        batch = ppo.rollout(quiet)
        policy = ppo.actor_critic("policy", batch.ids, batch.mask, batch.answer).logprobs
        value = ppo.actor_critic("value", batch.ids, batch.mask, batch.answer)
        return ppo, batch, batch.answer_mask, policy, value


@torch.no_grad()
def test_the_critic_is_saved_and_loads(lab, whole, tmp_path):
    """peft and the head beside it give the values that the run's own critic gives."""
    _, batch, mask, _, expected = last_state(lab, whole, tmp_path)
    model = PeftModel.from_pretrained(models.load(whole.parent("model")), str(whole.path / "critic"))
    head = nn.Linear(48, 1)
    head.load_state_dict(models.load_head(whole.path / "critic"))
    hidden = (
        model.get_base_model()
        .model(input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=positions(batch.mask))
        .last_hidden_state
    )
    got = head(hidden[:, -batch.answer - 1 : -1]).squeeze(-1)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=0)
    assert expected[mask].abs().max() > 0.01


@torch.no_grad()
def test_the_policy_is_saved_and_loads_as_a_plain_model(lab, whole, tmp_path):
    """The chain base, sft, ppo composed by models.load gives the log-probabilities of the run's own policy."""
    ppo, batch, mask, expected, _ = last_state(lab, whole, tmp_path)
    model = models.load(whole)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=positions(batch.mask)).logits
    got = token_logprobs(logits[:, -batch.answer - 1 : -1], batch.ids[:, -batch.answer :], ppo.table.temperature)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-4, rtol=0)
    start = models.load(whole.parent("start"))
    logits = start(input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=positions(batch.mask)).logits
    other = token_logprobs(logits[:, -batch.answer - 1 : -1], batch.ids[:, -batch.answer :], ppo.table.temperature)
    assert (other - expected)[mask].abs().max() > 0.01


def test_the_record_is_made_of_the_metrics(whole):
    rows = read_metrics(whole)
    assert [r["step"] for r in rows] == [1, 2, 3]
    for name, row in (("first", rows[0]), ("last", rows[-1])):
        assert whole.manifest["metrics"][name] == {k: row[k] for k in whole.manifest["metrics"][name]}
    assert rows[0]["kl/k1"] == rows[0]["kl/k3"] == 0
    assert all(r["sampler_gap"] < 1e-4 for r in rows)
