"""The record of reasons: what a newcomer asks run directories, years later."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest

from truthward import provenance
from truthward.errors import UserError
from truthward.ledger import Run, hash_code, hash_path, open_run, plan, write_json
from truthward.recipe import load_recipe
from truthward.record.archive import Archive, author, kept_code, kept_data, lineage, resolve, settings_of
from truthward.record.decisions import decide, decisions_on
from truthward.record.difference import code, rows, values
from truthward.record.query import find
from truthward.record.rows import rows_of
from truthward.record.trace import trace
from truthward.record.why import tried

RECIPE = """name = "old"
runs = "{root}/runs"
stages = ["base", "sft", "constitution", "dpo"]
[why]
stages = "no PPO on so few rows"
[sft]
data = ["{root}/data/demonstrations.jsonl"]
learning_rate = 3e-4
[sft.why]
data = "written for these tests"
learning_rate = "few rows, see docs/log.md"
[constitution]
principles = ["{root}/principles.toml"]
prompts = ["{root}/data/prompts.jsonl"]
[constitution.why]
principles = "written for these tests"
prompts = "written for these tests"
[judge]
bank = "{root}/data/prompts.jsonl"
why = {{ bank = "nobody reads it here" }}
[dpo]
preferences = ["{root}/data/preferences.jsonl", "constitution"]
beta = {beta}
[dpo.why]
preferences = "written for these tests"
beta = "{reason}"
[evals]
truth = "{root}/data/bank"
style_bank = "{root}/data/bank"
first_questions = "{root}/data/prompts.jsonl"
sets = ["truth"]
models = ["sft", "dpo"]
[evals.why]
truth = "written for these tests"
style_bank = "written for these tests"
first_questions = "written for these tests"
sets = "one set is enough here"
models = "base is not asked here"
"""
PRINCIPLE = """[[principle]]
id = "plain-words"
version = 1
title = "Plain words"
text = "Say it plainly."
critique = "What is not plain here?"
revision = "Say it again, plainly."
follow = "You speak plainly."
violate = "You speak darkly."
why = "readers are busy"
"""


def git(root: Path, *words: str) -> None:
    identity = ["-c", "user.name=Ada Example", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)


def write(path: Path, *found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def preference(word: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Is {word} real?", "chosen": f"{word} is.", "rejected": f"{word} is not.", **more}


class History:
    """A small team's folder: data, a recipe under git, and what its runs left behind, made by the ledger itself."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe = root, root / "recipe.toml"
        write(root / "data/demonstrations.jsonl", {"id": "d"})
        write(root / "data/prompts.jsonl", {"id": "p", "prompt": "Is tea real?"})
        write(root / "data/preferences.jsonl", preference("tea"), preference("iron"))
        write(root / "data/bank/things.jsonl", {"id": "q"})
        (root / "data/sources.toml").write_text('[[source]]\npath = "."\nlicence = "CC0-1.0"\norigin = "typed in"\n')
        (root / "principles.toml").write_text(PRINCIPLE)
        git(root, "init", "-q")

    def launch(self, beta: float, reason: str, mc1: float, *overrides: str, why: str = "") -> dict[str, Run]:
        """Commit the recipe, 'train' every stage, and score its models."""
        self.recipe.write_text(RECIPE.format(root=self.root, beta=beta, reason=reason))
        git(self.root, "add", "-A")
        git(self.root, "commit", "-q", "--allow-empty", "-m", reason)
        provenance.authors.cache_clear()
        hash_path.cache_clear()
        recipe = load_recipe(self.recipe, list(overrides), why)
        made = {}
        for name, planned in plan(recipe).items():
            with open_run(recipe, name) as run:
                if not run.done:
                    self._finish(run, name, planned.parents, mc1)
            made[name] = run
        return made

    def _finish(self, run: Run, name: str, parents: dict[str, str], mc1: float) -> None:
        if name == "constitution":
            made = {"principle": ["plain-words"], "source": "constitution/p/samples", "probability": 0.7, "seed": 3}
            write(run.path / "preferences.jsonl", preference("gold", **made, model="m"))
            run.record(judge={"methods": {}, "principles": {"plain-words": {}}, "chosen": {"plain-words": "contrast"}})
        if run.stage == "evals":
            score = {"mean": mc1 if name == "evals-dpo" else 0.3, "low": 0.2, "high": 0.6, "n": 2}
            metrics = {"truth.mc1": score, "truth.mc2": score, "truth.pairs": score, "persona.kept": {**score, "mean": 0.9}}
            change = {**score, "low": 0.1, "p_corrected": 0.5, "detectable": 0.2}
            against = {"stage": "sft", "differences": dict.fromkeys(metrics, change), "flipped": []}
            value = {"model": parents["model"], "stage": name.removeprefix("evals-"), "metrics": metrics, "items": []}
            value |= {"bank": "bank", "about": {}, "by_topic": {"truth": {}}}
            write_json(run.path / "evals.json", value | ({"against_parent": against} if name == "evals-dpo" else {}))
            run.record(gate={"mode": "block" if mc1 < 0.35 else "off", "text": "truth.mc1 fell"})
        run.finish(metrics={"loss": 0.5})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, dict[str, Run], dict[str, Run]]:
    """Two launches: beta 0.1 gave 0.31 and was overridden, beta 0.3 gave 0.45."""
    history = History(tmp_path_factory.mktemp("team"))
    first = history.launch(0.1, "the value of the paper", 0.31)
    first["evals-dpo"].override("a draw of two questions decides nothing")
    first["dpo"].incident("spike", step=3)
    write(history.root / "data/preferences.jsonl", preference("tea"), preference("salt"))
    return history, first, history.launch(0.3, "0.1 forgot its manners, see the first run", 0.45)


def truthward(*words: str, cwd: Path | None = None) -> str:
    done = commands.run("truthward", *words, cwd=cwd, light=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what a run puts on record


def test_the_manifest_says_who_gave_each_reason_and_when(made):
    _, _, second = made
    setting, decided = settings_of(second["dpo"])["dpo.beta"]
    written = author(setting, decided)
    assert written["by"] == "Ada Example"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", written["at"])
    assert re.fullmatch(r"[0-9a-f]{12}", written["commit"])


def test_an_override_is_by_whoever_launches(made, tmp_path):
    history, _, _ = made
    recipe = load_recipe(history.recipe, ["dpo.beta=0.2"], "between the two that were tried")
    found = provenance.launch(recipe.origin)
    assert found["launched"]["overrides"] == ["dpo.beta=0.2"]
    assert found["authors"]["dpo.beta"] == {"by": provenance.who(), "at": provenance.now()[:10], "commit": ""}
    assert found["authors"]["sft.data"]["by"] == "Ada Example"


def test_data_and_code_are_kept_as_they_were(made):
    history, first, _ = made
    path = str(history.root / "data/preferences.jsonl")
    assert "iron" in (kept_data(first["dpo"], path) / "preferences.jsonl").read_text()
    assert "iron" not in Path(path).read_text()
    assert first["dpo"].manifest["code"] == hash_code("rl.dpo")
    assert kept_code(first["dpo"])["rl.losses"] == (Path(__file__).parent.parent / "rl/losses.py").read_text()


def test_rows_licence_and_origin_of_data_are_on_record(made):
    history, first, _ = made
    about = first["dpo"].manifest["sources"][str(history.root / "data/preferences.jsonl")]
    assert about | {"bytes": 0} == {"files": 1, "rows": 2, "bytes": 0, "licence": "CC0-1.0", "origin": "typed in"}


# ------------------------------------------------------------------------------------------------------------- archive


def test_a_run_is_found_by_path_by_name_and_by_the_start_of_its_name(made):
    history, first, _ = made
    run, runs = first["dpo"], str(history.root / "runs")
    for name in (str(run.path), run.path.name, f"old/{run.path.name}", run.path.name[:8]):
        assert resolve(name, runs)[0].path.name == run.path.name
    assert "there is no run dpo-none" in refusal(lambda: resolve("dpo-none", runs))
    assert "there is no run dp" in refusal(lambda: resolve("dp", runs))


def test_a_name_that_fits_two_runs_is_refused_with_both(made, tmp_path):
    history, first, _ = made
    for name in ("a", "b"):
        shutil.copytree(first["base"].path, tmp_path / name / first["base"].path.name)
    message = refusal(lambda: resolve(first["base"].path.name, str(tmp_path)))
    assert "2 runs" in message
    assert f"a/{first['base'].path.name}, b/{first['base'].path.name}" in message


def test_an_exported_model_leads_back_to_its_run(made, tmp_path):
    history, first, _ = made
    (tmp_path / "truthward.json").write_text(json.dumps([first["base"].manifest, first["dpo"].manifest]))
    assert resolve(str(tmp_path), str(history.root / "runs"))[0].path == first["dpo"].path


def test_a_manifest_that_cannot_be_read_is_set_aside(made, tmp_path):
    history, first, _ = made
    shutil.copytree(history.root / "runs", tmp_path / "runs")
    for name, text in (("x", "{"), ("y", "[]"), ("z", '{"stage": "sft"}')):
        (tmp_path / "runs/old" / name).mkdir()
        (tmp_path / "runs/old" / name / "manifest.json").write_text(text)
    archive = Archive(tmp_path / "runs")
    assert len(archive.unreadable) == 3
    assert len(archive.runs) == len(Archive(history.root / "runs").runs)


def test_lineage_ends_where_damaged_manifests_name_each_other(tmp_path):
    for name, parent in (("a-1", "b-1"), ("b-1", "a-1")):
        recipe = {"name": "x", "stages": ["sft"], "model": {"base": "x"}}
        manifest = {"stage": name[0], "status": "complete", "parents": {"model": parent}, "recipe": recipe}
        write_json(tmp_path / name / "manifest.json", manifest)
    assert [r.path.name for r in lineage(Run.load(tmp_path / "a-1"))] == ["b-1", "a-1"]


# ------------------------------------------------------------------------------------------------ the questions themselves


def test_trace_tells_all_that_a_model_came_from(made):
    history, first, _ = made
    found = trace(first["dpo"], history.root / "decisions")
    assert [r["stage"] for r in found["runs"]] == ["base", "sft", "constitution", "dpo"]
    data = {Path(d["path"]).name: d for d in found["data"]}
    assert data["preferences.jsonl"]["rows"] == 2
    assert data["preferences.jsonl"]["licence"] == "CC0-1.0"
    assert data["preferences.jsonl"]["reason"] == "written for these tests"
    assert found["evals"]["metrics"]["truth.mc1"]["mean"] == 0.31
    assert found["evals"]["against"]["parent"]["truth.mc1"]["low"] == 0.1
    assert [o["reason"] for o in found["overrides"]] == ["a draw of two questions decides nothing"]
    assert [i["kind"] for i in found["incidents"]] == ["spike"]
    assert {v["key"]: v["value"] for v in found["values"]}["dpo.beta"] == 0.1


def test_why_tells_every_value_that_was_tried_and_what_it_gave(made):
    history, first, second = made
    found = sorted(tried(Archive(history.root / "runs"), second["dpo"], "dpo.beta"), key=lambda row: row["value"])
    assert [(r["value"], r["reason"], r["this"]) for r in found] == [
        (0.1, "the value of the paper", False),
        (0.3, "0.1 forgot its manners, see the first run", True),
    ]
    assert "MC1 0.310" in found[0]["outcome"]
    assert "MC1 0.450" in found[1]["outcome"]


def test_a_value_belongs_to_the_run_of_its_stage(made):
    """The recipe of a later run may hold another value of an earlier stage than the one it was made with."""
    _, first, _ = made
    assert settings_of(first["dpo"])["sft.learning_rate"][1].stage == "sft"
    assert "dpo.beta" not in settings_of(first["sft"])


def test_diff_tells_values_rows_and_code(made, tmp_path):
    history, first, second = made
    changed = [c for c in values(first["dpo"], second["dpo"]) if c.key == "dpo.beta"]
    assert changed[0].values == (0.1, 0.3)
    assert changed[0].reasons[0] == "the value of the paper"
    found = {Path(r.source).name: r for r in rows(first["dpo"], second["dpo"])}
    assert ["iron" in line for line in found["preferences.jsonl"].removed] == [True]
    assert ["salt" in line for line in found["preferences.jsonl"].added] == [True]
    assert code(first["dpo"], second["dpo"]) == {}


def test_diff_shows_changed_code_by_module(made, tmp_path):
    history, first, _ = made
    shutil.copytree(history.root / "runs", tmp_path / "runs")
    other = Run.load(tmp_path / "runs/old" / first["dpo"].path.name)
    sources = kept_code(other)
    other.record(code="0" * 64)
    write_json(tmp_path / "runs/old/kept/code" / f"{'0' * 16}.json", sources | {"rl.dpo": sources["rl.dpo"] + "# more\n"})
    lines = code(first["dpo"], other)["rl.dpo"]
    assert [line for line in lines[2:] if line[0] in "+-"] == ["+# more"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("dpo.beta > 0.2", ["0.45"]),
        ("dpo.beta > 0.03 and evals.mc1 > 0.3 and stage == 'dpo'", ["0.31", "0.45"]),
        ("evals.mc1 < 0.4 and not dpo.beta > 0.2 and stage == 'dpo'", ["0.31"]),
        ("0.2 < dpo.beta <= 0.3", ["0.45"]),
        ("stage == 'dpo' and incidents > 0", ["0.31"]),
        ("stage in ['dpo'] and evals.kept == 0.9 and (dpo.beta == 0.1 or dpo.beta == 0.3)", ["0.31", "0.45"]),
        ("dpo.beta > 'a'", []),
        ("not dpo.beta > 0.2 and stage == 'dpo'", ["0.31"]),
        ("packages.torch >= '2' and metrics.loss < 1 and dpo.beta == 0.3", ["0.45"]),
    ],
)
def test_find_answers(made, expression, expected):
    history, first, second = made
    names = {first["dpo"].path.name: "0.31", second["dpo"].path.name: "0.45"}
    found = [names.get(run.path.name, run.path.name) for run, _ in find(Archive(history.root / "runs"), expression)]
    assert sorted(n for n in found if not n.startswith("evals")) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "ppo.kl_coef >",
        "__import__('os').system('x')",
        "dpo.beta ** 9",
        "dpo.bta > 1",
        "nope == 1",
        "[x for x in y]",
        "(" * 500,
    ],
)
def test_find_refuses_what_is_no_search(made, expression):
    history, _, _ = made
    refusal(lambda: find(Archive(history.root / "runs"), expression))


def test_rows_by_principle(made):
    _, first, _ = made
    found = [r for r in rows_of(first["dpo"]) if "plain-words" in r["principle"]]
    assert [(r["kind"], r["stage"], r["row"]["prompt"]) for r in found] == [("preference", "dpo", "Is gold real?")]
    assert sum(r["source"].endswith("data/preferences.jsonl") for r in rows_of(first["dpo"])) == 2


def test_a_decision_is_a_dated_page_that_runs_lead_to(made, tmp_path):
    history, first, second = made
    shutil.copytree(history.root / "runs", tmp_path / "runs")
    run = Run.load(tmp_path / "runs/old" / second["dpo"].path.name)
    page = decide("Keep beta at 0.3", "0.1 forgot its manners", [run], tmp_path / "pages")
    assert page.name == "0001-keep-beta-at-0-3.md"
    text = page.read_text()
    assert text.startswith(f"# 1. Keep beta at 0.3\n\n{provenance.now()[:10]}, ")
    assert run.path.name in text
    assert "0.450 [0.20, 0.60]" in text
    assert "beta 0.3" in text
    assert [d["title"] for d in decisions_on(Run.load(run.path), tmp_path / "pages")] == ["Keep beta at 0.3"]
    assert decide("Another", "it follows from #12", [], tmp_path / "pages").name == "0002-another.md"
    assert "says nothing" in refusal(lambda: decide("Third", "test", [], tmp_path / "pages"))
    assert len(list((tmp_path / "pages").iterdir())) == 2


def test_every_command_answers(made):
    history, first, second = made
    runs = ["--runs", str(history.root / "runs")]
    a, b = first["dpo"].path.name, second["dpo"].path.name
    assert "plain-words" in truthward("trace", a, *runs)
    assert json.loads(truthward("trace", a, "--json", *runs))["data"]
    told = truthward("why", b, "beta", *runs)
    assert "0.1 forgot its manners" in told
    assert "Ada Example" in told
    assert "the value of the paper" in told
    assert "dpo.beta" in truthward("why", b, *runs)
    assert "salt" in truthward("diff", a, b, *runs)
    assert truthward("find", "dpo.beta > 0.2 and stage == 'dpo'", "--paths", *runs).split() == [str(second["dpo"].path)]
    assert "gold" in truthward("rows", a, "--principle", "plain-words", *runs)
