"""Judges by hand: scores of each method, qualification by principle, temperatures, and the panel that is left."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab import principle

from constitution import judge as judging
from constitution.judge import Case, LocalJudge, RemoteJudge, Verdicts, choice_requests, choose
from constitution.qualify import Panel, qualify, require_qualified
from truthward import chat, stats
from truthward.errors import UserError
from truthward.records import Pair

A, B = principle("a"), principle("b")


@pytest.fixture
def stub(monkeypatch, tiny):
    """A model that a function stands for: ``stub(lambda system, question, answer: log p)`` gives a judge."""
    _, tokenizer = tiny

    def put(logprob):
        def answer_sums(model, items, **options):
            rows = []
            for item in items:
                turns = tokenizer.decode(item.prompt).split("<|im_start|>")[1:-1]
                texts = dict(turn.removesuffix("<|im_end|>\n").split("\n", 1) for turn in turns)
                answers = [chat.decode(tokenizer, answer) for answer in item.answers]
                rows.append([logprob(texts.get("system", ""), texts["user"], a) for a in answers])
            return rows

        monkeypatch.setattr(judging, "answer_sums", answer_sums)
        return LocalJudge(None, tokenizer)

    return put


# ------------------------------------------------------------------------------------------------------------- scores


def test_likelihood_and_contrast_are_means_a_token(stub):
    """Tokens with the end: ``abc`` 4, ``abcdefg`` 8."""
    table = {
        ("follow a", "abc"): -4.0,
        ("violate a", "abc"): -8.0,
        ("follow a", "abcdefg"): -4.0,
        ("violate a", "abcdefg"): -2.0,
    }
    found = stub(lambda system, question, answer: table[system, answer]).scores(
        [Case("q?", ["abc", "abcdefg"], A)], ["contrast", "likelihood"], ""
    )
    assert found.scores == {"contrast": [[1.0, -0.25]], "likelihood": [[-1.0, -0.5]]}
    assert found.asked == 0


def test_every_case_keeps_its_own_scores(stub):
    judge = stub(lambda system, question, answer: -float(len(question)) * (len(answer) + 1))
    cases = [Case("q" * n, ["a"] * k, A) for n, k in ((1, 3), (5, 1), (2, 2))]
    assert judge.scores(cases, ["likelihood"], "").scores["likelihood"] == [[-1.0] * 3, [-5.0], [-2.0] * 2]


def test_a_real_models_scores_are_those_of_plain_forward_passes(tiny):
    model, tokenizer = tiny
    (scores,) = (
        LocalJudge(model, tokenizer).scores([Case("Which?", list("abcd"), A)], ["likelihood"], "").scores["likelihood"]
    )
    prompt = chat.prompt_ids(tokenizer, chat.user("Which?", "follow a"))
    expected = []
    for letter in "abcd":
        ids = chat.answer_ids(tokenizer, letter)
        logprobs = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected.append(sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)) / len(ids))
    assert scores == pytest.approx(expected, abs=1e-4)


class Letters:
    """Chooses by a rule: log-odds of A given what stands first and second."""

    def __init__(self, rule):
        self.rule = rule

    def choices(self, requests, description=""):
        texts = [r[-1]["content"] for r in requests]
        return [self.rule(*(t.split(f"{k}: ")[1].split("\n")[0] for k in "AB")) for t in texts]


def test_both_orders_cancel_a_liking_for_a_letter():
    """Always 3 nats for A: no answer is better, and A is taken every time."""
    scores, asked, first = choose(Letters(lambda one, other: 3.0), [Case("q", ["x", "y", "z"], A)], "")
    assert scores == [[0.0, 0.0, 0.0]]
    assert (asked, first) == (6, 6)


def test_choice_by_hand():
    """log-odds = first minus second plus 3 for the place: scores are values less their mean."""
    values = {"x": 5.0, "y": 2.0, "z": -1.0}
    scores, asked, first = choose(Letters(lambda a, b: values[a] - values[b] + 3), [Case("q", list("xyz"), A)], "")
    assert scores == [pytest.approx([3.0, 0.0, -3.0])]
    assert (asked, first) == (6, 3)  # where the difference is -3, it is a tie; -6 is a B


def test_a_choice_that_was_not_made_leaves_its_case_without_scores():
    rule = Letters(lambda a, b: None if "x" in (a, b) else 1.0 if a == "y" else -1.0)
    scores, asked, first = choose(rule, [Case("q", ["x", "y"], A), Case("q", ["y", "z"], A)], "")
    assert scores == [None, [0.5, -0.5]]
    assert (asked, first) == (2, 1)


def test_a_request_shows_question_both_answers_and_the_principle():
    first, second = (r[0]["content"] for r in choice_requests(Case("Why?", ["left", "right"], A)))
    assert "Question: Why?" in first
    assert first.index("A: left") < first.index("B: right") < first.index("text a")
    assert second.index("A: right") < second.index("B: left")


# ------------------------------------------------------------------------------------------------------ qualification


def labelled(count: int = 40) -> dict[str, list[Pair]]:
    return {
        p.id: [Pair(id=f"{p.id}{i}", principle=p.id, prompt=f"Is {i}?", better="good", worse="evil!") for i in range(count)]
        for p in (A, B)
    }


def found(judge, methods=("contrast", "likelihood")) -> dict:
    return qualify(judge, labelled(), [A, B], methods, 400, 0)


def test_a_method_that_tells_better_from_worse_qualifies_for_each_principle(stub):
    record = found(stub(lambda system, question, answer: float("good" in answer and "follow" in system)))
    assert {m: (r["accuracy"]["mean"], r["accuracy"]["n"], r["refused"]) for m, r in record["methods"].items()} == {
        "contrast": (1.0, 80, False),
        "likelihood": (1.0, 80, False),
    }
    assert record["chosen"].keys() == {"a", "b"}
    require_qualified(record, "block")


def test_a_principle_at_chance_is_left_out(stub):
    """Right by a; by b right on 20 of 40. Over both the method clears chance."""

    def logprob(system, question, answer):
        right = system.endswith(" a") or int(question[3:-1]) < 20
        return float(("good" in answer) == right) if "follow" in system else 0.0

    record = found(stub(logprob))
    assert record["chosen"] == {"a": "contrast"}
    assert record["principles"]["b"]["contrast"]["refused"]
    assert not record["methods"]["contrast"]["refused"]


def test_a_principle_does_not_count_where_the_whole_method_is_at_chance(stub):
    """Always right by a, always wrong by b."""
    rule = {("a", True): 1.0, ("b", False): 1.0}
    record = found(stub(lambda s, q, answer: rule.get((s[-1], "good" in answer), 0.0) if "follow" in s else 0.0))
    assert record["principles"]["a"]["likelihood"]["accuracy"]["mean"] == 1.0
    assert record["chosen"] == {}


def test_of_two_methods_that_qualify_the_better_is_chosen(stub):
    """Likes good answers whatever it is told, a little more on the first 30 when told to follow."""

    def logprob(system, question, answer):
        return float("good" in answer) * (1 + ("follow" in system) * (0.5 if int(question[3:-1]) < 30 else -0.5))

    record = found(stub(logprob))
    assert record["chosen"] == {"a": "likelihood", "b": "likelihood"}
    assert record["methods"]["contrast"]["accuracy"]["mean"] == pytest.approx(0.75)


def test_a_judge_that_always_says_a_is_refused():
    record = found(RemoteJudge(Letters(lambda one, other: 2.0)), ["choice", "contrast"])
    assert record["methods"].keys() == {"choice"}
    assert record["methods"]["choice"]["refused"]
    assert record["methods"]["choice"]["first"] == 1.0
    with pytest.raises(UserError, match=r"no judge clears chance.*choice 0\.500"):
        require_qualified(record, "block")
    require_qualified(record, "warn")


def test_a_verdict_that_is_not_given_counts_as_a_tie():
    judge = RemoteJudge(Letters(lambda one, other: 2.0 if one == "good" else None))
    assert found(judge, ["choice"])["methods"]["choice"]["accuracy"]["mean"] == 0.5


def test_a_liking_for_length_shows(stub):
    """The worse answer is the longer one here; a judge of length takes it each time."""
    record = found(stub(lambda system, question, answer: float(len(answer)) if "follow" in system else 0.0), ["contrast"])
    assert record["methods"]["contrast"]["longer"]["mean"] == 1.0
    assert record["methods"]["contrast"]["accuracy"]["mean"] == 0.0


def test_no_labelled_pairs_is_no_judge(stub):
    record = qualify(stub(lambda *_: 0.0), {}, [A], ["contrast"], 100, 0)
    assert record == {"methods": {}, "principles": {"a": {}}, "chosen": {}}
    with pytest.raises(UserError, match="no labelled pairs"):
        require_qualified(record, "block")


# -------------------------------------------------------------------------------------------------------------- panel


class Table:
    """A judge whose scores are written down: (principle, answer) -> score."""

    methods = ("contrast", "likelihood")

    def __init__(self, table):
        self.table = table

    def scores(self, cases, methods, description):
        return Verdicts({m: [self.row(m, case) for case in cases] for m in methods})

    def row(self, method, case):
        return None if case.prompt == "mute" else [self.table[method, case.principle.id, a] for a in case.answers]


def test_a_panels_scores_are_log_odds_averaged_over_principles():
    """By a (contrast, T 2): 4 and 0; by b (likelihood, T 0.5): 1 and 2. Means of 2, 2 and of 0, 4."""
    contrast = {("contrast", "a", "x"): 4.0, ("contrast", "a", "y"): 0.0}
    judge = Table(contrast | {("likelihood", "b", "x"): 1.0, ("likelihood", "b", "y"): 2.0})
    methods = {"contrast": {"temperature": 2.0}, "likelihood": {"temperature": 0.5}}
    panel = Panel(judge, [A, B, principle("c")], {"methods": methods, "chosen": {"a": "contrast", "b": "likelihood"}})
    assert [p.id for p in panel.principles] == ["a", "b"]
    cases = [("q", ["x", "y"], [A, B]), ("mute", ["x", "y"], [A]), ("q", ["y", "x"], [B])]
    assert panel.log_odds(cases, "") == [[2.0, 2.0], None, [4.0, 2.0]]


def test_where_nothing_qualified_the_best_method_judges_by_all():
    methods = {m: {"temperature": 1.0, "accuracy": {"mean": mean}} for m, mean in (("contrast", 0.4), ("likelihood", 0.5))}
    panel = Panel(Table({("likelihood", "a", "x"): 3.0}), [A, B], {"methods": methods, "chosen": {}})
    assert panel.chosen == {"a": "likelihood", "b": "likelihood"}
    assert panel.log_odds([("q", ["x"], [A])], "") == [[3.0]]


# -------------------------------------------------------------------------------------------------------- probabilities


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_a_soft_label_is_a_probability_and_the_swapped_one_is_its_complement(difference, temperature):
    label = stats.probability(difference, temperature)
    assert 0 <= label <= 1
    assert label + stats.probability(-difference, temperature) == pytest.approx(1)


def test_the_fitted_temperature_by_hand():
    """Margins of +-1, three of four positive: sigmoid(1/T) = 3/4, so T = 1 / ln 3."""
    assert stats.fit_temperature([1.0, 1.0, 1.0, -1.0]) == pytest.approx(1 / math.log(3), rel=1e-6)
    assert stats.fit_temperature([10.0, 10.0, 10.0, -10.0]) == pytest.approx(10 / math.log(3), rel=1e-6)
    assert stats.fit_temperature([1.0]) == pytest.approx(1e-3, rel=1e-3)  # always right: as cold as allowed
    assert stats.fit_temperature([-1.0]) == pytest.approx(1e3, rel=1e-3)


def test_calibration_by_hand():
    """P = 3/4 right on three of four: Brier 3/4 * 1/16 + 1/4 * 9/16 = 3/16, and no calibration error."""
    found = stats.calibration([1.0, 1.0, 1.0, -1.0], 1 / math.log(3))
    assert found == {"brier": pytest.approx(3 / 16), "ece": pytest.approx(0, abs=1e-9)}
    sure = stats.calibration([100.0, -100.0])  # certain, and right on one of two
    assert sure == {"brier": pytest.approx(0.5), "ece": pytest.approx(0.5)}
    assert stats.calibration([0.0]) == {"brier": 0.25, "ece": 0.0}
