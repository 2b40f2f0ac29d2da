"""The loss of principle distillation by hand, and as a loop over words."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from constitution.losses import contrastive_target, distillation_loss


def logits(*shares: float) -> torch.Tensor:
    """One token's logits with these probabilities (to a factor, as a constant must not matter)."""
    return tensor([shares]).log() + 3.0


def loss(policy, plain, follow, violate, *, alpha, cutoff=0.0) -> tuple[float, float]:
    made = distillation_loss(*(logits(*p) for p in (policy, plain, follow, violate)), alpha=alpha, cutoff=cutoff)
    return made.losses.item(), made.shift.item()


@pytest.mark.parametrize(("alpha", "target", "shift"), [(0, 0.5, 0.0), (1, 0.8, 0.192745), (2, 16 / 17, 0.469430)])
def test_hand_numbers_of_the_target_and_of_a_policy_that_is_its_parent(alpha, target, shift):
    """p* is 0.5 * (0.8 / 0.5)^a against 0.5 * (0.2 / 0.5)^a: 0.8 at a = 1, 2.56 / 2.72 at a = 2. KL to (0.5, 0.5):
    0.8 ln 1.6 + 0.2 ln 0.4 = 0.376003 - 0.183258; at a = 2 0.595316 - 0.125886."""
    half, told = (0.5, 0.5), (0.8, 0.2)
    made = contrastive_target(logits(*half), logits(*told), logits(*half), alpha=alpha, cutoff=0.0).exp()
    assert made[0].tolist() == pytest.approx([target, 1 - target], abs=1e-6)
    assert loss(half, half, told, half, alpha=alpha) == pytest.approx((shift, shift), abs=1e-6)


def test_the_expectation_is_over_the_target():
    """KL((0.8, 0.2) || (0.9, 0.1)) = 0.8 ln 8/9 + 0.2 ln 2 = 0.044403; the other way round it would be 0.036690."""
    assert loss((0.9, 0.1), (0.5, 0.5), (0.8, 0.2), (0.5, 0.5), alpha=1)[0] == pytest.approx(0.044403, abs=1e-6)


@pytest.mark.parametrize(
    ("cutoff", "target"), [(0.0, (3, 6, 1, 2)), (0.2, (3, 6, 1, 1)), (0.4, (3, 6, 2, 1)), (0.6, (3, 3, 2, 1))]
)
def test_implausible_words_keep_their_probability_before_it_is_normalised(cutoff, target):
    """Follow over violate is (1/2, 2, 1/2, 2); the words have 1, 1/2, 1/3 and 1/6 of the likeliest one's probability."""
    plain, follow, violate = (1 / 2, 1 / 4, 1 / 6, 1 / 12), (1, 2, 1, 2), (2, 1, 2, 1)
    made = contrastive_target(logits(*plain), logits(*follow), logits(*violate), alpha=1.0, cutoff=cutoff).exp()
    assert made[0].tolist() == pytest.approx([t / sum(target) for t in target], abs=1e-6)


ROW = st.lists(st.floats(-6, 6, width=32), min_size=5, max_size=5)


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


@given(st.lists(ROW, min_size=4, max_size=4), st.floats(0, 3), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_loss_is_a_loop_over_words_in_float64(rows, alpha, cutoff):
    policy, plain, follow, violate = (softmax(row) for row in rows)
    weights = [
        p * ((f / v) ** alpha if p >= cutoff * max(plain) else 1) for p, f, v in zip(plain, follow, violate, strict=True)
    ]
    target = [w / math.fsum(weights) for w in weights]
    got = distillation_loss(*(tensor([row]) for row in rows), alpha=alpha, cutoff=cutoff)
    for other, value in ((policy, got.losses), (plain, got.shift)):
        expected = math.fsum(t * math.log(t / o) for t, o in zip(target, other, strict=True) if t)
        assert value.item() == pytest.approx(expected, abs=2e-5)


def test_the_gradient_by_logits_is_policy_less_target():
    drawn = torch.randn(4, 3, 7) * 2
    policy = drawn[0].clone().requires_grad_()
    distillation_loss(policy, *drawn[1:], alpha=1.5, cutoff=0.1).losses.sum().backward()
    target = contrastive_target(*drawn[1:], alpha=1.5, cutoff=0.1).exp()
    torch.testing.assert_close(policy.grad, drawn[0].softmax(-1) - target, atol=1e-6, rtol=0)


def test_without_contrast_the_parent_is_its_own_target():
    """At alpha 0, and where follow and violate say the same."""
    drawn = torch.randn(3, 5, 7) * 3
    for alpha, violate in ((0.0, drawn[2]), (4.0, drawn[1])):
        policy = drawn[0].clone().requires_grad_()
        made = distillation_loss(policy, drawn[0], drawn[1], violate, alpha=alpha, cutoff=0.0)
        made.losses.sum().backward()
        assert made.losses.abs().max() < 1e-6
        assert policy.grad.abs().max() < 1e-6
