"""What ``truthward check`` finds before compute is spent, and how the commands tell it."""

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import commands
import pytest
from lab import ROOT, write

from truthward import cli
from truthward.banks import BANKS
from truthward.check import Facts, check, examine
from truthward.check import facts as facts_module
from truthward.check.findings import RULES
from truthward.check.rows import leaked
from truthward.console import console
from truthward.errors import UserError
from truthward.recipe import load_recipe

TEST_ROW = json.loads((ROOT / "data/truth/test/space-astronomy.jsonl").read_text().splitlines()[0])

pytestmark = pytest.mark.usefixtures("at_root")


@pytest.fixture
def tiny(tmp_path):
    return lambda *overrides: load_recipe("recipes/tiny.toml", [f"runs={tmp_path}/runs", *overrides])


def refusal(recipe) -> str:
    with pytest.raises(UserError) as caught:
        check(recipe, "my.toml", brief=True)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- leaks


def reworded(question: str) -> str:
    """Lower case, other marks, one more word: no longer equal, still the same question."""
    return f"So {question.lower().rstrip('?')} !"


def planted(tmp_path: Path, kind: str, text: str) -> str:
    """A data file that holds a text among its rows, as an override that names it."""
    row, bank = {"id": "x", "prompt": text}, json.dumps
    match kind:
        case "sft.data":
            turn = [{"role": r, "content": c} for r, c in (("user", text), ("assistant", "No."))]
            write(tmp_path / "planted.jsonl", [{"id": "x", "messages": turn}])
            return f"sft.data={bank([str(tmp_path / 'planted.jsonl')])}"
        case "dpo.preferences" | "reward.preferences":
            write(tmp_path / "planted.jsonl", [{"prompt": text, "chosen": "a", "rejected": "b"}])
            return f"{kind}={bank(['constitution', str(tmp_path / 'planted.jsonl')])}"
        case "reward.preferences as a bank":
            (tmp_path / "planted").mkdir(exist_ok=True)
            write(tmp_path / "planted" / "planted.jsonl", [{**TEST_ROW, "question": text}])
            return f"reward.preferences={bank([str(tmp_path / 'planted')])}"
        case "constitution.prompts":
            write(tmp_path / "planted.jsonl", [row])
            return f"{kind}={bank([str(tmp_path / 'planted.jsonl')])}"
        case _:
            write(tmp_path / "planted.jsonl", [row])
            return f"{kind}={tmp_path / 'planted.jsonl'}"


SOURCES = (
    "sft.data",
    "dpo.preferences",
    "reward.preferences",
    "reward.preferences as a bank",
    "constitution.prompts",
    "ppo.prompts",
)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("change", [str, reworded], ids=["exact", "near"])
def test_a_test_question_in_the_training_data_is_refused_with_both_texts(tmp_path, tiny, kind, change):
    text = change(TEST_ROW["question"])
    message = refusal(tiny(planted(tmp_path, kind, text)))
    assert "near-duplicates of test questions" in message
    assert repr(text) in message
    assert repr(TEST_ROW["question"]) in message
    assert "sft.data" in message if kind == "sft.data" else "planted" in message


def test_another_question_of_the_same_topic_is_no_leak(tmp_path, tiny):
    changed = tiny(planted(tmp_path, "ppo.prompts", "How many moons does the planet Mars have?"))
    assert leaked(Facts(changed, "my.toml")) == []


def test_what_no_stage_of_the_recipe_reads_is_not_searched(tmp_path, tiny):
    changed = tiny(planted(tmp_path, "ppo.prompts", TEST_ROW["question"]), 'stages=["base", "sft"]')
    assert leaked(Facts(changed, "my.toml")) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.toml")))
def test_a_shipped_recipe_gives_no_error_and_no_warning(tmp_path, name):
    path = f"recipes/{name}.toml"
    found = examine(Facts(load_recipe(path, [f"runs={tmp_path}"]), path))
    assert [str(f) for f in found if f.level != "note"] == []


# -------------------------------------------------------------------------------------------------------------- data

PATHS = {
    "sft.data": True,
    "constitution.principles": True,
    "constitution.prompts": True,
    "constitution.examples": False,
    "judge.bank": False,
    "reward.preferences": True,
    "reward.validation": False,
    "reward.principle_bank": False,
    "dpo.preferences": True,
    "ppo.prompts": False,
    "evals.truth": False,
    "evals.first_questions": False,
}


@pytest.mark.parametrize(("key", "many"), PATHS.items())
@pytest.mark.parametrize("content", [None, '{"id": 3}\n'], ids=["missing", "faulty"])
def test_data_that_are_missing_or_faulty_are_found_wherever_they_are_named(tmp_path, tiny, key, many, content):
    path = tmp_path / "data.jsonl"
    if content:
        path.write_text(content)
    assert str(path) in refusal(tiny(f'{key}=["{path}"]' if many else f"{key}={path}"))


def test_every_row_of_the_shipped_data_is_read(tiny, monkeypatch):
    seen = set()
    monkeypatch.setattr(facts_module, "read_rows", lambda path, kind: seen.add(path) or [])
    Facts(tiny(), "my.toml").read_all()
    banks = {f"evals/{name}/test" for name in BANKS if name != "truth"} | {"evals/open/dev"}
    assert seen == {
        f"data/{n}"
        for n in {"prompts.jsonl", "first-questions.jsonl", "judge", "truth/train", "truth/dev", "truth/test"} | banks
    }


# -------------------------------------------------------------------------------------------- disk, reasons, commands


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, tiny, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**30))
    message = refusal(tiny())
    assert "1.0 GB are free" in message
    assert str(tmp_path) in message
    assert not (tmp_path / "runs").exists()


def test_a_missing_reason_stops_the_check(tiny):
    assert "no reason is given for" in refusal(tiny("unexplained=stop"))


def test_a_brief_check_counts_its_notes_and_tells_warnings(tiny):
    with console.capture() as captured:
        check(tiny("sft.warmup_ratio=0.5"), "my.toml", brief=True)
    warned, *_, counted = captured.get().splitlines()
    assert warned.startswith("warning: sft.warmup_ratio")
    assert re.fullmatch(r"\d+ notes?: truthward check tells them", counted)
    with console.capture() as captured:
        check(tiny(), "my.toml")
    assert "no reason is given for" in captured.get()


def test_check_prints_what_each_stage_reads_and_writes(tmp_path):
    done = commands.run("truthward", "check", "recipes/tiny.toml", f"runs={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    shown = "".join(done.stdout.split())
    for text in ("stage", "reads", "writes", "data/demonstrations.jsonl", "data/truth/test", '"kl_coef":0.05', "evals-dpo"):
        assert text in shown
    assert "recipes/tiny.toml is in order" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["truthward", "check", "recipes/tiny.toml", "ppo.kl_coeff=0.1"], "did you mean ppo.kl_coef?"),
        (["truthward", "run", "recipes/tiny.tml"], "did you mean recipes/tiny.toml?"),
        (["sft", "nosuch.toml"], "there is no such recipe"),
        (["truthward", "run", "recipes/laptop.toml", "ppo.kl_coef=0.1"], "no reason is given for ppo.kl_coef"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2(words, message):
    done = commands.run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_run_directory_that_is_none_is_told_alike(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["truthward", "chat", "runs/nothing-there"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: runs/nothing-there: this is not a run directory")


# ------------------------------------------------------------------------------------------ all errors, and what is accepted


def test_all_errors_are_told_at_once_and_warnings_do_not_stop(tiny):
    message = refusal(tiny("ppo.value_coef=0.0", "constitution.rounds=0", 'evals.gate="off"'))
    assert message.startswith("2 errors in my.toml")
    for text in ("[critic-untrained]", "[revisions-none]", "why: ", "to do: "):
        assert text in message
    assert "gate-off" not in message
    with console.capture() as captured:
        check(tiny('evals.gate="off"'), "my.toml", brief=True)
    assert "warning: evals.gate: the gate of truth is off" in captured.get()
    assert "[gate-off]" in captured.get()


@pytest.mark.parametrize("word", ["critic-untrained", "critic-untrained@ppo.value_coef"])
def test_an_accepted_error_is_a_note_with_the_recipes_reason(tiny, word):
    accepted = tiny("ppo.value_coef=0.0", f'check.accept=["{word}"]', 'check.why={accept="the critic is warm already"}')
    (finding,) = [f for f in examine(Facts(accepted, "my.toml")) if f.rule == "critic-untrained"]
    assert (finding.level, finding.why) == ("note", "accepted: the critic is warm already")
    check(accepted, "my.toml", brief=True)


def test_what_is_accepted_elsewhere_is_not_accepted_here(tiny):
    assert "critic-untrained" in refusal(tiny("ppo.value_coef=0.0", 'check.accept=["critic-untrained@sft.value_coef"]'))


def test_words_of_accept_that_name_no_rule_or_accept_nothing_are_found(tiny):
    assert "did you mean critic-untrained?" in refusal(tiny('check.accept=["critic-untrainde"]'))
    found = examine(Facts(tiny('check.accept=["critic-untrained"]'), "my.toml"))
    assert [(f.level, f.where) for f in found if f.rule == "accept-idle"] == [("note", "check.accept")]


def test_accepting_needs_a_reason(tiny):
    message = refusal(load_recipe("recipes/laptop.toml", ['check.accept=["gate-off"]']))
    assert "no reason is given for check.accept" in message


def test_every_rule_has_a_planted_mistake_and_stands_in_the_docs():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_check*.py"))
    page = (ROOT / "docs" / "check.md").read_text()
    names = {name for rule in RULES for name in rule.names} | {"accept-idle", "accept-unknown"}
    assert {name for name in names if f'"{name}"' not in sources and name != "accept-unknown"} == set()
    assert {name for name in names if f"`{name}`" not in page} == set()


# ----------------------------------------------------------------------------------------------------- before every stage


def test_a_stage_script_starts_with_the_check_and_stops_at_its_errors(tmp_path):
    done = commands.run("sft", "recipes/tiny.toml", f"runs={tmp_path}", "ppo.value_coef=0.0")
    assert done.returncode == 2
    assert "[critic-untrained]" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_was_checked_on_the_way_is_not_checked_again(tmp_path, monkeypatch):
    from truthward import stage

    asked = []
    monkeypatch.setattr(
        stage.subprocess, "run", lambda words, **_: asked.append(words) or subprocess.CompletedProcess(words, 0)
    )
    recipe = load_recipe("recipes/tiny.toml", [f"runs={tmp_path}"])
    options = stage.arguments("x").parse_args(["recipes/tiny.toml", f"runs={tmp_path}"])
    monkeypatch.setenv(stage.CHECKED, "")
    stage.check_first(options, recipe)
    assert asked[0][-2:] == [f"runs={tmp_path}", "--brief"]
    monkeypatch.setenv(stage.CHECKED, "another plan")
    stage.check_first(options, recipe)
    monkeypatch.setenv(stage.CHECKED, stage.plan_digest(recipe))
    stage.check_first(options, recipe)
    assert len(asked) == 2


def test_the_rules_are_no_part_of_any_stages_code():
    from truthward import ledger
    from truthward.fingerprint import code_of

    for name in ("sft", "reward", "constitution", "evals", *ledger.CODE.values()):
        seen = code_of(name).keys()
        assert "truthward.stage" in seen
        assert not [module for module in seen if module.startswith("truthward.check")]


def test_a_run_that_the_stage_does_not_have_is_refused_by_name(tmp_path):
    done = commands.run("evals", "recipes/tiny.toml", f"runs={tmp_path}", "--only", "evals-stf")
    assert done.returncode == 2
    assert "there is no run evals-stf" in done.stderr
    assert "evals-sft" in done.stderr
