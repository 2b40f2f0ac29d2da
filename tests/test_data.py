"""The shipped data: how much there is, that splits are apart, and that style alone does not tell true from false."""

import math
from collections import Counter
from itertools import chain, combinations
from pathlib import Path

import pytest

from evals.baselines import learn_style, style_baselines, words
from evals.suite import exams
from evals.truth import multiple_choice
from truthward.check.rows import NEAR
from truthward.records import Prompt, Question, read_demonstrations, read_rows
from truthward.stats import mean_interval

DATA = Path(__file__).parent.parent / "data"
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def banks() -> dict[str, list[Question]]:
    return {split: read_rows(DATA / "truth" / split, Question) for split in SPLITS}


@pytest.fixture(scope="module")
def questions(banks) -> list[Question]:
    return list(chain(*banks.values()))


@pytest.fixture(scope="module")
def demonstrations():
    return read_demonstrations([str(DATA / "demonstrations.jsonl")])


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_rows(DATA / "prompts.jsonl", Prompt)


@pytest.fixture(scope="module")
def persona() -> list[Prompt]:
    return read_rows(DATA / "persona.jsonl", Prompt)


def near(a: list[str], b: list[str]) -> list[tuple[str, str]]:
    """Texts of the two lists that share more than ``NEAR`` of their words (Jaccard)."""
    sets_a, sets_b = ([(text, frozenset(words(text))) for text in texts] for texts in (a, b))
    return [(x, y) for x, s in sets_a for y, t in sets_b if len(s & t) > NEAR * len(s | t)]


def test_nearness_is_the_share_of_common_words():
    assert near(["one two three four five six seven"], ["Seven six, five four three two!"]) != []  # 6 of 7
    assert near(["one two three four five six seven"], ["seven six five four three"]) != []  # 5 of 7
    assert near(["one two three four five six seven"], ["four three two one"]) == []


# -------------------------------------------------------------------------------------------------------------- size


def test_there_is_enough_of_everything(questions, demonstrations, prompts, persona):
    assert len(questions) >= 500
    assert len({q.topic for q in questions}) >= 16
    assert len(demonstrations) >= 300
    assert len(prompts) >= 200
    assert Counter(row.kind for row in persona) == {"tempt": 20, "wit": 20, "truth": 20}


def test_ids_are_unique(questions, demonstrations, prompts, persona):
    for rows in (questions, demonstrations, prompts, persona):
        assert len({row.id for row in rows}) == len(rows)


def test_a_topic_is_one_file_of_one_split(banks):
    topics = {split: {q.topic for q in bank} for split, bank in banks.items()}
    assert all(not topics[a] & topics[b] for a, b in combinations(SPLITS, 2))
    for split in SPLITS:
        assert {path.stem for path in (DATA / "truth" / split).glob("*.jsonl")} == topics[split]


def test_training_sees_every_kind_of_question_that_the_test_asks(banks):
    kinds = {split: {q.kind for q in bank} for split, bank in banks.items()}
    assert kinds["test"] <= kinds["train"]


# ---------------------------------------------------------------------------------------------------- matched answers


def test_each_question_has_three_matched_pairs_at_least(questions):
    assert [q.id for q in questions if min(len(q.true), len(q.false)) < 3 or len(q.true) != len(q.false)] == []


def test_matched_answers_begin_with_the_same_word(questions):
    assert [(t, f) for q in questions for t, f in zip(q.true, q.false, strict=True) if words(t)[0] != words(f)[0]] == []


def test_matched_answers_are_within_a_quarter_of_each_others_length(questions):
    pairs = [(t, f) for q in questions for t, f in zip(q.true, q.false, strict=True)]
    assert [(t, f) for t, f in pairs if abs(len(t) - len(f)) > 0.25 * max(len(t), len(f))] == []


def test_no_answer_stands_twice_in_a_question(questions):
    answers = {q.id: [a.casefold().strip(" .") for a in q.true + q.false] for q in questions}
    assert [key for key, texts in answers.items() if len(set(texts)) < len(texts)] == []


# ------------------------------------------------------------------------------------------------------------- leaks


@pytest.mark.parametrize(("a", "b"), combinations(SPLITS, 2))
def test_no_question_is_asked_in_two_splits(banks, a, b):
    assert near([q.question for q in banks[a]], [q.question for q in banks[b]]) == []


def test_no_question_is_asked_twice_in_a_split(banks):
    for bank in banks.values():
        texts = [q.question for q in bank]
        assert [pair for i, text in enumerate(texts) for pair in near([text], texts[i + 1 :])] == []


@pytest.mark.parametrize("split", ["test", "dev"])
def test_no_held_out_question_or_answer_is_demonstrated_or_prompted(banks, demonstrations, prompts, split):
    asked = [m.content for d in demonstrations for m in d.messages if m.role == "user"] + [p.prompt for p in prompts]
    assert near([q.question for q in banks[split]], asked) == []
    answered = [m.content for d in demonstrations for m in d.messages if m.role == "assistant"]
    assert near([a for q in banks[split] for a in q.true + q.false], answered) == []


def test_persona_prompts_are_asked_nowhere_else_and_only_once(questions, demonstrations, prompts, persona):
    """They measure a persona, so nothing that trains one may hold them."""
    texts = [row.prompt for row in persona]
    asked = [m.content for d in demonstrations for m in d.messages if m.role == "user"]
    assert near(texts, [*asked, *(p.prompt for p in prompts), *(q.question for q in questions)]) == []
    assert [pair for i, text in enumerate(texts) for pair in near([text], texts[i + 1 :])] == []
    assert all(text.isascii() for text in texts)


# ------------------------------------------------------------------------------------------------------------- style


@pytest.fixture(scope="module")
def style(banks) -> dict[str, dict[str, float]]:
    return style_scores(banks["test"], banks["train"])


def style_scores(bank: list[Question], style_bank: list[Question]) -> dict[str, dict[str, float]]:
    """What each judge by style scores on a truth bank."""
    by_name = exams(learn_style(style_bank))
    found = style_baselines({"truth": bank}, by_name, style_bank)
    return {judge: {key.partition(".")[2]: value for key, value in scores.items()} for judge, scores in found.items()}


def chance(banks) -> tuple[float, float]:
    """MC1 of a blind guess, and two standard errors of it."""
    ps = [1 / (1 + len(q.false)) for q in banks["test"]]
    return sum(ps) / len(ps), 2 * math.sqrt(sum(p * (1 - p) for p in ps)) / len(ps)


@pytest.mark.parametrize("name", ["longest answer", "shortest answer", "first word"])
def test_length_and_first_word_cannot_tell_matched_pairs(style, name):
    assert style[name]["pairs"] == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("sign", [1, -1], ids=["longest", "shortest"])
@pytest.mark.parametrize("measure", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_gains_nothing_on_mc1(banks, sign, measure):
    expected, error = chance(banks)
    scores = [[[sign * measure(a) for a in answers] for answers in (q.true, q.false)] for q in banks["test"]]
    assert sum(multiple_choice(*s)[0] for s in scores) / len(scores) <= expected + error


def test_the_first_word_gains_nothing_on_mc1(banks, style):
    expected, error = chance(banks)
    assert style["first word"]["mc1"] <= expected + error


@pytest.mark.parametrize("sign", [1, -1], ids=["longer", "shorter"])
@pytest.mark.parametrize("measure", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_alone_would_not_qualify_as_a_judge(banks, sign, measure):
    """The constitution's judge qualifies on dev when its interval clears 0.5, and the reward's accuracy is read there."""
    rows = [(q.id, sign * (measure(t) - measure(f))) for q in banks["dev"] for t, f in zip(q.true, q.false, strict=True)]
    right = [0.5 + 0.5 * ((gap > 0) - (gap < 0)) for _, gap in rows]
    assert mean_interval(right, clusters=[key for key, _ in rows]).low <= 0.5


def test_the_words_of_the_answers_gain_little(banks, style, record_property):
    record_property("bag of words", style["bag of words"])
    assert style["bag of words"]["pairs"] < 0.60
    assert style["bag of words"]["mc1"] < chance(banks)[0] + 0.10


def test_a_bank_that_style_gives_away_is_seen_by_the_baselines():
    """A planted give-away of each sort moves its baseline to 1."""
    row = {"kind": "k", "question": "Is it?"}
    pairs = [(["Really it is so."], ["It isn't."]), (["Really it was."], ["It wasn't."])]
    bank = [Question(id=str(i), topic=str(i), true=t, false=f, **row) for i, (t, f) in enumerate(pairs)]
    found = style_scores(bank, bank)
    assert {name: scores["pairs"] for name, scores in found.items()} == {
        "longest answer": 1.0,
        "shortest answer": 0.0,
        "first word": 1.0,
        "bag of words": 1.0,
    }


def test_what_the_style_bank_does_not_show_is_not_learned():
    question = {"topic": "t", "kind": "k", "question": "Is it?"}
    bank = [Question(id="0", true=["Some say so."], false=["Few do so."], **question)]
    found = style_scores([Question(id="1", true=["Really yes."], false=["Not at all."], **question)], bank)
    assert (found["bag of words"]["pairs"], found["first word"]["pairs"]) == (0.5, 0.5)
