"""The two-stage bootstrap against worked numbers, another library's, and simulated banks whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthward.resampling import (
    area_under,
    calibration_error,
    confidence_area,
    difference_of,
    draw_weights,
    holm,
    interval_of,
    mean_of,
    paired_power,
    selective_accuracy,
)

ONCE = np.ones((1, 4))
NAN = np.nan


def test_every_resample_draws_as_many_topics_as_there_are_and_each_whole():
    """Topics of 3 and 1 questions: two draws of a topic give 2, 4 or 6 questions."""
    weights = draw_weights(["a", "a", "b", "a"], 500, 0)
    drawn_b = weights[:, 2]
    drawn_a = weights[:, [0, 1, 3]].sum(1)
    assert set(zip(drawn_a, drawn_b, strict=True)) == {(6, 0), (3, 1), (0, 2)}
    assert np.array_equal(weights, draw_weights(["a", "a", "b", "a"], 500, 0))
    assert not np.array_equal(weights, draw_weights(["a", "a", "b", "a"], 500, 1))


def test_with_one_topic_it_is_the_plain_bootstrap():
    weights = draw_weights(["a"] * 50, 4000, 0)
    assert (weights.sum(1) == 50).all()
    values = np.random.default_rng(1).normal(0, 1, 50)
    assert np.std(mean_of(weights, values)) == pytest.approx(values.std() / np.sqrt(50), rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_intervals_cover_whether_or_not_topics_differ(spread):
    """Eight topics of 26 questions; the plain bootstrap covers 0.80 of the time when topics differ by 0.1."""
    generator = np.random.default_rng(3)
    topics = [str(k) for k in range(8) for _ in range(26)]
    inside = 0
    for turn in range(300):
        rates = np.repeat(np.clip(0.5 + generator.normal(0, spread, 8), 0, 1), 26)
        found = interval_of(mean_of, draw_weights(topics, 300, turn), [(generator.random(208) < rates).astype(float)])
        inside += found.low <= 0.5 <= found.high
    assert inside / 300 >= 0.92


def test_what_was_not_scored_is_left_out_and_never_zero():
    assert mean_of(ONCE, np.array([1.0, NAN, NAN, 0.5]))[0] == 0.75
    assert interval_of(mean_of, np.ones((5, 4)), [np.array([1.0, NAN, NAN, 0.5])]).n == 2
    assert interval_of(mean_of, np.ones((5, 4)), [np.full(4, NAN)]) is None


def test_area_under_the_curve_by_hand():
    """Positives 3 and 1, negatives 2 and 1: 3 beats both, 1 loses to 2 and ties with 1: (1 + 1 + 0 + 0.5) / 4."""
    assert area_under(ONCE, np.array([3.0, 1.0, NAN, NAN]), np.array([NAN, NAN, 2.0, 1.0]))[0] == 2.5 / 4


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.data())
def test_area_is_the_rank_sum(scores, data):
    """Mann and Whitney: U from the ranks of the positives, ties sharing their mean rank, over the number of pairs."""
    right = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    found = confidence_area(np.ones((1, len(scores))), np.array(scores, dtype=float), np.array(right, dtype=float))[0]
    positives, pairs = sum(right), sum(right) * (len(right) - sum(right))
    if not pairs:
        assert np.isnan(found)
        return
    ordered = sorted(scores)
    ranks = [ordered.index(s) + 1 + (ordered.count(s) - 1) / 2 for s in scores]
    u = sum(rank for rank, is_right in zip(ranks, right, strict=True) if is_right) - positives * (positives + 1) / 2
    assert found == pytest.approx(u / pairs)


def test_a_weight_counts_an_item_as_often():
    """Every statistic on weights equals the same on the items repeated."""
    weights = np.array([[2.0, 0.0, 1.0, 3.0, 1.0, 1.0]])
    confidence, right = np.random.default_rng(5).random(6), np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    many = np.repeat(np.arange(6), weights[0].astype(int))
    for statistic in (confidence_area, calibration_error, selective_accuracy):
        plain = statistic(np.ones((1, 8)), confidence[many], right[many])
        assert statistic(weights, confidence, right) == pytest.approx(plain)


def test_calibration_error_by_hand():
    """Bin 0.9: confidence 0.95 twice, right once: |0.95 - 0.5| x 2; bin 0.3: 0.35 twice, never right: 0.35 x 2; over 4."""
    found = calibration_error(ONCE, np.array([0.95, 0.95, 0.35, 0.35]), np.array([1.0, 0.0, 0.0, 0.0]))[0]
    assert found == pytest.approx((0.45 * 2 + 0.35 * 2) / 4)


def test_accuracy_of_the_most_confident_half_by_hand():
    assert selective_accuracy(ONCE, np.array([0.9, 0.2, 0.8, 0.1]), np.array([1.0, 0.0, 0.0, 0.0]))[0] == 0.5
    three = np.ones((1, 3))  # one and a half of three: the second counts by half
    assert selective_accuracy(three, np.array([0.9, 0.8, 0.1]), np.array([1.0, 0.0, 0.0]))[0] == pytest.approx(1 / 1.5)


def test_a_difference_is_paired():
    generator = np.random.default_rng(7)
    before = generator.normal(0, 1, 200)
    after = before + 0.1 + generator.normal(0, 0.1, 200)
    weights = draw_weights([str(i // 20) for i in range(200)], 1000, 0)
    found = difference_of(mean_of, weights, [after], [before])
    alone = interval_of(mean_of, weights, [after])
    assert found.interval.low > 0
    assert found.p < 0.01
    assert alone.high - alone.low > 3 * (found.interval.high - found.interval.low)
    assert found.interval.mean == pytest.approx(np.mean(after - before))
    assert found.below(-0.01) > 0.99
    assert found.above(0.05) < 0.01


def test_the_detectable_difference_is_found_four_times_in_five():
    """Truth set to what one simulated bank says is detectable: the interval clears zero about 80 % of the time."""
    generator = np.random.default_rng(9)
    weights = draw_weights(["t"] * 200, 500, 0)
    detectable = difference_of(mean_of, weights, [generator.normal(0, 1, 200)], [np.zeros(200)]).detectable
    assert detectable == pytest.approx(2.8 / np.sqrt(200), rel=0.15)
    found = 0
    for turn in range(200):
        noise = generator.normal(2.8 / np.sqrt(200), 1, 200)
        found += difference_of(mean_of, draw_weights(["t"] * 200, 300, turn), [noise], [np.zeros(200)]).interval.low > 0
    assert 0.7 <= found / 200 <= 0.9


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.04 by 3, 2, 1: 0.03, 0.04, 0.04; never above one, never out of order."""
    assert holm({"b": 0.02, "a": 0.01, "c": 0.04}) == pytest.approx({"b": 0.04, "a": 0.03, "c": 0.04})
    assert holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_no_p_value_is_zero():
    weights = draw_weights(["t"] * 9, 99, 0)
    assert difference_of(mean_of, weights, [np.ones(9)], [np.zeros(9)]).p == pytest.approx(2 / 100)


# -------------------------------------------------------------------------------------------------------- fixed topics


def test_fixed_topics_are_in_every_resample():
    """Each topic keeps its number of draws; with a difference between topics alone, nothing is left to vary."""
    topics = ["a"] * 3 + ["b"] * 5
    weights = draw_weights(topics, 50, 0, fixed_topics=True)
    assert (weights[:, :3].sum(1) == 3).all()
    assert (weights[:, 3:].sum(1) == 5).all()
    assert len(np.unique(weights, axis=0)) > 20
    apart = np.array([1.0] * 3 + [0.0] * 5)
    assert np.unique(mean_of(weights, apart)) == pytest.approx(3 / 8)
    assert np.ptp(mean_of(draw_weights(topics, 50, 0), apart)) > 0.5


# -------------------------------------------------------------------------------------------------------------- power


def test_the_short_bank_finds_a_loss_of_six_points():
    """359 questions, of which 15 % come out differently: 10.5 % lost, 4.5 % won. docs/evals.md says so."""
    assert paired_power(359, 0.06, 0.15) == pytest.approx(0.84, abs=0.01)
    assert paired_power(359, 0.06, 0.20) == pytest.approx(0.72, abs=0.01)
    assert paired_power(359, 0.07, 0.20) >= 0.8


@pytest.mark.parametrize(("won", "lost"), [(0.02, 0.08), (0.045, 0.105)])
def test_power_is_the_share_of_simulated_banks_in_which_the_loss_is_found(won, lost):
    generator = np.random.default_rng(7)
    topics = [str(k) for k in range(12) for _ in range(30)]
    found = 0
    for turn in range(200):
        change = generator.choice([-1.0, 1.0, 0.0], size=360, p=[lost, won, 1 - lost - won])
        weights = draw_weights(topics, 300, turn, fixed_topics=True)
        interval = difference_of(mean_of, weights, [change], [np.zeros(360)]).interval
        found += interval.high < 0
    assert found / 200 == pytest.approx(paired_power(360, lost - won, lost + won), abs=0.08)
