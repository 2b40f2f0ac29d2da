"""From scores to advantages: hand numbers, loops in float64, and what never changes an advantage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from rl.advantages import adapted_kl_coef, approximate_kl, dr_grpo, gae, grpo, rloo, token_rewards, whiten

NUMBER = st.floats(-5, 5)
ROW = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=8)


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


# ----------------------------------------------------------------------------------------------- answers to one prompt


def test_rloo_hand_numbers():
    """R = [1, 2, 3, 6] as two pairs: less the sibling's; as one group: less 11/3, 10/3, 9/3 and 6/3."""
    returns = tensor([1.0, 2, 3, 6])
    assert rloo(returns, 2).tolist() == [-1, 1, -3, 3]
    torch.testing.assert_close(rloo(returns, 4), tensor([-8 / 3, -4 / 3, 0, 4]))


def test_grpo_hand_numbers():
    """[1, 2] has sample deviation .707107: -.5 / .707207 = -.707007; alike answers get 0."""
    torch.testing.assert_close(grpo(tensor([1.0, 2, 5, 5]), 2), tensor([-0.707007, 0.707007, 0, 0]), atol=1e-6, rtol=0)


def test_dr_grpo_hand_numbers():
    """Less the mean, and not over the deviation: [1, 2] and [3, 7] give -.5, .5, -2, 2."""
    assert dr_grpo(tensor([1.0, 2, 3, 7]), 2).tolist() == [-0.5, 0.5, -2, 2]


@pytest.mark.parametrize("estimator", [rloo, grpo, dr_grpo])
@given(st.lists(NUMBER, min_size=6, max_size=6), NUMBER)
def test_what_a_prompt_adds_to_all_its_answers_does_not_count(estimator, returns, offset):
    """A harder prompt is a lower mean, and advantages of a group sum to 0; other groups are not looked at."""
    one = tensor(returns, dtype=torch.float64)
    got = estimator(one, 3)
    shifted = estimator(torch.cat([one[:3] + offset, one[3:] * 2]), 3)
    torch.testing.assert_close(got[:3], shifted[:3], atol=1e-6, rtol=1e-6)
    assert got[:3].sum().item() == pytest.approx(0, abs=1e-9)


@given(st.lists(NUMBER, min_size=4, max_size=4))
def test_rloo_is_dr_grpo_times_the_group_over_one_less(returns):
    torch.testing.assert_close(rloo(tensor(returns), 4), dr_grpo(tensor(returns), 4) * 4 / 3)


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


def test_k3_hand_number():
    """Row 13: d = .5 gives exp(-.5) + .5 - 1 = .106531; d = 0 gives 0."""
    torch.testing.assert_close(approximate_kl(tensor([0.5, 0.0])), tensor([0.106531, 0.0]), atol=1e-6, rtol=0)


@given(st.lists(NUMBER, min_size=4, max_size=4), st.lists(NUMBER, min_size=4, max_size=4))
def test_the_mean_of_k3_is_the_kl(one, other):
    """Row 13: sum_x p(x) k3(x) = sum_x p(x) d(x) = KL(p || q)."""
    p, q = (tensor(z, dtype=torch.float64).log_softmax(0) for z in (one, other))
    got, expected = (p.exp() * approximate_kl(p - q)).sum(), (p.exp() * (p - q)).sum()
    assert got.item() == pytest.approx(expected.item(), abs=1e-9)


@given(st.floats(-20, 20, width=32))
def test_k3_is_never_negative(difference):
    """Row 13: whatever the difference."""
    assert approximate_kl(tensor(difference)).item() >= 0


def test_k3_keeps_its_digits_near_zero():
    """Row 13: at d = .001 it is d^2/2 - d^3/6 = 4.99833e-7, where exp(-d) + d - 1 in fp32 is off by a tenth."""
    assert approximate_kl(tensor(1e-3)).item() == pytest.approx(4.99833e-7, rel=1e-3)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(9.0, 0.201024), (6.6, 0.200512), (6.0, 0.2), (5.7, 0.199744), (0.0, 0.198976), (-3.0, 0.198976)],
)
def test_the_adaptive_kl_coefficient(kl, expected):
    """Row 14: beta .2, target 6, n 256, horizon 1e4: .2 (1 + clip(KL/6 - 1, -.2, .2) .0256), at KL 9 .201024."""
    assert adapted_kl_coef(0.2, kl, target=6.0, horizon=10_000, answers=256) == pytest.approx(expected, abs=1e-9)


def test_over_a_horizon_the_kl_coefficient_changes_by_a_fifth():
    """Row 14: 100 changes of 100 answers each at far too high a KL: (1 + .2 / 100)^100 = 1.2212."""
    beta = 1.0
    for _ in range(100):
        beta = adapted_kl_coef(beta, math.inf, target=6.0, horizon=10_000, answers=100)
    assert beta == pytest.approx(1.2211, abs=1e-4)
