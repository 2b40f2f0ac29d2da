"""The losses of DPO, PPO and the preference model: hand numbers, loops in float64, known gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from reward.losses import preference_loss
from rl.advantages import approximate_kl, gae, token_rewards
from rl.losses import (
    answer_log_ratio,
    constant_mean,
    dpo_loss,
    dpo_positive_loss,
    dual_clip,
    importance_weights,
    k2_loss,
    k3_loss,
    ppo_loss,
    sequence_mean,
    token_mean,
    value_loss,
)

NUMBER = st.floats(-5, 5)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


# ------------------------------------------------------------------------------------------ the gradient of the KL

LOGITS = [0.3, -1.2, 0.8, 2.0, -0.5, 0.1]
REFERENCE = [1.0, 0.2, -0.7, 0.4, 0.0, -1.5]
OLD = tensor([0.6, -0.9, 0.2, 1.4, 0.3, -0.4], dtype=torch.float64).log_softmax(0)


def gradient(loss_of) -> torch.Tensor:
    """d loss / d logits, where ``loss_of`` takes the policy's and the reference's log-probabilities."""
    logits = tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    loss_of(logits.log_softmax(0), tensor(REFERENCE, dtype=torch.float64).log_softmax(0)).backward()
    return logits.grad


def reverse_kl(policy, ref):
    return (policy.exp() * (policy - ref)).sum()


def forward_kl(policy, ref):
    return (ref.exp() * (ref - policy)).sum()


def k1_in_reward(policy, ref):
    """The expected policy-gradient loss, exact over the six outcomes: each is an answer of one token."""
    p = policy.detach()
    rewards = token_rewards(torch.zeros(6).double(), p.unsqueeze(1), ref.unsqueeze(1), ones(6, 1), kl_coef=1.0)
    advantages = gae(rewards, torch.zeros(6, 1).double(), ones(6, 1), gamma=1.0, gae_lambda=0.95).advantages
    return (p.exp() * ppo_loss(policy - p, advantages.squeeze(1), clip_range=0.2).losses).sum()


def test_k1_in_the_reward_gives_the_exact_gradient_of_the_reverse_kl():
    """Rows 11 and 12: summed over all outcomes, token_rewards -> gae -> ppo_loss is the gradient of KL(pi || ref)."""
    torch.testing.assert_close(gradient(k1_in_reward), gradient(reverse_kl))


@pytest.mark.parametrize("estimator", [k2_loss, k3_loss])
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
def test_k2_and_k3_with_the_ratio_as_losses_give_the_gradient_of_the_reverse_kl(estimator, old):
    """Row 12: the expectation under the policy that sampled, be it the policy itself or an older one."""

    def expected(policy, ref):
        sampled = policy.detach() if old is None else old
        return (sampled.exp() * estimator(policy, sampled, ref)).sum()

    torch.testing.assert_close(gradient(expected), gradient(reverse_kl))


def test_plain_k3_gives_the_gradient_of_the_forward_kl_and_k1_as_a_loss_none():
    """Row 12: why neither is offered."""
    k3 = gradient(lambda policy, ref: (policy.detach().exp() * approximate_kl(policy - ref)).sum())
    k1 = gradient(lambda policy, ref: (policy.detach().exp() * (policy - ref)).sum())
    torch.testing.assert_close(k3, gradient(forward_kl))
    assert (k3 - gradient(reverse_kl)).abs().max() > 0.1
    torch.testing.assert_close(k1, torch.zeros(6).double())


def test_the_kl_losses_at_hand_numbers():
    """Row 13: log pi -1, log ref -1.5, old -1: k2 = .125, k3 = .106531; at a ratio of e^.5 both times 1.648721."""
    here, ref = tensor([-1.0]), tensor([-1.5])
    assert k2_loss(here, here, ref).item() == pytest.approx(0.125)
    assert k3_loss(here, here, ref).item() == pytest.approx(0.106531, abs=1e-6)
    assert k2_loss(here, ref, ref).item() == pytest.approx(0.125 * 1.648721)
    assert k3_loss(here, ref, ref).item() == pytest.approx(0.106531 * 1.648721, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"), [(1, 1.5, -1.2, True), (-1, 1.5, 1.5, False), (-1, 0.5, 0.8, True)]
)
def test_policy_clip_hand_numbers(advantage, ratio, loss, clipped):
    """Row 22: max(-A r, -A clip(r, .8, 1.2))."""
    got = ppo_loss(tensor([ratio]).log(), tensor([float(advantage)]), clip_range=0.2)
    assert got.losses.item() == pytest.approx(loss)
    assert got.ratio.item() == pytest.approx(ratio)
    assert got.clipped.item() is clipped


@given(st.floats(-2, 2), NUMBER, st.floats(0.05, 0.5))
def test_policy_loss_equals_plain_arithmetic(log_ratio, advantage, clip):
    """Row 22: for any numbers."""
    ratio = math.exp(log_ratio)
    expected = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))
    got = ppo_loss(*pair(log_ratio, advantage), clip_range=clip)
    assert got.losses.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_clipped_ratio_gets_no_gradient_and_a_free_one_gets_a_times_r():
    """Row 22: dL/dlog pi = -A r while free, 0 where the clip holds it."""
    new = tensor([1.5, 1.1, 1.5, 0.5]).log().requires_grad_()
    ppo_loss(new, tensor([2.0, 2.0, -2.0, -2.0]), clip_range=0.2).losses.sum().backward()
    torch.testing.assert_close(new.grad, tensor([0.0, -2.2, 3.0, 0.0]))


def test_dual_clip_hand_numbers():
    """Row 23: A = -1 and r = 10 lose 3 rather than 10; r = 2 is below the bound; a good token's loss is not bounded."""
    ratio, advantages = tensor([10.0, 2.0, 10.0, 10.0]).log().requires_grad_(), tensor([-1.0, -1.0, 1.0, -2.0])
    got = dual_clip(ppo_loss(ratio, advantages, clip_range=0.2).losses, advantages, bound=3.0)
    torch.testing.assert_close(got, tensor([3.0, 2.0, -1.2, 6.0]))
    got.sum().backward()
    torch.testing.assert_close(ratio.grad, tensor([0.0, 2.0, 0.0, 0.0]))


def test_the_ratio_of_an_answer_is_the_product_of_its_tokens():
    """Answers [.1, .2] and [-.3] in log-ratios: .3, .3, -.3; each token's gradient is that of the whole."""
    tokens = tensor([0.1, 0.2, -0.3], requires_grad=True)
    got = answer_log_ratio(tokens, tensor([0, 0, 1]))
    torch.testing.assert_close(got, tensor([0.3, 0.3, -0.3]))
    (got * tensor([1.0, 10.0, 100.0])).sum().backward()
    assert tokens.grad.tolist() == [11, 11, 100]


def test_importance_weights_hand_numbers():
    """Row 36: a gap of ln 3 is held at 2, -ln 2 gives .5, 0 gives 1; where it isn't finite the weight is 1."""
    gap = tensor([math.log(3), -math.log(2), 0.0, math.nan, math.inf, -math.inf])
    old = torch.full((6,), -2.0, requires_grad=True)
    got = importance_weights(old + gap, torch.full((6,), -2.0), cap=2.0)
    torch.testing.assert_close(got, tensor([2.0, 0.5, 1.0, 1.0, 1.0, 1.0]))
    assert not got.requires_grad


def test_value_clip_hand_number():
    """Row 24: v_old 0, v 1, R 1 is held at .2: .5 max(0, .64) = .32, though v itself is right."""
    got = value_loss(tensor([1.0]), tensor([0.0]), tensor([1.0]), clip_range=0.2)
    assert got.losses.item() == pytest.approx(0.32)
    assert got.clipped.item() is True


@given(NUMBER, NUMBER, NUMBER, st.floats(0.05, 1))
def test_value_loss_equals_plain_arithmetic(value, old, target, clip):
    """Row 24: for any numbers."""
    held = min(max(value, old - clip), old + clip)
    expected = 0.5 * max((value - target) ** 2, (held - target) ** 2)
    assert value_loss(*pair(value, old, target), clip_range=clip).losses.item() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- reductions


def test_reductions_hand_numbers():
    """Row 29: rows [3] and [1, 1, 1]: by tokens 6/4, by answers (3 + 1)/2, Dr. GRPO at 4 tokens 6/(2 * 4)."""
    losses, mask = tensor([[3.0, 9.0, 9.0], [1.0, 1.0, 1.0]]), tensor([[1, 0, 0], [1, 1, 1]]).bool()
    weights = (token_mean(mask), sequence_mean(mask), constant_mean(mask, 4))
    assert [(w * losses).sum().item() for w in weights] == pytest.approx([1.5, 2.0, 0.75])


def test_an_answer_of_which_nothing_counts_is_not_counted():
    """Row 9: an answer left out of the loss makes the others count for more, and where all are, nothing is divided by 0."""
    mask = tensor([[0, 0], [1, 1]]).bool()
    for weights in (token_mean(mask), sequence_mean(mask), constant_mean(mask, 2)):
        assert weights.tolist() == [[0, 0], [0.5, 0.5]]
    for weights in (token_mean(~ones(2, 2)), sequence_mean(~ones(2, 2)), constant_mean(~ones(2, 2), 2)):
        assert weights.sum().item() == 0


# ---------------------------------------------------------------------------------------------- DPO and preferences


def pair(*numbers: float) -> list[torch.Tensor]:
    return [tensor([x], dtype=torch.float64) for x in numbers]


@given(NUMBER, NUMBER, st.floats(0, 1), st.floats(0.01, 2))
def test_dpo_starts_at_ln_two(chosen, rejected, probability, beta):
    """Policy and reference alike: the margin is 0 and the loss ln 2, whatever the label."""
    got = dpo_loss(*pair(chosen, rejected, chosen, rejected, probability), beta=beta)
    assert got.losses.item() == pytest.approx(math.log(2), abs=1e-12)


def test_dpo_hand_number():
    """beta .1 and D = (-20 + 24) - (-30 + 24) = 10: margin 1, loss ln(1 + 1/e) = .313262; rewards .4 and -.6."""
    got = dpo_loss(*pair(-20, -30, -24, -24, 1), beta=0.1)
    assert got.losses.item() == pytest.approx(0.313262, abs=1e-6)
    assert (got.chosen_rewards.item(), got.rejected_rewards.item()) == pytest.approx((0.4, -0.6))


@given(NUMBER, NUMBER, NUMBER, NUMBER, st.floats(0.01, 2))
def test_dpo_at_a_hard_label_is_trls_sigmoid_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """TRL: -logsigmoid(beta ((log pi_w - log pi_l) - (log ref_w - log ref_l)))."""
    delta = (chosen - rejected) - (ref_chosen - ref_rejected)
    got = dpo_loss(*pair(chosen, rejected, ref_chosen, ref_rejected, 1), beta=beta)
    assert got.losses.item() == pytest.approx(softplus(-beta * delta), abs=1e-12)


@given(NUMBER, NUMBER, NUMBER, NUMBER, st.floats(0, 1))
def test_soft_labels_are_symmetric(chosen, rejected, ref_chosen, ref_rejected, probability):
    """A pair at p and the swapped pair at 1 - p are the same statement, for DPO and for the preference model."""
    one = dpo_loss(*pair(chosen, rejected, ref_chosen, ref_rejected, probability), beta=0.3)
    other = dpo_loss(*pair(rejected, chosen, ref_rejected, ref_chosen, 1 - probability), beta=0.3)
    assert one.losses.item() == pytest.approx(other.losses.item())
    one, other = (
        preference_loss(*pair(*numbers), center_coef=0.01)
        for numbers in ((chosen, rejected, probability), (rejected, chosen, 1 - probability))
    )
    assert one.losses.item() == pytest.approx(other.losses.item())


def test_dpo_positive_hand_number():
    """beta .1, lambda 5: chosen fell from -24 to -25, so D = (-25 + 24) - (-40 + 24) - 5 * 1 = 10: ln(1 + 1/e)."""
    got = dpo_positive_loss(*pair(-25, -40, -24, -24, 1), beta=0.1, positive_coef=5)
    assert got.losses.item() == pytest.approx(0.313262, abs=1e-6)
    assert (got.chosen_rewards.item(), got.rejected_rewards.item()) == pytest.approx((-0.1, -1.6))


@given(NUMBER, NUMBER, NUMBER, NUMBER, st.floats(0.1, 9))
def test_dpo_positive_is_dpo_where_the_chosen_answer_gained(gain, rejected, ref_chosen, ref_rejected, coef):
    """The price is on lost likelihood alone; where there is some, the loss is never lower than DPO's."""
    chosen = ref_chosen + abs(gain)
    numbers = pair(chosen, rejected, ref_chosen, ref_rejected, 1)
    plain = dpo_loss(*numbers, beta=0.3).losses.item()
    assert dpo_positive_loss(*numbers, beta=0.3, positive_coef=coef).losses.item() == pytest.approx(plain, abs=1e-12)
    numbers[0] = numbers[2] - abs(gain)
    plain = dpo_loss(*numbers, beta=0.3).losses.item()
    assert dpo_positive_loss(*numbers, beta=0.3, positive_coef=coef).losses.item() >= plain


@given(NUMBER, NUMBER, st.floats(0, 1))
def test_a_soft_label_is_the_expected_loss_of_a_hard_one(chosen, rejected, probability):
    """p L(w > l) + (1 - p) L(l > w)."""
    margin = 0.3 * (chosen - rejected)
    expected = probability * softplus(-margin) + (1 - probability) * softplus(margin)
    assert dpo_loss(*pair(chosen, rejected, 0, 0, probability), beta=0.3).losses.item() == pytest.approx(expected, abs=1e-12)
    got = preference_loss(*pair(0.3 * chosen, 0.3 * rejected, probability), center_coef=0.0)
    assert got.losses.item() == pytest.approx(expected, abs=1e-12)


def test_a_soft_label_pulls_towards_its_own_odds():
    """The loss is least where sigmoid(margin) = p: at p = .75, margin ln 3, the gradient is 0."""
    margin = tensor([math.log(3)], dtype=torch.float64, requires_grad=True)
    zero, label = torch.zeros(1).double(), torch.full((1,), 0.75).double()
    (dpo_loss(margin, zero, zero, zero, label, beta=1.0).losses.sum()).backward()
    (preference_loss(margin, zero, label, center_coef=0.0).losses.sum()).backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-12)


def test_preference_loss_hand_number():
    """r = 1.5 and .5, c = .01: ln(1 + 1/e) + .01 * 2^2 = .353262 (TRL's RewardTrainer at the same numbers)."""
    got = preference_loss(tensor([1.5]), tensor([0.5]), tensor([1.0]), center_coef=0.01)
    assert got.losses.item() == pytest.approx(0.353262, abs=1e-6)
    assert (got.margins.item(), got.correct.item()) == (1.0, True)


def test_a_tie_is_not_correct():
    assert preference_loss(tensor([1.0]), tensor([1.0]), tensor([1.0]), center_coef=0.0).correct.item() is False


def test_metrics_carry_no_gradient():
    x = torch.ones(1, requires_grad=True)
    outputs = [
        *dpo_loss(x, x, x, x, x, beta=0.1)[1:],
        *ppo_loss(x, x, clip_range=0.2)[1:],
        *value_loss(x, x, x, clip_range=0.2)[1:],
        *preference_loss(x, x, x, center_coef=0.1)[1:],
    ]
    assert not any(o.requires_grad for o in outputs)
