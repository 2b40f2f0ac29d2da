"""The losses and estimators of DPO, PPO and the preference model: hand numbers, loops in float64, known gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from reward.losses import preference_loss
from rl.advantages import approximate_kl, gae, token_rewards, whiten
from rl.losses import dpo_loss, ppo_loss, value_loss

NUMBER = st.floats(-5, 5)
ROW = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=8)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


# ---------------------------------------------------------------------------------------------------------- rewards


def test_the_kl_penalty_of_a_token():
    """Row 11: beta 0.1, log pi -1, log ref -1.5 gives -0.1 * 0.5 = -0.05."""
    got = token_rewards(tensor([0.0]), tensor([[-1.0]]), tensor([[-1.5]]), ones(1, 1), kl_coef=0.1)
    assert got.item() == pytest.approx(-0.05)


def test_the_score_lands_on_the_last_token_that_counts():
    """Row 10: three tokens and two of padding give [-b k1, -b k2, -b k3 + s, 0, 0]; what padding holds is ignored."""
    mask = tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    policy = torch.where(mask, tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.nan)
    got = token_rewards(tensor([10.0, 20.0, 30.0]), policy, torch.zeros(3, 5), mask, kl_coef=0.1)
    expected = [[-0.1, -0.2, 9.7, 0, 0], [19.9, 0, 0, 0, 0], [-0.1, -0.2, -0.3, -0.4, 29.5]]
    torch.testing.assert_close(got, tensor(expected))


# -------------------------------------------------------------------------------------------------------------- GAE


def test_gae_hand_number():
    """Row 15: r = [0,0,1], V = .5: d = [0,0,.5]; A3 = .5, A2 = .95 * .5 = .475, A1 = .95 * .475 = .45125."""
    got = gae(tensor([[0.0, 0, 1]]), torch.full((1, 3), 0.5), ones(1, 3), gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(got.advantages, tensor([[0.45125, 0.475, 0.5]]))
    torch.testing.assert_close(got.returns, tensor([[0.95125, 0.975, 1.0]]))


@given(ROW, st.floats(0.5, 1), st.floats(0, 1))
def test_gae_equals_its_definition(row, gamma, lam):
    """Row 15: A_t = sum_k (g l)^k d_{t+k}, by a double loop; row 16: V is 0 after the last token."""
    rewards, values = zip(*row, strict=True)
    ahead = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, ahead, strict=True)]
    expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(row))]
    as_row = [tensor([x], dtype=torch.float64) for x in (rewards, values)]
    got = gae(*as_row, ones(1, len(row)), gamma=gamma, gae_lambda=lam)
    torch.testing.assert_close(got.advantages[0], tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(got.returns[0] - got.advantages[0], tensor(values, dtype=torch.float64))


@given(ROW, st.integers(1, 5))
def test_padding_never_leaks_into_gae(row, extra):
    """Row 17: more padding, whatever it holds, changes no number and gets none."""
    rewards, values = torch.tensor(row).T.unsqueeze(1)
    alone = gae(rewards, values, ones(1, len(row)), gamma=0.9, gae_lambda=0.8)
    junk = torch.full((1, extra), torch.nan)
    mask = torch.cat([ones(1, len(row)), ~ones(1, extra)], 1)
    padded = gae(torch.cat([rewards, junk], 1), torch.cat([values, junk], 1), mask, gamma=0.9, gae_lambda=0.8)
    for one, other in zip(alone, padded, strict=True):
        assert torch.equal(one, other[:, : len(row)])
        assert (other[:, len(row) :] == 0).all()


def test_gae_with_values_of_zero_is_the_discounted_reward_to_come():
    """Row 26: a critic that begins at 0 leaves A_t = sum_k (g l)^k r_{t+k}: [1 + .5 * 2 + .25 * 4, 2 + .5 * 4, 4]."""
    got = gae(tensor([[1.0, 2, 4]]), torch.zeros(1, 3), ones(1, 3), gamma=1.0, gae_lambda=0.5)
    assert got.advantages.tolist() == [[3.0, 4.0, 4.0]] == got.returns.tolist()


def test_gae_with_lambda_one_is_the_return_less_the_value():
    got = gae(tensor([[1.0, 2, 4]]), tensor([[5.0, 6, 7]]), ones(1, 3), gamma=1.0, gae_lambda=1.0)
    assert got.returns.tolist() == [[7.0, 6.0, 4.0]]
    assert got.advantages.tolist() == [[2.0, 0.0, -3.0]]


# -------------------------------------------------------------------------------------------------------- whitening


def test_whitening_hand_number():
    """Row 18: [1, 2, 3] with the population's variance 2/3 becomes [-1.224745, 0, 1.224745]."""
    got = whiten(tensor([[1.0, 2.0, 3.0]]), ones(1, 3))
    torch.testing.assert_close(got, tensor([[-1.224745, 0, 1.224745]]), atol=1e-5, rtol=0)


def test_whitening_is_over_all_rows_and_counts_no_padding():
    """Row 18: the same numbers in other rows, between padding, become the same."""
    spread = tensor([[1.0, torch.nan], [2.0, 3.0]])
    got = whiten(spread, tensor([[True, False], [True, True]]))
    torch.testing.assert_close(got, tensor([[-1.224745, 0], [0, 1.224745]]), atol=1e-5, rtol=0)


@given(
    st.lists(NUMBER, min_size=3, max_size=8, unique=True).filter(lambda x: max(x) - min(x) > 0.1), st.floats(0.5, 20), NUMBER
)
def test_whitening_forgets_scale_and_offset(values, scale, offset):
    x = tensor(values, dtype=torch.float64)
    got = whiten(x, ones(len(values)))
    assert got.mean().item() == pytest.approx(0, abs=1e-9)
    assert got.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(got, whiten(scale * x + offset, ones(len(values))), atol=1e-4, rtol=0)


def test_whitening_equal_advantages_gives_zeros():
    assert whiten(torch.full((2, 2), 3.0), ones(2, 2)).tolist() == [[0, 0], [0, 0]]


# --------------------------------------------------------------------------------------------------------------- KL

LOGITS = [0.3, -1.2, 0.8, 2.0, -0.5, 0.1]
REFERENCE = [1.0, 0.2, -0.7, 0.4, 0.0, -1.5]


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
    return (p.exp() * ppo_loss(policy, p, advantages.squeeze(1), clip_range=0.2).losses).sum()


def test_k1_in_the_reward_gives_the_exact_gradient_of_the_reverse_kl():
    """Rows 11 and 12: summed over all outcomes, token_rewards -> gae -> ppo_loss is the gradient of KL(pi || ref)."""
    torch.testing.assert_close(gradient(k1_in_reward), gradient(reverse_kl))


def test_k3_as_a_loss_gives_the_gradient_of_the_forward_kl():
    """Row 12: why k3 is only reported. It is another gradient; and k1 as a loss has none at all."""
    k3 = gradient(lambda policy, ref: (policy.detach().exp() * approximate_kl(policy - ref)).sum())
    k1 = gradient(lambda policy, ref: (policy.detach().exp() * (policy - ref)).sum())
    torch.testing.assert_close(k3, gradient(forward_kl))
    assert (k3 - gradient(reverse_kl)).abs().max() > 0.1
    torch.testing.assert_close(k1, torch.zeros(6).double())


def test_k3_hand_number():
    """Row 13: d = .5 gives exp(-.5) + .5 - 1 = .106531; d = 0 gives 0."""
    torch.testing.assert_close(approximate_kl(tensor([0.5, 0.0])), tensor([0.106531, 0.0]), atol=1e-6, rtol=0)


def test_the_mean_of_k3_is_the_kl():
    """Row 13: sum_x p(x) k3(x) = KL(p || q)."""
    policy, ref = (tensor(z, dtype=torch.float64).log_softmax(0) for z in (LOGITS, REFERENCE))
    assert (policy.exp() * approximate_kl(policy - ref)).sum().item() == pytest.approx(reverse_kl(policy, ref).item())


@given(st.floats(-20, 20, width=32))
def test_k3_is_never_negative(difference):
    """Row 13."""
    assert approximate_kl(tensor(difference)).item() >= 0


def test_k3_keeps_its_digits_near_zero():
    """Row 13: at d = .001 it is d^2/2 - d^3/6 = 4.99833e-7, where exp(-d) + d - 1 in fp32 is off by a tenth."""
    assert approximate_kl(tensor(1e-3)).item() == pytest.approx(4.99833e-7, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"), [(1, 1.5, -1.2, True), (-1, 1.5, 1.5, False), (-1, 0.5, 0.8, True)]
)
def test_policy_clip_hand_numbers(advantage, ratio, loss, clipped):
    """Row 22: max(-A r, -A clip(r, .8, 1.2))."""
    got = ppo_loss(tensor([[ratio]]).log(), torch.zeros(1, 1), tensor([[float(advantage)]]), clip_range=0.2)
    assert got.losses.item() == pytest.approx(loss)
    assert got.ratio.item() == pytest.approx(ratio)
    assert got.clipped.item() is clipped


@given(st.floats(-2, 2), st.floats(-2, 2), NUMBER, st.floats(0.05, 0.5))
def test_policy_loss_equals_plain_arithmetic(new, old, advantage, clip):
    """Row 22, any numbers."""
    ratio = math.exp(new - old)
    expected = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))
    values = (tensor([x], dtype=torch.float64) for x in (new, old, advantage))
    assert ppo_loss(*values, clip_range=clip).losses.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_clipped_ratio_gets_no_gradient_and_a_free_one_gets_a_times_r():
    """Row 22: dL/dlog pi = -A r while free, 0 where the clip holds it."""
    new = tensor([1.5, 1.1, 1.5, 0.5]).log().requires_grad_()
    ppo_loss(new, torch.zeros(4), tensor([2.0, 2.0, -2.0, -2.0]), clip_range=0.2).losses.sum().backward()
    torch.testing.assert_close(new.grad, tensor([0.0, -2.2, 3.0, 0.0]))


def test_value_clip_hand_number():
    """Row 24: v_old 0, v 1, R 1 is held at .2: .5 max(0, .64) = .32, though v itself is right."""
    got = value_loss(tensor([1.0]), tensor([0.0]), tensor([1.0]), clip_range=0.2)
    assert got.losses.item() == pytest.approx(0.32)
    assert got.clipped.item() is True


@given(NUMBER, NUMBER, NUMBER, st.floats(0.05, 1))
def test_value_loss_equals_plain_arithmetic(value, old, target, clip):
    """Row 24, any numbers."""
    held = min(max(value, old - clip), old + clip)
    expected = 0.5 * max((value - target) ** 2, (held - target) ** 2)
    got = value_loss(*(tensor([x], dtype=torch.float64) for x in (value, old, target)), clip_range=clip)
    assert got.losses.item() == pytest.approx(expected)


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
        *ppo_loss(x, x, x, clip_range=0.2)[1:],
        *value_loss(x, x, x, clip_range=0.2)[1:],
        *preference_loss(x, x, x, center_coef=0.1)[1:],
    ]
    assert not any(o.requires_grad for o in outputs)
