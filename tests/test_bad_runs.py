"""Run directories that were edited, cut off or made up, fed to every command that reads them and trains nothing.

The cases count towards those of ``test_bad_input.py``; all together are ten thousand and more.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_bad_input
import test_report
from hypothesis import example
from hypothesis import strategies as st
from odd import JSON, cases, dumps, fed, mutated, taken
from test_bad_input import PREFERENCE, REVISION

from evals.compare import compare
from truthward import report
from truthward.amendments import users
from truthward.card import lineage, model_card
from truthward.effects import show_effect
from truthward.errors import UserError
from truthward.ledger import Run, plan, write_json
from truthward.models import chain
from truthward.records import Preference, Revision, write_rows

WANTED = 10_000


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Any:
    """Runs of which some are scored, one has a judge's record, and one was overridden at the gate."""
    root = tmp_path_factory.mktemp("world")
    recipe = test_report.furnish(root)
    places = plan(recipe)
    score = {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 9}
    method = {"accuracy": score, "refused": False, "brier": 0.2, "ece": 0.1, "longer": score, "first": 0.5}
    judge = {"methods": {"choice": method}, "principles": {"kind": {"choice": method}}, "chosen": {"kind": "choice"}}
    change(places["sft"].path, judge=judge, gate={"mode": "block", "worse": {"truth.mc1": "block"}, "text": "worse"})
    change(places["evals-sft"].path, gate={"mode": "block", "override": {"reason": "r", "who": "w", "time": "t"}})
    made = {"principle_accuracy": score, "calibration": {"brier": 0.2, "ece": 0.1}, "principles": {"kind": score}}
    change(places["reward"].path, metrics={"validation_accuracy": score, **made})
    metrics = {"truth.mc2": score, "truth.pairs": score, "short.right": score}
    points = [{"scale": scale, "metrics": metrics} for scale in (0.0, 1.0)]
    frontier = {"model": "sft-1", "parent": "base-1", "split": "dev", "points": points}
    write_json(places["sft"].path / "frontier.json", frontier)
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


FILES = st.sampled_from(
    [(n, "manifest.json") for n in ("base", "sft", "reward", "dpo", "judged", "evals-sft")] + [("sft", "frontier.json")]
)
SCORED = st.sampled_from([(n, f) for n in ("evals-base", "evals-sft") for f in ("evals.json", "manifest.json")])


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of a report's time; every tenth case draws them (see below)."""
    for module, name in (
        (report.sections, "truth_plot"),
        (report.training, "curve_plot"),
        (report.constitution, "principles_plot"),
        (report.measures, "confidence_plot"),
        (report.frontier, "frontier_plot"),
    ):
        monkeypatch.setattr(module, name, lambda *a, **k: "<svg></svg>")


@cases(250, st.one_of(FILES, SCORED), st.data())
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
    """The last test: all others of both files must have been run before it."""
    tests = {**vars(test_bad_input), **globals()}
    own = [name for name, test in tests.items() if name.startswith("test_") and hasattr(test, "hypothesis")]
    if not all(fed[name] for name in own):
        pytest.skip("some of the tests that feed were not run")
    assert sum(fed.values()) >= WANTED
