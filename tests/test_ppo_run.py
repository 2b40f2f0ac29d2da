"""A whole PPO run: what moves and what never does, how steps are taken, and what is on disk afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ppo_lab import Lab, gradient, place, policy_logprobs, quiet, sampled
from safetensors.torch import load_file
from torch import nn

from rl.ppo import PpoRun
from rl.update import Learner
from truthward import models
from truthward.ledger import Run, plan
from truthward.tensors import token_logprobs
from truthward.tracking import read_metrics

KINDS = {
    "lora": ("ppo.iterations=3",),
    "lora-from-base": ("ppo.parent=sft",),
    "full": ("ppo.parent=sft", "ppo.tune=full"),
    "full-from-adapter": ("ppo.tune=full",),
    "rloo": ("ppo.advantage=rloo", "ppo.group_size=2"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def before_and_after(kind, lab, tmp_path_factory):
    """A run in memory, with every parameter and buffer and what the reference and the reward say, before and after."""
    with place(lab, tmp_path_factory.mktemp("moves")).ppo(*KINDS[kind]) as ppo:
        batch, seen = ppo.rollout(quiet), []
        for _ in range(2):
            state = {n: t.detach().clone() for n, t in ppo.actor_critic.state_dict().items()}
            seen.append((state, ppo.score(batch)))
            if len(seen) == 1:
                for _ in range(3):
                    ppo.iterate(quiet)
        yield ppo, *seen


# ------------------------------------------------------------------------------------------------------- what moves


def trained(ppo: PpoRun, name: str) -> bool:
    """The policy's head is its embedding under another name where weights are tied."""
    return name in ppo.trainable or name == "policy.lm_head.weight"


def test_what_is_frozen_stays_bit_identical(kind, before_and_after):
    """Base, reference and preference model, head included."""
    ppo, (before, _), (after, _) = before_and_after
    frozen = [n for n in before if not trained(ppo, n)]
    assert {"reward_head.weight"} < set(frozen)
    assert any(n.endswith("q_proj.base_layer.weight") for n in frozen)
    assert any(".reference." in n for n in frozen) == (kind in ("lora", "full-from-adapter", "rloo"))
    assert all(torch.equal(before[n], after[n]) for n in frozen)


def test_everything_that_is_trained_moves(kind, before_and_after):
    """Every matrix of the policy (of every kind of layer, if it has weights of its own) and of the critic."""
    ppo, (before, _), (after, _) = before_and_after
    adapters = {n.split(".")[-2] for n in ppo.trainable if ".lora_" in n}
    assert adapters == ({"value"} if kind.startswith("full") else {"policy"}) | ({"value"} if kind != "rloo" else set())
    if kind.startswith("full"):
        own = {n.removeprefix("policy.") for n, _ in ppo.actor_critic.named_parameters() if n.startswith("policy.")}
        assert own == {n for n, _ in models.load(ppo.run.parent("model")).named_parameters()}
        assert all(p.dtype == torch.float32 for p in ppo.trainable.values())
    assert [n for n in ppo.trainable if torch.equal(before[n], after[n])] == []


def test_the_reference_and_the_preference_model_never_change_their_mind(before_and_after):
    """Row 44: the same answers get the same reference log-probabilities and scores after the run as before it."""
    ppo, (_, before), (_, after) = before_and_after
    assert torch.equal(before.ref_logprobs, after.ref_logprobs)
    assert before.scores == after.scores
    assert not torch.equal(before.old_logprobs, after.old_logprobs)
    assert torch.equal(before.values, after.values) == (ppo.table.advantage == "rloo")
    torch.testing.assert_close(before.old_logprobs, before.ref_logprobs, atol=1e-4, rtol=0)


def test_the_optimizer_holds_what_is_trained_and_nothing_else(before_and_after):
    """Row 31: AdamW over the fixed list, with epsilon 1e-5 and no weight decay."""
    ppo, *_ = before_and_after
    held = [p for group in ppo.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in ppo.trainable.values()}
    assert len(held) == len(ppo.trainable)
    assert {n for n, p in ppo.actor_critic.named_parameters() if p.requires_grad} == ppo.trainable.keys()
    assert {(group["eps"], group["weight_decay"]) for group in ppo.optimizer.param_groups} == {(1e-5, 0.0)}


# ---------------------------------------------------------------------------------------------------------- the update


@pytest.fixture
def watched(lab, tmp_path, monkeypatch):
    """A run whose minibatches and rates are written down: rows, and the rates at that step."""
    seen: list[tuple[list[int], list[float]]] = []
    method = Learner.minibatch

    def watching(self, batch, scores, targets, rows, progress):
        seen.append((rows, [group["lr"] for group in self.stepper.optimizer.param_groups]))
        return method(self, batch, scores, targets, rows, progress)

    monkeypatch.setattr(Learner, "minibatch", watching)

    def make(*overrides: str):
        return place(lab, tmp_path).ppo("ppo.target_kl=1e9", *overrides), seen

    return make


def test_each_pass_takes_every_row_once_in_a_new_order(watched):
    """Row 34: 2 passes of 2 minibatches over 8 rows, drawn by seed, pass and iteration."""
    opened, seen = watched()
    with opened as ppo:
        ppo.iterate(quiet)
        ppo.iterate(quiet)
    assert [len(rows) for rows, _ in seen] == [4] * 8
    assert all(sorted(seen[i][0] + seen[i + 1][0]) == list(range(8)) for i in range(0, 8, 2))
    assert len({tuple(seen[i][0]) for i in range(0, 8, 2)}) > 1


def test_the_rates_fall_in_a_line_to_zero(watched):
    """Row 32: 3 iterations of 4 steps: rate (1 - step/12), step 0 to 11; the critic's the same unless it has its own."""
    opened, seen = watched("ppo.learning_rate=1e-3", "ppo.value_learning_rate=5e-3")
    with opened as ppo:
        for _ in range(3):
            ppo.iterate(quiet)
    assert [rates[0] for _, rates in seen] == pytest.approx([1e-3 * (1 - step / 12) for step in range(12)])
    assert [rates[1] for _, rates in seen] == pytest.approx([5e-3 * (1 - step / 12) for step in range(12)])


def test_the_rates_climb_during_warm_up(watched):
    """Row 32: a quarter of 12 steps: 1/3, 2/3, 1, then 9/9, 8/9 down to 1/9."""
    opened, seen = watched("ppo.learning_rate=1e-3", "ppo.warmup_ratio=0.25")
    with opened as ppo:
        for _ in range(3):
            ppo.iterate(quiet)
    factors = [1 / 3, 2 / 3, 1.0, *[left / 9 for left in range(9, 0, -1)]]
    assert [rates for _, rates in seen] == [pytest.approx([1e-3 * f] * 2) for f in factors]


def test_gradients_are_clipped_to_the_global_norm(lab, tmp_path, monkeypatch):
    """Row 33: what reaches the optimizer has norm 0.01 over all parameters together; the metric is the norm before."""
    norms = []
    with place(lab, tmp_path).ppo("ppo.max_grad_norm=0.01") as ppo:
        step = ppo.optimizer.step
        flat = lambda: torch.cat([p.grad.flatten() for p in ppo.trainable.values()])  # noqa: E731
        monkeypatch.setattr(ppo.optimizer, "step", lambda: (norms.append(flat().norm().item()), step()))
        metrics = ppo.iterate(quiet)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    assert metrics["grad_norm"] > 0.1


def test_every_step_begins_without_gradients(lab, tmp_path, monkeypatch):
    """Otherwise a step would be taken along those before it as well."""
    method, left = Learner.minibatch, []

    def watching(self, *args):
        left.extend(n for n, p in self.actor_critic.named_parameters() if p.grad is not None and p.grad.any())
        return method(self, *args)

    monkeypatch.setattr(Learner, "minibatch", watching)
    with place(lab, tmp_path).ppo() as ppo:
        assert ppo.iterate(quiet)["steps"] == 4
    assert left == []


def test_a_first_step_by_hand(lab, tmp_path):
    """Row 31: Adam's first step is rate * g / (|g| + 1e-5), whatever the betas: small gradients move less."""
    with place(lab, tmp_path).ppo("ppo.max_grad_norm=1e9", "ppo.learning_rate=1e-3") as ppo:
        batch, scores, targets = sampled(ppo)
        before = {n: p.detach().clone() for n, p in ppo.trainable.items()}
        found, _ = gradient(ppo, batch, scores, targets)
        ppo.learner.minibatch(batch, scores, targets, list(range(8)), ppo.progress)
        ppo.learner._step(ppo.progress)
        for name, grad in found.items():
            step = 1e-3 * grad / (grad.abs() + 1e-5)
            torch.testing.assert_close(before[name] - ppo.trainable[name], step, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture(scope="module")
def whole(kind, lab, tmp_path_factory) -> Run:
    """Three iterations, written."""
    return place(lab, tmp_path_factory.mktemp("whole")).run("ppo", *KINDS[kind])


def test_the_checkpoint_holds_no_pickle(kind, whole):
    """Two checkpoints of safetensors and JSON; nothing that runs code when it is read; a critic where there is one."""
    folders = sorted(p.name for p in (whole.path / "checkpoints").iterdir())
    assert folders == ["iteration-00002", "iteration-00003"]
    assert (whole.path / "critic").exists() == (kind != "rloo")
    files = [p for p in whole.path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"}
    for path in files:
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())


@torch.no_grad()
def last_state(lab: Lab, kind: str, whole: Run, tmp_path: Path):
    """The run at its end, restored from its checkpoint, with a batch and what its policy says of it."""
    runs = place(lab, tmp_path)
    shutil.copytree(whole.path, plan(runs.recipe(*KINDS[kind]))["ppo"].path)
    with runs.ppo(*KINDS[kind]) as ppo:
        assert ppo.progress.iteration == 3
        batch = ppo.rollout(quiet)
        return ppo, batch, policy_logprobs(ppo, batch)


@torch.no_grad()
def states(model, batch, i: int, **options):
    """A plain model's output at what predicts answer i, alone and without padding."""
    ids = torch.tensor([batch.prompts[i] + batch.answers[i]])
    return model(input_ids=ids, **options)[0][0, len(batch.prompts[i]) - 1 : -1]


@torch.no_grad()
def test_the_policy_is_saved_and_loads_as_a_plain_model(kind, lab, whole, tmp_path):
    """The chain that models.load composes, merged or full, gives the log-probabilities of the run's own policy."""
    ppo, batch, expected = last_state(lab, kind, whole, tmp_path)
    parent = whole.parent("start" if "start" in whole.manifest["parents"] else "model")
    for run, same in ((whole, True), (parent, False)):
        model = models.load(run)
        rows = [
            token_logprobs(states(model, batch, i), torch.tensor(a), ppo.table.temperature)
            for i, a in enumerate(batch.answers)
        ]
        off = (torch.cat(rows) - expected).abs().max()
        assert (off < 2e-4) == same


@torch.no_grad()
def test_the_critic_is_saved_and_loads(kind, lab, whole, tmp_path):
    """peft and the head beside it give the values that the run's own critic gives."""
    if kind == "rloo":
        pytest.skip("it has no critic")
    ppo, batch, _ = last_state(lab, kind, whole, tmp_path)
    expected = ppo.actor_critic("value", batch.forest(list(range(8))))
    model = PeftModel.from_pretrained(models.load(whole.parent("model")), str(whole.path / "critic"))
    head = nn.Linear(48, 1)
    head.load_state_dict(models.load_head(whole.path / "critic"))
    decoder = model.get_base_model().model
    got = torch.cat([head(states(decoder, batch, i)).squeeze(-1) for i in range(8)])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 0.001


def test_the_record_is_made_of_the_metrics(whole):
    rows = read_metrics(whole)
    assert [r["step"] for r in rows] == [1, 2, 3]
    for name, row in (("first", rows[0]), ("last", rows[-1])):
        assert whole.manifest["metrics"][name] == {k: row[k] for k in whole.manifest["metrics"][name]}
    assert rows[0]["kl/k1"] == pytest.approx(0, abs=1e-5)
    assert all(r["kl/k3"] >= 0 for r in rows)
    assert all(r["sampler_gap"] < 1e-3 for r in rows)
