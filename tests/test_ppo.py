"""One PPO step: it starts at ratio 1 and KL 0, and its gradient is that of plain loops, however answers are laid out."""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from ppo_lab import assert_same, disturb, gradient, policy_logprobs, quiet, sampled
from torch import nn
from torch.nn import functional as F

from rl.ppo import PpoRun
from rl.rollout import Batch, prompt_order
from rl.update import Scores, Targets
from truthward.branches import Item, plant
from truthward.errors import TrainingFault
from truthward.models import load_head

TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=["dpo", "sft"])
def fresh(request, lab):
    """A run before its first step that starts from a DPO adapter, or from the base that all adapters share."""
    with lab.ppo(f"ppo.parent={request.param}", "ppo.group_size=2") as ppo:
        yield ppo


@dataclass
class Moved:
    """A rollout, scored before the policy and the critic moved, and the run after they did."""

    ppo: PpoRun
    batch: Batch
    scores: Scores
    targets: Targets
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def moved(lab) -> Moved:
    with lab.ppo(f"ppo.temperature={TEMPERATURE}", "ppo.group_size=2") as ppo:
        batch, scores, targets = sampled(ppo)
        assert set(batch.finished.tolist()) == {True, False}
        _, metrics = ppo.advantages(batch, scores)
        disturb(ppo)
        yield Moved(ppo, batch, scores, targets, metrics)


def step(m: Moved, batch: Batch | None = None, **table) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    return gradient(m.ppo, batch or m.batch, m.scores, m.targets, **table)


# --------------------------------------------------------------------------------------------------------- the start


def test_the_first_kl_is_exactly_zero(fresh):
    """Row 44: not to a tolerance, also where policy and reference are two copies of a DPO adapter."""
    scores = fresh.score(fresh.rollout(quiet))
    assert torch.equal(scores.old_logprobs, scores.ref_logprobs)
    assert scores.old_logprobs.abs().max() > 1


@torch.no_grad()
def test_a_dpo_adapter_is_in_use_where_the_run_starts_from_one(fresh):
    """Otherwise a KL of 0 would be no news: with adapters off the numbers are others."""
    batch, module = fresh.rollout(quiet), fresh.actor_critic
    kept = module._adapters.pop("reference", None)
    off = module("reference", batch.forest(list(range(8)))).logprobs
    if kept is not None:
        module._adapters["reference"] = kept
    assert ((policy_logprobs(fresh, batch) - off).abs().max() > 1) == (kept is not None)


def test_the_first_ratio_is_one(fresh):
    """Row 1: exactly for the rows that were scored together, to 1e-5 beside others; in train() mode, with gradients."""
    batch = fresh.rollout(quiet)
    scores = fresh.score(batch)
    assert fresh.actor_critic.training
    for rows, tolerance in (([0, 1], 0.0), (torch.randperm(8)[:5].sort().values.tolist(), 1e-5)):
        new = policy_logprobs(fresh, batch, rows)
        assert new.requires_grad
        off = ((new - scores.old_logprobs[rows][batch.mask[rows]]).exp() - 1).abs().max()
        assert off.item() <= tolerance


def test_a_reference_that_is_not_the_start_stops_the_run(lab):
    """Row 44: what the run asserts can fail."""
    with lab.ppo("ppo.kl_coef=0.051") as ppo:
        batch = ppo.rollout(quiet)
        ppo.actor_critic._adapters["reference"][1].data += 0.1
        with pytest.raises(TrainingFault, match=r"KL\(policy"):
            ppo.advantages(batch, ppo.score(batch))


def test_a_first_ratio_that_is_not_one_stops_the_run(lab):
    """Row 1: old log-probabilities off by a hundredth."""
    with lab.ppo("ppo.kl_coef=0.052") as ppo:
        batch, scores, targets = sampled(ppo)
        with pytest.raises(TrainingFault, match="PPO's ratio must be 1"):
            ppo.learner.update(batch, scores._replace(old_logprobs=scores.old_logprobs - 0.01), targets, ppo.progress)


def test_values_start_at_zero_on_the_preference_models_weights(fresh):
    """Row 26: a head of zeros over a copy of the preference model's adapter."""
    assert (fresh.score(fresh.rollout(quiet)).values == 0).all()
    adapters = fresh.actor_critic._adapters
    assert all(torch.equal(v, r) for v, r in zip(adapters["value"], adapters["reward"], strict=True))
    assert all(v is not r for v, r in zip(adapters["value"], adapters["reward"], strict=True))
    head = load_head(fresh.run.parent("reward").model_dir)["weight"]
    assert torch.equal(fresh.actor_critic.reward_head.weight, head)


@torch.no_grad()
def test_there_is_no_dropout(fresh):
    """Row 30: no layer, no adapter, no attention drops anything, so train() and eval() are one function."""
    modules = list(fresh.actor_critic.modules())
    assert all(m.p == 0 for m in modules if isinstance(m, nn.Dropout))
    assert all(getattr(m, "attention_dropout", 0) == 0 for m in modules)
    assert all(config.lora_dropout == 0 for config in fresh.actor_critic.model.peft_config.values())
    forest = fresh.rollout(quiet).forest(list(range(8)))
    for task in ("policy", "reference", "value", "reward"):
        one, other = fresh.actor_critic.train()(task, forest), fresh.actor_critic.eval()(task, forest)
        pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    fresh.actor_critic.train()


# --------------------------------------------------------------------------------------------------------- the rollout


def test_an_iterations_rollout_is_the_same_whenever_it_is_made(fresh):
    """Row 42: seeded by recipe seed, iteration and prompt; the same prompt in a later iteration gets another answer."""
    one, again = fresh.rollout(quiet), fresh.rollout(quiet)
    assert one.answers == again.answers
    fresh.progress.iteration = 3  # 12 prompts on, so the same six once more
    other = fresh.rollout(quiet)
    fresh.progress.iteration = 0
    shared = [p for p in other.prompts if p in one.prompts]
    assert shared != []
    assert {tuple(a) for a in one.answers} != {tuple(a) for a in other.answers}


def test_answers_to_a_prompt_stand_next_to_each_other_and_differ(fresh):
    """Row 42: each answer of a group has a seed of its own; groups take the prompts in their order."""
    batch = fresh.rollout(quiet)
    order = prompt_order(len(fresh.prompts), 0, 4, fresh.recipe.seed)
    assert batch.prompts == [fresh.prompts[row] for row in order for _ in range(2)]
    assert all(batch.answers[i] != batch.answers[i + 1] for i in range(0, 8, 2))


def test_answers_are_sampled_from_the_plain_softmax():
    """Row 4: there is no top-p and no top-k to set, so the ratio is about the distribution that was sampled from."""
    from truthward.tables import Ppo

    assert not {name for name in Ppo.model_fields if "top" in name or "min_p" in name}


def test_the_refreshed_sampler_is_the_policy(moved):
    """What it says of its own samples is what the trainer's forward says, also after the policy has moved."""
    assert moved.metrics["sampler_gap"] < 1e-4
    batch = moved.ppo.rollout(quiet)
    with torch.no_grad():
        gap = policy_logprobs(moved.ppo, batch) - batch.sampler_logprobs[batch.mask]
    assert gap.abs().max() < 1e-3
    assert batch.answers != moved.batch.answers


# --------------------------------------------------------------------------------------------- the gradient by layouts


class Apart(Batch):
    """Every answer has a tree of its own; no prompt is shared."""

    def forest(self, rows):
        return plant([Item(self.prompts[r], [self.answers[r]]) for r in rows])


class Shifted(Batch):
    """Before each answer's tree one of words that are nobody's: what follows lies further on."""

    def forest(self, rows):
        return plant([i for r in rows for i in (Item([7] * (3 + r), []), Item(self.prompts[r], [self.answers[r]]))])


class Padded(Batch):
    """Beside a tree that is longer than all others, so that attention pads these."""

    def forest(self, rows):
        return plant([*(Item(self.prompts[r], [self.answers[r]]) for r in rows), Item([9] * 200, [])])


def as_layout(kind: type[Batch], batch: Batch) -> Batch:
    return kind(**{f.name: getattr(batch, f.name) for f in fields(Batch)})


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_gradient_does_not_depend_on_micro_batches(moved, micro):
    """Row 28: 8 x 1 = 4 x 2 = 2 x 4 = 1 x 8, for policy, critic and value head, and so for the metrics."""
    whole, metrics = step(moved, micro_batch_size=8)
    got, same = step(moved, micro_batch_size=micro)
    assert_same(got, whole, 1e-5)
    assert same == pytest.approx(metrics, rel=1e-4)
    assert 0.1 < metrics["clipped"] < 0.9


@pytest.mark.parametrize("layout", [Apart, Shifted, Padded])
def test_the_gradient_does_not_depend_on_the_layout(moved, layout):
    """Rows 5, 8 and 17: shared prompts or not, one row or several, padding left or right or none: scores and gradient."""
    laid = as_layout(layout, moved.batch)
    with torch.no_grad():
        torch.testing.assert_close(
            policy_logprobs(moved.ppo, laid), policy_logprobs(moved.ppo, moved.batch), atol=1e-4, rtol=0
        )
        scored, same = moved.ppo.score(laid), moved.ppo.score(moved.batch)
        torch.testing.assert_close(torch.tensor(scored.scores), torch.tensor(same.scores), atol=1e-4, rtol=0)
    expected, metrics = step(moved)
    got, same = step(moved, laid)
    assert_same(got, expected, 2e-5)
    assert same == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def test_the_gradient_does_not_depend_on_padding_of_what_is_kept(moved):
    """Rows 8 and 17: four more columns in masks and in everything that was scored, and junk at all padding."""

    def wide(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 4))

    batch = replace(moved.batch, mask=wide(moved.batch.mask), sampler_logprobs=wide(moved.batch.sampler_logprobs))
    junk = ~batch.mask * 3.0
    scores = Scores(moved.scores.scores, *(wide(x) + junk for x in moved.scores[1:]))
    targets = Targets(wide(moved.targets.advantages) + junk, wide(moved.targets.returns) - junk, wide(moved.targets.mask))
    expected, metrics = step(moved)
    got, same = gradient(moved.ppo, batch, scores, targets)
    assert_same(got, expected, 1e-5)
    assert same == pytest.approx(metrics, rel=1e-5)
    assert (moved.ppo.advantages(batch, scores)[0].advantages[~batch.mask] == 0).all()


def plain_losses(m: Moved, adapter: str) -> torch.Tensor:
    """The sum over answer tokens by answers and tokens: each alone, through the model as it stands, in float64."""
    table, model, total = m.ppo.table, m.ppo.actor_critic.model, torch.zeros((), dtype=torch.float64)
    model.set_adapter(adapter)
    for i, (prompt, answer) in enumerate(zip(m.batch.prompts, m.batch.answers, strict=True)):
        out = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        for t, token in enumerate(answer):
            before = len(prompt) + t - 1
            if adapter == "policy":
                logits = out.logits[0, before].double() / TEMPERATURE
                ratio = (logits[token] - logits.logsumexp(0) - m.scores.old_logprobs[i, t]).exp()
                advantage = m.targets.advantages[i, t].item()
                held = ratio.clamp(1 - table.clip_range, 1 + table.clip_range)
                total = total + torch.maximum(-advantage * ratio, -advantage * held)
            else:
                head = m.ppo.actor_critic.value_head
                value = (head.weight[0] @ out.hidden_states[-1][0, before] + head.bias[0]).double()
                old, target = m.scores.values[i, t].item(), m.targets.returns[i, t].item()
                held = value.clamp(old - table.value_clip_range, old + table.value_clip_range)
                total = total + 0.5 * torch.maximum((value - target) ** 2, (held - target) ** 2)
    return total


def test_the_gradient_is_that_of_plain_loops(moved):
    """Rows 3, 6, 22, 24, 25 and 28: shift, temperature, both clips, the value's weight and the token count, all at once."""
    got, metrics = step(moved, tis_cap=0.0)
    count, expected = moved.batch.mask.sum().item(), {}
    for adapter, weight in (("policy", 1.0), ("value", moved.ppo.table.value_coef)):
        loss = plain_losses(moved, adapter)
        assert metrics[f"loss/{adapter}"] == pytest.approx(loss.item() / count, rel=1e-4)
        parameters = moved.ppo.actor_critic.trainable(adapter)
        found = torch.autograd.grad(weight * loss / count, list(parameters.values()))
        expected |= dict(zip(parameters, found, strict=True))
    moved.ppo.actor_critic._settle()
    assert_same(got, expected, 1e-5)


def test_layers_that_are_computed_again_give_the_same_gradient(moved, monkeypatch):
    """Gradient checkpointing: twice as many passes through a layer, policy and critic each under its own adapter."""
    layers, calls = moved.ppo.actor_critic.policy_shell().model.layers, []
    hooks = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    once, _ = step(moved)
    kept = len(calls)
    monkeypatch.setattr(moved.ppo.actor_critic, "recompute", True)
    twice, _ = step(moved)
    for hook in hooks:
        hook.remove()
    assert (kept > 0, len(calls)) == (True, 3 * kept)
    assert_same(twice, once, 1e-6)


# ------------------------------------------------------------------------------------------------------ the correction


def test_where_the_sampler_is_the_policy_the_correction_changes_nothing(moved):
    """Row 36: on by default, and 1 to rounding."""
    assert moved.ppo.table.tis_cap == 2.0
    on, metrics = step(moved)
    off, _ = step(moved, tis_cap=0.0)
    assert_same(on, off, 1e-4)
    assert metrics["tis/weight"] == pytest.approx(1, abs=1e-4)
    assert metrics["tis/capped"] == 0


def off_by(m: Moved, gap: float) -> Batch:
    """A sampler that gave every second token of an answer e^gap times less probability than the policy does."""
    gaps = torch.where(torch.arange(m.batch.mask.shape[1]) % 2 == 0, gap, 0.0) * m.batch.mask
    return replace(m.batch, sampler_logprobs=m.scores.old_logprobs - gaps)


@pytest.mark.parametrize(("gap", "weight"), [(math.log(3), 2.0), (-math.log(2), 0.5)])
def test_a_token_that_the_sampler_gave_another_probability_is_weighed(moved, gap, weight):
    """Row 36: pi_old / pi_sampler = 3 is held at 2, and 1/2 halves: as if those advantages were so much larger."""
    even = (torch.arange(moved.batch.mask.shape[1]) % 2 == 0) & moved.batch.mask
    scaled = moved.targets._replace(advantages=torch.where(even, weight, 1.0) * moved.targets.advantages)
    got, metrics = step(moved, off_by(moved, gap))
    expected, _ = gradient(moved.ppo, moved.batch, moved.scores, scaled, tis_cap=0.0)
    assert_same(got, expected, 1e-5)
    share = even.sum().item() / moved.batch.mask.sum().item()
    assert metrics["tis/weight"] == pytest.approx(1 + share * (weight - 1), rel=1e-4)
    assert metrics["tis/capped"] == pytest.approx(share * (weight == 2.0), abs=1e-6)


def test_what_the_sampler_thought_does_not_matter_without_the_correction(moved):
    """Row 2: sampler log-probabilities off by 3 change the reported gap and nothing else."""
    wrong = off_by(moved, 3.0)
    expected, _ = step(moved, tis_cap=0.0)
    got, _ = step(moved, wrong, tis_cap=0.0)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    targets, metrics = moved.ppo.advantages(wrong, moved.scores)
    assert metrics.pop("sampler_gap") > 1
    assert metrics == {k: v for k, v in moved.metrics.items() if k != "sampler_gap"}
    assert torch.equal(targets.advantages, moved.targets.advantages)
