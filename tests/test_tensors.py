"""Masked means, log-probabilities, entropy, padding and positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthward.tensors import masked_mean, masked_sum, pad, positions, token_entropy, token_logprobs

LOGITS = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=1, max_size=4)
ROWS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5)


def log_softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [z / temperature for z in row]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - total for z in scaled]


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, -0.126928), (2.0, -0.313262)])
def test_logprobs_are_those_of_the_tempered_distribution(temperature, expected):
    """Row 3: z = [2, 0]; log p_0 = -ln(1 + exp(-2/T))."""
    logprob = token_logprobs(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), temperature)
    assert logprob.item() == pytest.approx(expected, abs=1e-6)


@given(LOGITS, st.floats(0.25, 4))
def test_logprobs_equal_a_loop_in_float64(rows, temperature):
    logits = torch.tensor(rows).unsqueeze(0).expand(2, -1, -1)
    for word in range(5):
        got = token_logprobs(logits, torch.full(logits.shape[:2], word), temperature)
        expected = torch.tensor([log_softmax(row, temperature)[word] for row in rows]).expand(2, -1)
        torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-5)


def test_logprobs_of_bf16_logits_are_computed_in_fp32():
    """Row 39: in bf16 a log-probability near -4.2 would move in steps of 0.03."""
    logits = torch.randn(64, 50).bfloat16()
    ids = torch.arange(64) % 50
    got = token_logprobs(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), logits.double().log_softmax(-1)[torch.arange(64), ids], atol=1e-5, rtol=0)
    assert token_entropy(logits).dtype == torch.float32


def test_entropy_hand_numbers():
    """Row 38: uniform over four words is ln 4; (1/2, 1/4, 1/4) is 1.5 ln 2; a certain word is 0."""
    assert token_entropy(torch.zeros(1, 4)).item() == pytest.approx(1.386294, abs=1e-6)
    assert token_entropy(torch.tensor([[0.5, 0.25, 0.25]]).log()).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert token_entropy(torch.tensor([[100.0, 0.0]])).item() == pytest.approx(0, abs=1e-6)


@given(LOGITS, st.floats(0.25, 4))
def test_entropy_is_the_mean_surprise(rows, temperature):
    """Row 38: H = -sum p log p, by a loop in float64."""
    expected = [-math.fsum(math.exp(p) * p for p in log_softmax(row, temperature)) for row in rows]
    torch.testing.assert_close(token_entropy(torch.tensor(rows), temperature), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_masked_mean_weighs_tokens_not_rows():
    """Row 29: rows [3] and [1, 1, 1] have token mean 6/4 = 1.5 (the mean of their means would be 2)."""
    values = torch.tensor([[3.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert masked_sum(values, mask).item() == 6.0
    assert masked_mean(values, mask).item() == 1.5


def test_masked_entries_may_be_nan_and_get_no_gradient():
    values = torch.tensor([1.0, 3.0, float("nan"), float("inf")], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, True, False, False]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.tensor([float("nan")]), torch.tensor([False])).item() == 0.0


@pytest.mark.parametrize(
    ("side", "length", "ids", "mask"),
    [
        ("right", 0, [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ("left", 0, [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]]),
        ("left", 4, [[0, 5, 6, 7], [0, 0, 0, 8]], [[0, 1, 1, 1], [0, 0, 0, 1]]),
        ("right", 2, [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
def test_pad_by_hand(side, length, ids, mask):
    got_ids, got_mask = pad([[5, 6, 7], [8]], 0, side, length)
    assert got_ids.tolist() == ids
    assert got_mask.int().tolist() == mask


@given(ROWS, st.sampled_from(["left", "right"]), st.integers(0, 8), st.integers(0, 9))
def test_pad_keeps_every_token_whatever_the_pad_id(rows, side, length, value):
    """Row 8: the mask goes by length; a pad id that is also a real token changes nothing."""
    ids, mask = pad(rows, value, side, length)
    assert ids.shape[1] == max(length, *map(len, rows))
    assert [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == rows
    assert (ids[~mask] == value).all()


def test_pad_of_no_rows_is_empty():
    ids, mask = pad([], 0, length=3)
    assert ids.shape == mask.shape == (0, 3)


def test_positions_count_from_the_first_real_token():
    """Row 5: cumsum(mask) - 1, never below 0."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
