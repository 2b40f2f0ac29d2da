"""Ten thousand cases of bad input: each is taken or refused in one clear error, and what is refused leaves no trace.

What is fed: recipes and overrides, rows of every kind, principles and examples, public benchmarks, manifests, evals and
metrics of run directories; random, and good ones with something changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_report
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lab import ROOT
from odd import JSON, ODD_TEXT, TOML_VALUES, deep, dumps, edited, encoded, mutated

from evals import benchmarks
from evals.compare import compare
from truthward import report
from truthward.amendments import users
from truthward.banks import BANKS, Labelled
from truthward.card import lineage, model_card
from truthward.effects import show_effect
from truthward.errors import UserError
from truthward.examples import read_examples
from truthward.ledger import Run, plan
from truthward.models import chain
from truthward.principles import read_constitution
from truthward.recipe import load_recipe, missing_reasons
from truthward.records import Demonstration, Margin, Pair, Preference, Prompt, Revision, read_rows, write_rows
from truthward.tables import Recipe

WANTED = 10_000
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.toml"))]
CONSTITUTIONS = [(ROOT / "constitution" / f"{name}.toml").read_text(encoding="utf-8") for name in ("principles", "persona")]
EXAMPLES = (ROOT / "constitution" / "examples.toml").read_text(encoding="utf-8")
fed: Counter[str] = Counter()


def cases(count: int, *strategies: Any) -> Callable[[Any], Any]:
    """So many cases of a test, counted as they are run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example]
    given_so_many = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def counted(*arguments: Any, **options: Any) -> None:
            fed[test.__name__] += 1
            test(*arguments, **options)

        return given_so_many(given(*strategies)(counted))

    return decorate


@pytest.fixture(scope="module")
def box() -> Any:
    """A folder that the cases of this file share."""
    folder = Path(tempfile.mkdtemp(prefix="truthward-bad-"))
    yield folder
    shutil.rmtree(folder)


def trace(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def taken(folder: Path, read: Callable[[], Any], writes: bool = False) -> bool:
    """Whether bad input was taken; refused, it must be a :class:`UserError` of few words, with nothing written."""
    before = trace(folder)
    try:
        read()
    except UserError as error:
        assert 0 < len(str(error)) < 20_000
        assert trace(folder) == before
        return False
    assert writes or trace(folder) == before
    return True


# ------------------------------------------------------------------------------------------------------------ recipes

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


# ---------------------------------------------------------------------------------------------------- run directories


@pytest.fixture(scope="module")
def world(box) -> Any:
    """Runs of which some are scored, one has a judge's record, and one was overridden at the gate."""
    root = box / "world"
    root.mkdir()
    recipe = test_report.furnish(root)
    places = plan(recipe)
    score = {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 9}
    method = {"accuracy": score, "refused": False, "brier": 0.2, "ece": 0.1, "longer": score, "first": 0.5}
    judge = {"methods": {"choice": method}, "principles": {"kind": {"choice": method}}, "chosen": {"kind": "choice"}}
    change(places["sft"].path, judge=judge, gate={"mode": "block", "worse": {"truth.mc1": "block"}, "text": "worse"})
    change(places["evals-sft"].path, gate={"mode": "block", "override": {"reason": "r", "who": "w", "time": "t"}})
    made = {"principle_accuracy": score, "calibration": {"brier": 0.2, "ece": 0.1}, "principles": {"kind": score}}
    change(places["reward"].path, metrics={"validation_accuracy": score, **made})
    copy = places["sft"].path.parent / "constitution-0"
    shutil.copytree(places["sft"].path, copy)
    change(copy, stage="constitution")
    write_rows(copy / "preferences.jsonl", [Preference.model_validate(PREFERENCE)])
    write_rows(copy / "revisions.jsonl", [Revision.model_validate(REVISION)])
    return recipe, {name: planned.path for name, planned in places.items() if planned.path.exists()} | {"judged": copy}


def change(folder: Path, **values: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def look(world: Any, name: str) -> None:
    """Everything that reads a run directory and trains nothing."""
    recipe, runs = world
    root = runs["base"].parents[2]
    taken(root, lambda: (lineage(Run.load(runs[name])), chain(Run.load(runs[name])), model_card(Run.load(runs[name]))))
    taken(root, lambda: compare(str(runs["base"]), str(runs["sft"]), 100, 0))
    taken(root, lambda: show_effect(str(runs["judged"])))
    list(users(Path(recipe.runs)))  # passes over what it cannot read
    taken(root, lambda: (report.closing_table(recipe), report.write_report(recipe)), writes=True)


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Any:
    kept = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(kept)


FILES = st.sampled_from([(n, "manifest.json") for n in ("base", "sft", "reward", "dpo", "judged", "evals-sft")])
SCORED = st.sampled_from([(n, f) for n in ("evals-base", "evals-sft") for f in ("evals.json", "manifest.json")])


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of a report's time; every tenth case draws them (see below)."""
    for module, name in (
        (report.sections, "truth_plot"),
        (report.training, "curve_plot"),
        (report.constitution, "principles_plot"),
        (report.measures, "confidence_plot"),
    ):
        monkeypatch.setattr(module, name, lambda *a, **k: "<svg></svg>")


@cases(400, st.one_of(FILES, SCORED), st.data())
def test_run_directories_with_something_changed(world, no_plots, capsys, where, data):
    file = world[1][where[0]] / where[1]
    content = data.draw(mutated(st.just(json.loads(file.read_text()))).map(dumps)).encode()
    with replaced(file, content):
        look(world, where[0])


@cases(20, st.one_of(FILES, SCORED), st.data())
def test_run_directories_with_something_changed_and_plotted(world, capsys, where, data):
    file = world[1][where[0]] / where[1]
    content = data.draw(mutated(st.just(json.loads(file.read_text()))).map(dumps)).encode()
    with replaced(file, content):
        look(world, where[0])


@cases(150, st.one_of(FILES, SCORED), st.one_of(st.binary(max_size=40), JSON.map(lambda v: dumps(v).encode())))
@example(("sft", "manifest.json"), b"[" * 9999)
@example(("sft", "manifest.json"), b"")
def test_run_directories_with_anything_in_a_file(world, no_plots, capsys, where, content):
    with replaced(world[1][where[0]] / where[1], content):
        look(world, where[0])


@cases(
    100, st.lists(st.one_of(JSON, st.fixed_dictionaries({"step": JSON, "loss": JSON, "seconds/rollout": JSON})), max_size=4)
)
def test_metrics_of_any_kind(world, no_plots, rows):
    recipe, runs = world
    with replaced(runs["sft"] / "metrics.jsonl", "\n".join(map(dumps, rows)).encode()):
        assert taken(runs["base"].parents[2], lambda: report.write_report(recipe), writes=True)


@pytest.mark.parametrize(
    "values",
    [
        {"parents": ["base"]},
        {"parents": {"model": "../../elsewhere"}},
        {"recipe": None},
        {"recipe": {}},
        {"metrics": None},
        {"incidents": {}},
        {"data": [1]},
        {"seconds": "long"},
        {"judge": {"methods": {}, "principles": {"../x": {}}, "chosen": {}}},
    ],
)
def test_a_manifest_of_wrong_types_is_refused_by_its_key(world, values):
    _, runs = world
    file = runs["sft"] / "manifest.json"
    with replaced(file, json.dumps(json.loads(file.read_text()) | values).encode()):
        with pytest.raises(UserError, match=f"manifest.json: {next(iter(values))}"):
            Run.load(runs["sft"])
        assert not taken(runs["sft"], lambda: model_card(Run.load(runs["sft"])))


@pytest.mark.parametrize("key", ["stage", "status", "parents", "recipe"])
def test_a_manifest_that_lacks_what_commands_go_by_is_refused(world, key):
    _, runs = world
    file = runs["sft"] / "manifest.json"
    values = json.loads(file.read_text())
    del values[key]
    with replaced(file, json.dumps(values).encode()), pytest.raises(UserError, match=f"{key}: Field required"):
        Run.load(runs["sft"])


def test_a_run_that_is_its_own_ancestor_ends(world):
    _, runs = world
    kept = (runs["sft"] / "manifest.json").read_bytes()
    change(runs["sft"], parents={"model": runs["sft"].name})
    with replaced(runs["sft"] / "manifest.json", (runs["sft"] / "manifest.json").read_bytes()):
        assert [run.path for run in lineage(Run.load(runs["sft"]))] == [runs["sft"]]
        with pytest.raises(UserError, match="its own ancestor"):
            chain(Run.load(runs["sft"]))
    (runs["sft"] / "manifest.json").write_bytes(kept)


def test_ten_thousand_cases_were_fed():
    """The last test: all others of this file must have been run before it."""
    own = [name for name, test in globals().items() if name.startswith("test_") and hasattr(test, "hypothesis")]
    if own != [name for name in own if fed[name]]:
        pytest.skip("some of this file's tests were not run")
    assert sum(fed.values()) >= WANTED
