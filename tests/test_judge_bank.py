"""The labelled pairs that judges must qualify on: one file a principle; only the principle tells which is better."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

import pytest
from lab import ROOT
from test_data import near

from truthward.principles import read_principles
from truthward.records import Pair, Prompt, Question, read_rows

FILES = sorted((ROOT / "data" / "judge").glob("*.jsonl"))


@pytest.fixture(scope="module")
def bank() -> dict[str, list[Pair]]:
    return {file.stem: read_rows(file, Pair) for file in FILES}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.casefold())


def test_every_principle_has_its_file_of_34(bank):
    files = [ROOT / "constitution" / name for name in ("principles.toml", "persona.toml")]
    assert bank.keys() == {p.id for p in read_principles(*files)}
    for name, pairs in bank.items():
        assert {p.principle for p in pairs} == {name}
        assert [p.id for p in pairs] == [f"{name}-{i:03}" for i in range(1, 35)]


def test_answers_of_a_pair_have_one_length_and_mostly_one_first_word(bank):
    for name, pairs in bank.items():
        off = [p.id for p in pairs if abs(len(p.better.split()) - len(p.worse.split())) > 1]
        assert len(off) <= 2, off
        assert [p.id for p in pairs if abs(len(p.better) - len(p.worse)) > 0.15 * max(len(p.better), len(p.worse))] == []
        same = mean(words(p.better)[0] == words(p.worse)[0] for p in pairs)
        assert same >= 0.8, name
        assert all(p.model_dump_json().isascii() for p in pairs)


def test_the_longer_answer_is_the_better_one_in_about_half(bank):
    longer = [len(p.better) > len(p.worse) for pairs in bank.values() for p in pairs if len(p.better) != len(p.worse)]
    assert 0.42 < mean(longer) < 0.58


def test_a_bag_of_words_from_the_other_files_hardly_helps(bank):
    """Naive Bayes over words, learned on all other files, asked which of two answers is the better."""
    right = []
    for name, pairs in bank.items():
        counts: dict[str, Counter] = defaultdict(Counter)
        for other in (p for n, rows in bank.items() if n != name for p in rows):
            counts["better"].update(set(words(other.better)))
            counts["worse"].update(set(words(other.worse)))
        better, worse = counts["better"], counts["worse"]
        ratio = {w: math.log((better[w] + 1) / (worse[w] + 1)) for w in better | worse}
        for p in pairs:
            a, b = (sum(ratio.get(w, 0.0) for w in set(words(t))) for t in (p.better, p.worse))
            right.append(1.0 if a > b else 0.5 if a == b else 0.0)
    assert mean(right) < 0.62


def test_no_prompt_is_that_of_another_row_or_of_other_data(bank):
    prompts = [p.prompt for pairs in bank.values() for p in pairs]
    assert len(set(prompts)) == len(prompts)
    tests = [q.question for q in read_rows(ROOT / "data" / "truth" / "test", Question)]
    others = [p.prompt for name in ("prompts", "persona") for p in read_rows(Path(ROOT / "data" / f"{name}.jsonl"), Prompt)]
    assert near(prompts, tests + others) == []
