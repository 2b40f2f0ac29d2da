"""A model beside another in pairs, margins, and what the gate makes of a loss."""

import pytest

from evals import comparison
from evals.suite import Scored, exams, measure
from evals.truth import truth
from truthward.errors import UserError
from truthward.records import Question
from truthward.tables import Evals


def scored(name: str, mc1: float, mc2: float, picked: str) -> Scored:
    values = {"mc1": mc1, "mc2": mc2, "pairs": 0.5, "against_style": None, "denies": 0.0}
    return Scored("truth", name, "t", values, picked)


def test_a_comparison_goes_question_by_question():
    now = [scored("a", 1.0, 0.9, "x"), scored("b", 0.0, 0.5, "y"), scored("new", 1.0, 1.0, "z")]
    then = [scored("b", 1.0, 0.6, "w"), scored("a", 0.0, 0.4, "w"), scored("gone", 1.0, 1.0, "w")]
    other = {"model": "base-1", "stage": "base", "items": [vars(s) for s in then]}
    found = comparison.compare(now, other, exams(len), Evals(resamples=200), 0)
    means = {m: (d["mean"], d["n"]) for m, d in found["differences"].items()}
    assert means["truth.mc1"] == (0.0, 2)
    assert means["truth.mc2"] == (pytest.approx(0.2), 2)
    assert "truth.against_style" not in means  # nothing was scored, so nothing is compared
    assert [(f["id"], f["better"], f["before"], f["after"]) for f in found["flipped"]] == [
        ("a", True, "w", "x"),
        ("b", False, "w", "y"),
    ]


def test_manners_are_reported_apart_and_not_gated():
    """Two careful questions and a plain one: a mean over each, and no loss that a gate on the set would count."""
    questions = [
        Question(id=i, topic="t", kind="k", question="?", true=["a"], false=["c"], manner=m)
        for i, m in (("x", "careful"), ("y", "careful"), ("z", "plain"))
    ]
    exam = truth(len)
    items = [
        Scored("truth", q.id, "t", exam.grade(q, [sums]), "a")
        for q, sums in zip(questions, ([-1.0, -2.0], [-2.0, -1.0], [-1.0, -3.0]), strict=True)
    ]
    found = measure(items, exams(len), 200, 0)
    assert {n: found[f"truth.pairs{n}"]["mean"] for n in ("", "_careful", "_plain")} == pytest.approx(
        {"": 2 / 3, "_careful": 0.5, "_plain": 1.0}
    )
    other = {"model": "base-1", "stage": "base", "items": [vars(s) for s in items]}
    differences = comparison.compare(items, other, exams(len), Evals(resamples=200), 0)["differences"]
    assert differences["truth.pairs"]["loss"] is not None
    assert differences["truth.pairs_plain"]["loss"] is None


def losses(**p: float) -> dict:
    rows = {"mean": -0.1, "low": -0.2, "high": -0.01, "n": 9}
    return {"stage": "sft", "differences": {k.replace("_", "."): {**rows, "loss": v} for k, v in p.items()}}


@pytest.mark.parametrize(
    ("gate", "p", "worse"),
    [
        ("block", {"truth_mc1": 0.024}, {"truth.mc1": "block"}),
        ("block", {"truth_mc1": 0.026}, {}),
        ("block", {"truth_mc1": 0.02, "truth_mc2": 0.5}, {}),  # 2 x 0.02: two metrics were looked at
        ("block", {"truth_mc1": 0.012, "truth_mc2": 0.024}, {"truth.mc1": "block", "truth.mc2": "block"}),
        ("block", {"skills_accuracy": 0.001}, {}),  # a single word is for the truth set and the voice
        ({"skills": "warn"}, {"truth_mc1": 0.001, "skills_accuracy": 0.001}, {"skills.accuracy": "warn"}),
        ({"truth": "block", "truth.mc2": "off"}, {"truth_mc2": 0.001, "truth_mc1": 0.02}, {"truth.mc1": "block"}),
    ],
)
def test_what_is_gated_is_worse_when_its_corrected_p_is_small(gate, p, worse):
    found = comparison.verdict(Evals(gate=gate), losses(**p))
    assert found["worse"] == worse
    assert found["mode"] == (next(iter(worse.values())) if worse else "off")


def test_a_set_on_which_the_parent_was_not_measured_is_held_against_the_base():
    base = {**losses(truth_mc1=0.001, skills_accuracy=0.001), "stage": "base"}
    found = comparison.verdict(Evals(gate={"truth": "block", "skills": "warn"}), losses(truth_mc1=0.4), base)
    assert found["worse"] == {"skills.accuracy": "warn"}
    assert "against base" in found["text"]


VOICE_LOSS = {"short_right": 0.001}


@pytest.mark.parametrize(
    ("parent", "base", "worse"),
    [
        ({"short_right": 0.4}, VOICE_LOSS, {"short.right": "block"}),  # small losses on the way have added up
        (VOICE_LOSS, {"short_right": 0.4}, {"short.right": "block"}),
        ({"short_right": 0.4}, {"short_right": 0.02}, {}),  # 2 x 0.02: two comparisons were looked at
        ({"truth_mc1": 0.4}, {"truth_mc1": 0.001}, {}),  # truth is held against the parent alone
        ({"fluency_broken": 0.5}, {"fluency_broken": 0.001, "fluency_words": 0.001}, {"fluency.broken": "block"}),
        ({"instructions_followed": 0.001}, {"instructions_followed": 0.001}, {"instructions.followed": "block"}),
    ],
)
def test_the_voice_is_held_against_parent_and_base_by_default(parent, base, worse):
    found = comparison.verdict(Evals(), {**losses(**parent), "stage": "sft"}, {**losses(**base), "stage": "base"})
    assert found["worse"] == worse
    assert found["gated"] == list(dict.fromkeys(n.replace("_", ".") for n in (*parent, *base) if n != "fluency_words"))


def test_a_parent_that_is_the_base_is_compared_with_once():
    same = {**losses(short_right=0.02), "stage": "base"}
    assert comparison.verdict(Evals(), same, same)["worse"] == {"short.right": "block"}


def test_three_points_of_the_voice_and_none_of_truth_are_forgiven_by_default():
    margins = [comparison.margin_of(Evals(), name) for name in ("short.right", "fluency.broken", "truth.mc1", "short.wrong")]
    assert margins == [0.03, 0.03, 0.0, 0.0]
    single = comparison.margin_of(Evals(margin=0.01), "truth.mc1"), comparison.margin_of(Evals(margin=0.01), "short.right")
    assert single == (0.01, 0.03)
    assert comparison.margin_of(Evals(margin={"short": 0.05}), "short.right") == 0.05


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        ("warn", ["warn", "warn", "off"]),  # a single word is for the truth set and the voice
        ("off", ["off", "off", "off"]),
        ({"skills": "warn"}, ["off", "block", "warn"]),  # the voice is gated unless it is named
        ({"truth": "block", "short.right": "off"}, ["block", "off", "off"]),
        ({"short": "warn"}, ["off", "block", "off"]),  # the set's other metrics
    ],
)
def test_what_a_recipe_gates(gate, found):
    names = ("truth.mc2", "short.right", "skills.accuracy")
    assert [comparison.gate_of(Evals(gate=gate), name) for name in names] == found


def test_nothing_to_compare_with_is_not_worse():
    assert comparison.verdict(Evals(), None)["mode"] == "off"


@pytest.mark.parametrize(("margin", "small"), [(0.0, True), (0.3, True), (0.5, False), ({"truth.mc2": 0.5}, True)])
def test_a_loss_within_the_margin_is_none(margin, small):
    """Every question lost between 0.36 and 0.44 of MC1."""
    now = [scored(str(i), 0.5 - 0.04 * (i % 3 - 1), 0.5, "x") for i in range(30)]
    other = {"model": "m", "stage": "sft", "items": [vars(scored(str(i), 0.9, 0.5, "x")) for i in range(30)]}
    found = comparison.compare(now, other, exams(len), Evals(resamples=200, margin=margin), 0)
    assert (found["differences"]["truth.mc1"]["loss"] < 0.01) == small


def test_a_gain_in_what_should_be_low_is_no_loss():
    """Nats a byte that fell by a tenth, then rose by it."""
    rows = {v: [Scored("text", str(i), "t", {"nats": v}, "x") for i in range(9)] for v in (1.0, 0.9)}
    for now, then, lost in ((0.9, 1.0, False), (1.0, 0.9, True)):
        other = {"model": "m", "stage": "sft", "items": [vars(s) for s in rows[then]]}
        found = comparison.compare(rows[now], other, exams(len), Evals(resamples=200), 0)["differences"]["text.nats"]
        assert (found["loss"] < 0.025) == lost


def test_a_gate_for_a_metric_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"no metric truth\.mc9(.|\n)*metrics of truth: mc1, mc2"):
        comparison.require_known(Evals(gate={"truth.mc9": "warn"}), exams(len), "r.toml")
