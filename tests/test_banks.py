"""The evaluation banks: how much there is, that splits and training are apart, and that style gives no answer away."""

import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from test_data import SPLITS, near

from truthward import banks
from truthward.banks import BANKS, Dated, Fact, Prose, Situation, Twins, Voice
from truthward.check import Facts
from truthward.check.rows import leaked, training_texts
from truthward.recipe import bank_path, banked, load_recipe
from truthward.records import Question, read_rows
from truthward.tables import BANK_OF, EvalSet

ROOT = Path(__file__).parent.parent
NAMES = sorted(set(BANKS) - {"truth"})
CHOICES = ["facts", "skills"]
NEGATION = re.compile(r"\b(no|not|never|nothing|nobody|none)\b|n't", re.IGNORECASE)


def rows(name: str, split: str) -> list:
    return read_rows(ROOT / "data" / "evals" / name / split, BANKS[name])


@pytest.fixture(scope="module")
def laptop():
    return load_recipe(ROOT / "recipes" / "laptop.toml")


@pytest.mark.parametrize("name", NAMES)
def test_a_bank_has_two_hundred_items_and_a_smaller_half_for_tuning(name):
    test, dev = rows(name, "test"), rows(name, "dev")
    assert len(test) >= 200
    assert 30 <= len(dev) < len(test)
    assert len({r.id for r in test + dev}) == len(test) + len(dev)
    assert not {r.topic for r in test} & {r.topic for r in dev}
    for split, some in (("test", test), ("dev", dev)):
        files = {p.stem for p in (ROOT / "data" / "evals" / name / split).glob("*.jsonl")}
        assert files == {r.topic for r in some}


def test_every_set_has_a_bank(laptop):
    for name in banked(get_args(EvalSet)):
        assert BANK_OF.get(name, name) in BANKS
        assert (ROOT / bank_path(laptop, name)).is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_twice(name):
    """Twins are alike by design, and so are passages' questions on one subject with other passages."""
    texts = [text for split in ("test", "dev") for r in rows(name, split) for text in r.asked[:1]]
    if name == "short":  # one word makes another question: the plural of mouse, the plural of man
        assert len({text.casefold() for text in texts}) == len(texts)
        return
    pairs = [pair for i, text in enumerate(texts) for pair in near([text], texts[i + 1 :])]
    assert len(pairs) <= len(texts) // 100, pairs


def test_nothing_that_is_asked_stands_in_the_training_data(laptop, monkeypatch):
    monkeypatch.chdir(ROOT)
    subject = Facts(laptop, "recipes/laptop.toml")
    assert leaked(subject) == []
    assert len(banks.tested_texts(laptop)) > 1500
    assert len(training_texts(subject)) > 900


# ----------------------------------------------------------------------------------------------------- surface marks


def balance(pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Of pairs of a right and a wrong text: the ratio of their mean lengths, and how often the right one is the longer."""
    longer = [len(a) > len(b) for a, b in pairs if len(a) != len(b)]
    return sum(len(a) for a, _ in pairs) / sum(len(b) for _, b in pairs), sum(longer) / max(1, len(longer))


def pairs_of(name: str) -> list[tuple[str, str]]:
    some = rows(name, "test")
    if name in CHOICES:
        return [(r.right, w) for r in some for w in r.wrong]
    if name == "unknown":
        return [(r.answer, r.guess) for r in some]
    if name == "bias":
        return [(r.target, r.other) for r in some]
    if name == "grounded":
        return [(r.answer, r.wrong[0]) for r in some if r.answer]
    return [(r.better, r.worse) for r in some]


@pytest.mark.parametrize("name", [*CHOICES, "unknown", "bias", "grounded", "persona"])
def test_length_and_negation_tell_nothing(name):
    pairs = pairs_of(name)
    ratio, longer = balance(pairs)
    assert ratio == pytest.approx(1, abs=0.04)
    assert longer == pytest.approx(0.5, abs=0.06)
    denied = [sum(bool(NEGATION.search(side)) for side in sides) / len(pairs) for sides in zip(*pairs, strict=True)]
    assert denied[0] == pytest.approx(denied[1], abs=0.05)


def test_a_planted_give_away_is_seen():
    assert balance([("a long right answer", "short"), ("another long one", "no")]) == (pytest.approx(5.0), 1.0)


@pytest.mark.parametrize("name", CHOICES)
def test_the_right_number_is_not_always_in_the_middle(name):
    numbers = re.compile(r"^\d+(\.\d+)?$")
    ranks = Counter()
    for r in rows(name, "test"):
        options = [r.right, *r.wrong]
        if all(map(numbers.match, options)):
            ranks[sorted(options, key=float).index(r.right)] += 1
    assert sum(ranks.values()) >= 10
    assert max(ranks.values()) < 0.45 * sum(ranks.values())


# ------------------------------------------------------------------------------------------------- each bank's rules


@pytest.mark.parametrize("name", CHOICES)
def test_options_can_complete_the_answer(name):
    for r in rows(name, "test") + rows(name, "dev"):
        assert isinstance(r, Fact)
        assert len(r.wrong) == 3
        assert not any(option.endswith(".") for option in (r.right, *r.wrong))
        assert name == "skills" or (r.question.endswith("?") and re.match(r"an? \w", r.field)), r.id


def test_twins_do_not_give_themselves_away():
    """A word that stands in at least twelve questions stands on neither side three times as often as on the other."""
    some = rows("unknown", "test")
    assert all(isinstance(r, Twins) and r.known.endswith("?") and r.unknown.endswith("?") for r in some)
    sides = [
        Counter(w for r in some for w in set(re.findall(r"\w+", getattr(r, side).lower()))) for side in ("known", "unknown")
    ]
    lopsided = [
        w
        for w in sides[0] | sides[1]
        if sides[0][w] + sides[1][w] >= 12 and not 1 / 3 < (sides[0][w] + 1) / (sides[1][w] + 1) < 3
    ]
    assert lopsided == []


def test_situations_name_both_people_and_stand_in_balance():
    some = rows("bias", "test")
    for r in some + rows("bias", "dev"):
        assert isinstance(r, Situation)
        context = r.context.casefold()
        assert {r.target.casefold() in context, r.other.casefold() in context} == {True}, r.id
        assert len(r.target.split()) == len(r.other.split()), r.id
    for kind in ("negative", "positive"):
        first = [
            r.context.casefold().index(r.target.casefold()) < r.context.casefold().index(r.other.casefold())
            for r in some
            if r.kind == kind
        ]
        assert len(first) == pytest.approx(len(some) / 2, abs=6)
        assert sum(first) / len(first) == pytest.approx(0.5, abs=0.08)


def test_passages_hold_what_they_are_cited_for():
    """The newest passage holds a stale row's answer; what a row is of its kind, its topic has in number."""
    some = rows("grounded", "test")
    kinds = Counter(r.kind for r in some)
    assert min(kinds.values()) >= 50
    for r in some + rows("grounded", "dev"):
        assert isinstance(r, Dated)
        if r.kind == "stale":
            assert r.passages[r.cite - 1].date == max(p.date for p in r.passages), r.id
        assert r.kind in ("conflict", "absent") or len(r.passages) > 1, r.id
    late = [r.cite == len(r.passages) for r in some if r.cite and len(r.passages) > 1]
    assert sum(late) / len(late) == pytest.approx(0.5, abs=0.1)


def test_persona_answers_match_in_length_and_every_kind_is_there():
    some = rows("persona", "test")
    assert min(Counter(r.kind for r in some).values()) >= 60
    for r in some:
        assert isinstance(r, Voice)
        assert abs(len(r.better.split()) - len(r.worse.split())) <= 2, r.id


def test_ordinary_texts_are_about_as_long():
    lengths = [len(r.text.split()) for r in rows("text", "test") if isinstance(r, Prose)]
    assert all(40 <= length <= 80 for length in lengths)


def test_labelled_answers_are_to_no_test_question_and_of_every_kind():
    """They measure the judge of open answers, so the test's questions must not be among them."""
    some = read_rows(ROOT / "data" / "evals" / "open" / "dev", banks.Labelled)
    assert len(some) >= 150
    asked = {split: read_rows(ROOT / "data" / "truth" / split, Question) for split in SPLITS}
    assert {r.topic for r in some} <= {q.topic for split in ("train", "dev") for q in asked[split]}
    assert not near([r.question for r in some], [q.question for q in asked["test"]])
    assert min(Counter((r.right, r.informative) for r in some).values()) >= 10
