"""The report and the model card, from a small synthetic tree of run directories."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from truthward.card import model_card
from truthward.ledger import Planned, Run, plan, write_json
from truthward.reasons import missing_reasons
from truthward.recipe import Recipe, load_recipe
from truthward.record.settings import recipe_toml
from truthward.records import Preference
from truthward.report import closing_table, write_report
from truthward.report import constitution as section
from truthward.report.sections import SECTIONS
from truthward.report.view import gather

ATTACK = "<script>alert('x')</script>"
TOPICS = ("sky", "sea")
RECIPE = """
name = "small"
runs = "{root}/runs"
stages = ["base", "sft", "reward", "dpo", "ppo"]
[why]
stages = "no constitution in a test"
[sft]
data = ["{root}/demonstrations.jsonl"]
learning_rate = 3e-4
[sft.why]
data = "made up, see {home}/notes.txt"
learning_rate = "few rows <b>and</b> a small model"
[reward]
preferences = ["{root}/bank"]
validation = "{root}/bank"
why = {{ preferences = "made up", validation = "made up" }}
[dpo]
preferences = ["{root}/bank"]
why = {{ preferences = "made up" }}
[ppo]
prompts = "{root}/prompts.jsonl"
why = {{ prompts = "made up" }}
[evals]
truth = "{root}/bank"
first_questions = "{root}/prompts.jsonl"
resamples = 100
sets = ["truth"]
why = {{ truth = "made up", first_questions = "made up", resamples = "quick", sets = "quick" }}
"""


def _interval(mean: float, low: float, high: float, n: int = 4) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "n": n}


def _all(value: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("truth.mc1", "truth.mc2", "truth.pairs"), value)


def _items(right: int) -> list[dict[str, Any]]:
    return [
        {
            "set": "truth",
            "id": f"q{i}",
            "topic": TOPICS[i % 2],
            "values": {"mc1": float(i < right), "mc2": 0.5, "pairs": 0.5},
            "picked": f"True {i}.",
        }
        for i in range(4)
    ]


def first_answer(stage: str) -> dict[str, str]:
    return {"prompt": "Is the <sea> dry?", "kind": "fact", "greedy": f"{stage}: {ATTACK}", "sampled": f"{stage}, warmer"}


def _evals(planned: dict[str, Planned], recipe: Recipe, stage: str, **more: Any) -> dict[str, Any]:
    score = _interval(0.457, 0.402, 0.511)
    return {
        "model": planned[stage].path.name,
        "stage": stage,
        "bank": recipe.evals.truth,
        "dtype": "torch.float32",
        "dtype_reason": "set in the recipe",
        "about": {m: {"label": m, "better": "higher"} for m in _all(0)},
        "metrics": _all(score),
        "by_topic": {"truth": {topic: _all(score) for topic in TOPICS}},
        "baselines": {name: _all(0.25) for name in ("longest answer", "shortest answer", "first word", "bag of words")},
        "items": _items(1 if stage == "base" else 3),
        "first_questions": [first_answer(stage)],
        **more,
    }


def _finish(recipe: Recipe, planned: Planned, **more: Any) -> None:
    manifest = {
        "stage": planned.stage,
        "status": "complete",
        "fingerprint": planned.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "parents": planned.parents,
        "data": planned.data,
        "seed": recipe.seed,
        "git": {"commit": "0123456789abcdef", "diff": ""},
        "seconds": 200.4,
        "peak_memory_gb": 1.5,
        "resumed": 1,
        "incidents": [],
    }
    write_json(planned.path / "manifest.json", manifest | more)


def _write_data(root: Path) -> None:
    (root / "bank").mkdir()
    questions = [
        {
            "id": f"q{i}",
            "topic": TOPICS[i % 2],
            "kind": "fact",
            "question": f"Question {i} & why?",
            "true": [f"True {i}."],
            "false": [f"False {i}."],
        }
        for i in range(4)
    ]
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    files = {
        "bank/all.jsonl": questions,
        "demonstrations.jsonl": [{"id": "d", "messages": turns}],
        "prompts.jsonl": [{"id": "p", "prompt": "Is the <sea> dry?"}],
    }
    for name, rows in files.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return furnish(tmp_path)


def furnish(root: Path) -> Recipe:
    """A recipe whose base and sft are complete and scored, reward is complete, dpo unfinished, and ppo not run."""
    _write_data(root)
    file = root / "small.toml"
    file.write_text(RECIPE.format(root=root, home=Path.home()), encoding="utf-8")
    recipe = load_recipe(file)
    planned = plan(recipe)
    _finish(recipe, planned["base"], metrics={})
    _finish(
        recipe, planned["sft"], metrics={"rows": 1}, dtype="torch.float32", incidents=[{"time": "T", "kind": "slow disk"}]
    )
    _finish(recipe, planned["reward"], metrics={"validation_accuracy": _interval(0.712, 0.66, 0.76)})
    _finish(recipe, planned["dpo"], status="running")
    losses = [{"step": i, "loss": 2.0 / i if i != 3 else None} for i in range(1, 40)]
    (planned["sft"].path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in losses), encoding="utf-8")
    flipped = [{"set": "truth", "id": "q1", "better": True, "before": "False 1.", "after": "True 1."}]
    compared = {
        "evals": planned["base"].path.name,
        "stage": "base",
        "differences": {
            "truth.mc1": _interval(0.5, 0.12, 0.88) | {"p_corrected": 0.012, "detectable": 0.3},
            "truth.mc2": _interval(-0.02, -0.05, 0.01) | {"p_corrected": 1.0, "detectable": 0.05},
            "truth.pairs": _interval(0.0, -0.1, 0.1) | {"p_corrected": 1.0, "detectable": 0.1},
        },
        "flipped": flipped,
    }
    _finish(recipe, planned["evals-base"], gate={"mode": "off", "gated": [], "worse": {}, "text": "nothing to compare with"})
    write_json(planned["evals-base"].path / "evals.json", _evals(planned, recipe, "base"))
    _finish(
        recipe,
        planned["evals-sft"],
        gate={"mode": "off", "gated": ["truth.mc1"], "worse": {}, "text": "not worse than its parent"},
    )
    evals = _evals(planned, recipe, "sft", against_parent=compared, against_base=compared)
    write_json(planned["evals-sft"].path / "evals.json", evals)
    return recipe


def change(recipe: Recipe, name: str, **values: Any) -> None:
    """Rewrite keys of an ``evals.json``; None takes one out."""
    path = plan(recipe)[name].path / "evals.json"
    changed = json.loads(path.read_text(encoding="utf-8")) | values
    write_json(path, {key: value for key, value in changed.items() if value is not None})


def test_report_escapes_what_models_and_files_say(recipe: Recipe) -> None:
    text = write_report(recipe).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "sft: &lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text
    assert "few rows &lt;b&gt;and&lt;/b&gt; a small model" in text
    assert "Is the &lt;sea&gt; dry?" in text


def test_report_is_self_contained(recipe: Recipe) -> None:
    path = write_report(recipe)
    assert path == Path(recipe.runs) / "small" / "report.html"
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]*)", text) + re.findall(r"url\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)


def test_report_says_the_outcome_and_the_numbers(recipe: Recipe) -> None:
    text = write_report(recipe).read_text(encoding="utf-8")
    assert "(sft) is more truthful than the base by MC1 only." in text
    assert "MC1 +0.500 [+0.120, +0.880], which clears zero" in text
    assert "MC2 \N{MINUS SIGN}0.020 [\N{MINUS SIGN}0.050, +0.010], which includes zero" in text
    assert "sft (from base) helped" in text
    assert "validation accuracy 0.712 [0.66, 0.76]" in text
    assert "[0.40, 0.51]" in text
    assert "Question 1 &amp; why?" in text
    assert "slow disk" in text
    assert text.count("<svg") == 2


def test_report_opens_with_what_each_stage_says(recipe: Recipe) -> None:
    """Right behind the verdict, the greedy answer over the sampled one, a column for each stage that was asked."""
    text = write_report(recipe).read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="([^"]*)"', text)[:2] == ["first", "truth"]
    assert re.search(r'<a href="#([^"]*)"', text)[1] == "first"
    section = text.partition('<h2 id="first"')[2].partition("<h2")[0]
    assert re.findall(r"<th [^>]*>([^<]*)<", section) == ["question", "base", "sft"]
    shown = re.findall(r'<div class="(text[^"]*)">([^<]*)<', section)
    said = [("text", f"{s}: {html.escape(ATTACK)}") for s in ("base", "sft")]
    warmer = [("text off", f"{s}, warmer") for s in ("base", "sft")]
    assert shown == [("text", "Is the &lt;sea&gt; dry?"), said[0], warmer[0], said[1], warmer[1]]


def test_answers_that_are_missing_or_empty_are_told_apart(recipe: Recipe) -> None:
    """One stage was asked another question too, and said nothing to it."""
    silent = {"prompt": "And wet?", "greedy": "", "sampled": ""}
    change(recipe, "evals-sft", first_questions=[first_answer("sft"), silent])
    section = str(SECTIONS["first"][1](gather(recipe)))
    assert re.findall(r"<tr>(?:(?!</tr>).)*And wet.*?</tr>", section, re.DOTALL)[0].count("<td>-</td>") == 1
    assert section.count("(no words)") == 2


def test_evals_from_before_the_first_questions_are_read(recipe: Recipe) -> None:
    """They held samples of another form, and have no column in a table that others fill."""
    older = [{"prompt": "p", "kind": "k", "answer": "a"}]
    change(recipe, "evals-base", samples=older, first_questions=None)
    assert re.findall(r"<th [^>]*>([^<]*)<", str(SECTIONS["first"][1](gather(recipe)))) == ["question", "sft"]
    change(recipe, "evals-sft", samples=older, first_questions=None)
    assert 'id="first"' not in write_report(recipe).read_text(encoding="utf-8")


def test_report_names_missing_stages(recipe: Recipe) -> None:
    text = write_report(recipe).read_text(encoding="utf-8")
    assert "Missing from this report: dpo (unfinished), ppo (not run yet)." in text


def test_report_of_nothing(tmp_path: Path) -> None:
    _write_data(tmp_path)
    file = tmp_path / "small.toml"
    file.write_text(RECIPE.format(root=tmp_path, home=Path.home()), encoding="utf-8")
    text = write_report(load_recipe(file)).read_text(encoding="utf-8")
    assert "there is no outcome to report" in text
    assert "base (not run yet), sft (not run yet)" in text


def test_closing_table(recipe: Recipe) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(closing_table(recipe))
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    stages = {row[0]: " ".join(row[1:]) for row in rows}
    assert stages["sft"] == " ".join(["0.457 [0.40, 0.51]"] * 3) + " +0.500 [+0.120, +0.880] passed 3m20s 1.5GB"
    assert stages["reward"] == "accuracy 0.712 [0.66, 0.76] - 3m20s 1.5GB"
    assert stages["dpo"].startswith("unfinished")
    assert stages["ppo"].startswith("not run yet")


def test_no_home_paths(recipe: Recipe) -> None:
    card = model_card(Run.load(plan(recipe)["sft"].path))
    for text in (write_report(recipe).read_text(encoding="utf-8"), card):
        assert "~/notes.txt" in text
        assert f"{Path.home()}/" not in text


def test_card(recipe: Recipe) -> None:
    planned = plan(recipe)
    card = model_card(Run.load(planned["sft"].path))
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: ")
    assert f"small/{planned['base'].path.name}" in card
    assert "| MC1 | 0.457 [0.40, 0.51] | 4 | +0.500 [+0.120, +0.880] |" in card
    assert next(iter(planned["sft"].data.values())) in card
    assert "This model was not scored." in model_card(Run.load(planned["reward"].path))


def test_card_recipe_loads_again(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "again.toml"
    file.write_text(recipe_toml(recipe.model_dump(mode="json")), encoding="utf-8")
    again = load_recipe(file)
    assert missing_reasons(again) == []
    assert {**again.model_dump(), "runs": "", "sft": {}} == {**recipe.model_dump(), "runs": "", "sft": {}}
    assert again.sft.model_dump(exclude={"why"}) == recipe.sft.model_dump(exclude={"why"})


def test_the_constitutions_section_shows_judge_and_principles():
    interval = {"mean": 0.75, "low": 0.6, "high": 0.9, "n": 34}
    method = {"accuracy": interval, "refused": False, "temperature": 0.1, "brier": 0.21, "ece": 0.04, "longer": None}
    record = {
        "methods": {"contrast": method, "choice": {**method, "refused": True, "first": 0.87}},
        "principles": {"short-and-plain": {"contrast": {"accuracy": interval, "refused": False}}, "no-stereotypes": {}},
        "chosen": {"short-and-plain": "contrast"},
    }
    made, view = Run(Path(), {"judge": record}), SimpleNamespace(stage=lambda name: None)
    row = Preference(prompt="q", chosen="a", rejected="b", probability=0.8, principle=["short-and-plain"])
    shown = "".join(map(str, [*section._judge(record), *section._by_principle(view, made, [], [row] * 3)]))
    shown = re.sub(r' class="[^"]*"', "", shown)
    for text in ("at chance: refused", "qualified", "87%", "0.210", "left out", "2 principles by 2 methods", "<svg", ">3<"):
        assert text in shown
    assert section._judge({}) == []
    assert section._by_principle(view, Run(Path(), {}), [], []) == []
