"""PPO's update beside TRL's own trainers: the same answers, the same policy object, the same loss, gradient and advantages.

DPO and the preference model have their comparisons in test_dpo and test_reward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_lab import assert_same, disturb, gradient, sampled
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rl.advantages import dr_grpo, grpo, rloo
from truthward.tensors import pad

TEMPERATURE, BETA = 0.7, 0.3
COMMON = ("ppo.parent=sft", "ppo.tune=full", "ppo.group_size=4", f"ppo.temperature={TEMPERATURE}", f"ppo.kl_coef={BETA}")
REDUCTIONS = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "dr_grpo"}


@pytest.fixture(scope="module")
def moved(lab):
    """Two prompts with four answers each, scored; then the policy, which has weights of its own, moves."""
    with lab.ppo(*COMMON, "ppo.advantage=grpo", "ppo.kl_form=k3") as ppo:
        batch, scores, targets = sampled(ppo)
        disturb(ppo, 0.01)
        scores = scores._replace(ref_logprobs=scores.ref_logprobs - 0.2 * batch.mask)
        yield ppo, batch, scores, targets


def trainer(kind: Any, config: Any, ppo: Any, tmp_path: Any, **options: Any) -> Any:
    """One of TRL's trainers around our policy."""
    arguments = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "temperature": TEMPERATURE,
        "max_completion_length": ppo.table.max_new_tokens,
        "gradient_checkpointing": False,
    }
    made = kind(
        model=ppo.actor_critic.policy,
        reward_funcs=[lambda prompts, **_: [0.0] * len(prompts)],
        args=config(**arguments | options),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
        processing_class=ppo.tokenizer,
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def inputs(batch: Any, scores: Any, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """A rollout as TRL's losses take it: prompts padded on the left, answers on the right."""
    prompt_ids, prompt_mask = pad(batch.prompts, 0, side="left")
    completion_ids, _ = pad(batch.answers, 0)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask.long(),
        "completion_ids": completion_ids,
        "completion_mask": batch.mask.long(),
        "old_per_token_logps": scores.old_logprobs,
        "old_logps": (scores.old_logprobs * batch.mask).sum(1),
        "ref_per_token_logps": scores.ref_logprobs,
        "advantages": advantages,
    }


def theirs(made: Any, ppo: Any, rollout: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss by TRL's own code, of the same parameters."""
    ppo.optimizer.zero_grad()
    loss = made._compute_loss(made.model, rollout)
    loss.backward()
    found = {n: p.grad.clone() for n, p in ppo.trainable.items()}
    ppo.optimizer.zero_grad()
    return found, loss.item()


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("loss_type", list(REDUCTIONS))
def test_loss_and_gradient_are_trls_grpo(moved, tmp_path, loss_type, beta):
    """Row 29: grpo, bnpo and dr_grpo are means by answers, by tokens and by a constant; row 12: k3 times the ratio."""
    ppo, batch, scores, targets = moved
    made = trainer(GRPOTrainer, GRPOConfig, ppo, tmp_path, loss_type=loss_type, beta=0.0, epsilon=0.2)
    made.beta = beta  # set afterwards, as no reference of theirs is wanted: the log-probabilities are given
    assert made.args.use_bias_correction_kl
    expected, loss = theirs(made, ppo, inputs(batch, scores, targets.advantages[:, 0]))
    ppo.progress.kl_coef = beta
    got, metrics = gradient(ppo, batch, scores, targets, reduction=REDUCTIONS[loss_type], tis_cap=0.0)
    assert metrics["loss/policy"] == pytest.approx(loss, abs=1e-6)
    assert_same(got, expected, 1e-5)
    assert 0.05 < metrics["clipped"] < 0.95
    (clipped,) = made._metrics["train"]["clip_ratio/region_mean"]
    assert metrics["clipped"] == pytest.approx(clipped, abs=1e-6)


def test_dual_clip_is_trls_two_sided_clip(moved, tmp_path):
    """Row 23: their delta bounds the ratio where the advantage is below 0, ours the loss there: at 1.3 it bites."""
    ppo, batch, scores, targets = moved
    made = trainer(GRPOTrainer, GRPOConfig, ppo, tmp_path, loss_type="bnpo", beta=0.0, epsilon=0.2, delta=1.3)
    expected, loss = theirs(made, ppo, inputs(batch, scores, targets.advantages[:, 0]))
    ppo.progress.kl_coef = 0.0
    got, metrics = gradient(ppo, batch, scores, targets, tis_cap=0.0, dual_clip=1.3)
    free, _ = gradient(ppo, batch, scores, targets, tis_cap=0.0)
    assert metrics["loss/policy"] == pytest.approx(loss, abs=1e-6)
    assert_same(got, expected, 1e-5)
    assert any((free[n] - got[n]).abs().max() > 1e-3 for n in got)


def test_loss_and_gradient_are_trls_rloo(moved, tmp_path):
    """The ratio of whole answers is clipped, and every answer counts alike."""
    ppo, batch, scores, targets = moved
    made = trainer(RLOOTrainer, RLOOConfig, ppo, tmp_path, beta=0.0, epsilon=0.2)
    expected, loss = theirs(made, ppo, inputs(batch, scores, targets.advantages[:, 0]))
    ppo.progress.kl_coef = 0.0
    got, metrics = gradient(ppo, batch, scores, targets, reduction="sequence", ratio="sequence", tis_cap=0.0)
    assert metrics["loss/policy"] == pytest.approx(loss, abs=1e-5)
    assert_same(got, expected, 1e-5)


# ---------------------------------------------------------------------------------------------------------- advantages

REWARDS = torch.tensor([0.3, 1.0, -2.0, 0.5, 4.0, 4.0, 4.0, 4.5])


def their_advantages(made: Any, batch: Any) -> dict[str, torch.Tensor]:
    """TRL's own scoring of given answers and rewards."""
    generated = (batch.prompts, batch.answers, [""] * 8)
    if isinstance(made, GRPOTrainer):
        generated = (batch.prompts, batch.answers, None, [""] * 8, None, {}, None, None)
    made._generate = lambda prompts: generated
    made._calculate_rewards = lambda *_: REWARDS.unsqueeze(1)
    return made._generate_and_score_completions([{"prompt": "x"}] * 8)


@pytest.mark.parametrize(("scale", "estimator"), [("group", grpo), ("none", dr_grpo)])
def test_advantages_are_trls_grpo(moved, tmp_path, scale, estimator):
    """The sample's deviation and 1e-4, or the mean alone."""
    ppo, batch, *_ = moved
    made = trainer(GRPOTrainer, GRPOConfig, ppo, tmp_path, scale_rewards=scale, beta=0.0)
    torch.testing.assert_close(estimator(REWARDS, 4), their_advantages(made, batch)["advantages"], atol=1e-6, rtol=0)


def test_advantages_are_trls_rloo(moved, tmp_path):
    """Less the mean of the others."""
    ppo, batch, *_ = moved
    made = trainer(RLOOTrainer, RLOOConfig, ppo, tmp_path, beta=0.0)
    torch.testing.assert_close(rloo(REWARDS, 4), their_advantages(made, batch)["advantages"], atol=1e-6, rtol=0)
