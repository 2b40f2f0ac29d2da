"""Ten thousand cases of bad input: each is taken or refused in one clear error, and what is refused leaves no trace.

What is fed here: recipes and overrides, rows of every kind, principles and examples, public benchmarks; random, and good
ones with something changed. ``test_bad_runs.py`` does the same with run directories.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st
from lab import ROOT
from odd import JSON, ODD_TEXT, TOML_VALUES, cases, deep, dumps, edited, encoded, mutated, taken

from evals import benchmarks
from truthward.banks import BANKS, Labelled
from truthward.examples import read_examples
from truthward.ledger import plan
from truthward.principles import read_constitution
from truthward.reasons import missing_reasons
from truthward.recipe import load_recipe
from truthward.records import Demonstration, Margin, Pair, Preference, Prompt, Revision, read_rows, write_rows
from truthward.tables import Recipe

RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.toml"))]
CONSTITUTIONS = [(ROOT / "constitution" / f"{name}.toml").read_text(encoding="utf-8") for name in ("principles", "persona")]
EXAMPLES = (ROOT / "constitution" / "examples.toml").read_text(encoding="utf-8")

# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A folder that the cases of this file share."""
    return tmp_path_factory.mktemp("bad")


KEYS = sorted(
    set(Recipe.model_fields)
    | {f"{t}.{k}" for t, f in Recipe.model_fields.items() if hasattr(f.default, "why") for k in type(f.default).model_fields}
)
LINES = st.one_of(
    st.tuples(st.sampled_from(KEYS), TOML_VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.sampled_from([f"[{key}]" for key in Recipe.model_fields] + ["[x]", "[[sft]]", "[sft.why]", "[sft.why.a.b]"]),
    st.tuples(ODD_TEXT, TOML_VALUES).map(lambda pair: f"{json.dumps(pair[0], ensure_ascii=False)} = {pair[1]}"),
)


def load(box: Path, content: bytes, overrides: list[str] | None = None, why: str = "") -> bool:
    (box / "my.toml").write_bytes(content)

    def read() -> None:
        recipe = load_recipe(box / "my.toml", overrides, why)
        missing_reasons(recipe)
        with contextlib.chdir(ROOT):
            plan(recipe)

    return taken(box, read)


@cases(1000, st.lists(LINES, min_size=1, max_size=5))
@example(["seed = " + "9" * 5000])
@example(["seed = " + "[" * 5000])
@example(["sft.data" + ".a" * 5000 + " = 1"])
@example(["name = '../../x'"])
@example(["evals.gate = {truth = 'off', '\ud800' = 'off'}"])
def test_recipes_made_up(box, lines):
    load(box, encoded("\n".join(lines)))


@cases(1000, edited(st.sampled_from(RECIPES)))
def test_recipes_with_something_changed(box, text):
    load(box, encoded(text))


@cases(1000, st.binary(max_size=60))
def test_recipes_of_any_bytes(box, content):
    load(box, content)


@cases(
    2000,
    st.lists(
        st.one_of(
            st.tuples(st.one_of(st.sampled_from(KEYS), ODD_TEXT), st.one_of(TOML_VALUES, ODD_TEXT)).map("=".join), ODD_TEXT
        ),
        max_size=3,
    ),
    ODD_TEXT,
)
@example(["sft.epochs=" + "9" * 5000], "")
@example(["sft.epochs=" + "[" * 5000], "")
@example(["a." * 5000 + "b=1"], "why")
@example(["seed=1\nname='x'"], "")
def test_overrides(box, overrides, why):
    load(box, b"", overrides, why)


# --------------------------------------------------------------------------------------------------------------- rows

KINDS: dict[type, str] = {
    Demonstration: "data/demonstrations.jsonl",
    Prompt: "data/prompts.jsonl",
    Pair: "data/judge",
    Labelled: "data/evals/open/dev",
    **{kind: "data/truth/dev" if name == "truth" else f"data/evals/{name}/dev" for name, kind in BANKS.items()},
}
PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b", "probability": 0.9, "principle": ["kind"], "round": 1}
REVISION = {
    **dict.fromkeys(("prompt_id", "prompt", "answer", "critique", "revision", "principle", "model"), "x"),
    **{"principle_version": 1, "round": 1, "seed": 2, "score_before": 0.5, "score_after": None, "helped": True},
}
MADE: dict[type, dict[str, Any]] = {
    Preference: PREFERENCE,
    Revision: REVISION,
    Margin: {"id": "a", "principle": "b", "margin": 0.5},
}


@functools.cache
def good(kind: Any) -> list[dict[str, Any]]:
    return [MADE[kind]] if kind in MADE else [row.model_dump(mode="json") for row in read_rows(ROOT / KINDS[kind], kind)[:5]]


KIND = st.sampled_from([*KINDS, *MADE])
ONE = KIND.flatmap(lambda kind: st.tuples(st.just(kind), mutated(st.sampled_from(good(kind))).map(dumps)))
ANY = st.tuples(
    KIND, st.one_of(JSON.map(dumps), st.sampled_from(["[" * 9999, '{"a":' * 999, "9" * 5000, "nul", "\0", '"\\ud800"']))
)


def read(box: Path, kind: Any, content: bytes) -> None:
    """Rows that are taken can be written, and read back as what they were."""
    (box / "rows.jsonl").write_bytes(content)
    rows: list[Any] = []
    if taken(box, lambda: rows.extend(read_rows(box / "rows.jsonl", kind))):
        write_rows(box / "again.jsonl", rows)
        assert read_rows(box / "again.jsonl", kind) == rows


@cases(2000, ONE)
@example((Margin, '{"id":"a","principle":"b","margin":1e999}'))
@example((Prompt, dumps({"id": "a", "prompt": "\ud800"})))
@example((Prompt, dumps({"id": "a", "prompt": deep(900)})))
def test_rows_with_something_changed(box, row):
    read(box, row[0], row[1].encode())


@cases(1500, ANY)
def test_rows_that_are_any_json_and_what_is_none(box, row):
    read(box, row[0], encoded(row[1]))


@cases(800, KIND, st.binary(max_size=60))
def test_rows_of_any_bytes(box, kind, content):
    read(box, kind, content)


TRUTHFUL = {
    "question": "q?",
    "mc1_targets": {"a": 1, "b": 0},
    "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
}
BBQ = {
    **{"context": "c", "question": "q", "label": 1, "ans0": "a", "ans1": "b", "ans2": "c", "context_condition": "ambig"},
    "answer_info": {"ans0": ["a", "x"], "ans1": ["b", "y"], "ans2": ["c", "unknown"]},
    "additional_metadata": {"stereotyped_groups": ["x"]},
    "question_polarity": "neg",
}
TALK = "\n\nHuman: Hi\n\nAssistant: "
PUBLIC: dict[str, dict[str, Any]] = {
    "truthfulqa": TRUTHFUL,
    "bbq": BBQ,
    "hh": {"chosen": f"{TALK}Yes.", "rejected": f"{TALK}No."},
    "model_written": {"question": "q", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"},
}


@cases(
    400,
    st.sampled_from(sorted(PUBLIC)).flatmap(lambda n: st.tuples(st.just(n), mutated(st.just(PUBLIC[n])).map(dumps))),
    st.sampled_from(["a.jsonl", "a.json", "a.csv"]),
)
@example(("truthfulqa", "Question,Best Answer,Correct Answers,Incorrect Answers\nq"), "a.csv")
@example(("hh", json.dumps({"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": TALK})), "a.jsonl")
def test_public_benchmarks_with_something_changed(box, row, name):
    (box / name).write_bytes(row[1].encode())
    taken(box, lambda: benchmarks.read({row[0]: str(box / name)}))


def test_each_reader_takes_what_is_its_own(box):
    """Else the cases above would show nothing."""
    for name, one in PUBLIC.items():
        (box / "ok.jsonl").write_text(json.dumps(one))
        assert len(benchmarks.read({name: str(box / "ok.jsonl")})[name]) == 1


# -------------------------------------------------------------------------------------------- principles and examples


@cases(400, edited(st.sampled_from(CONSTITUTIONS)))
def test_principles_with_something_changed(box, text):
    (box / "principles.toml").write_bytes(encoded(text))
    taken(box, lambda: read_constitution(box / "principles.toml"))


@cases(200, edited(st.just(EXAMPLES)))
def test_examples_with_something_changed(box, text):
    (box / "examples.toml").write_bytes(encoded(text))
    taken(box, lambda: read_examples(box / "examples.toml"))
