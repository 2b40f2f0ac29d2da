"""What ``truthward check`` finds before compute is spent, and how the commands tell it."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from lab import ROOT, write

from truthward import cli
from truthward.banks import BANKS
from truthward.check import check, leaked, read_data
from truthward.console import console
from truthward.errors import UserError
from truthward.recipe import load_recipe

TEST_ROW = json.loads((ROOT / "data/truth/test/space-astronomy.jsonl").read_text().splitlines()[0])


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def tiny(tmp_path):
    return lambda *overrides: load_recipe("recipes/tiny.toml", [f"runs={tmp_path}/runs", *overrides])


def refusal(recipe) -> str:
    with pytest.raises(UserError) as caught:
        check(recipe, "my.toml", brief=True)
    return str(caught.value)


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


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
    assert leaked(tiny(planted(tmp_path, "ppo.prompts", "How many moons does the planet Mars have?"))) == []


def test_what_no_stage_of_the_recipe_reads_is_not_searched(tmp_path, tiny):
    assert leaked(tiny(planted(tmp_path, "ppo.prompts", TEST_ROW["question"]), 'stages=["base", "sft"]')) == []


@pytest.mark.parametrize("name", ["laptop", "tiny"])
def test_the_shipped_recipes_do_not_leak(name):
    assert leaked(load_recipe(f"recipes/{name}.toml")) == []


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
    "evals.sample_prompts": False,
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
    monkeypatch.setattr("truthward.check.read_rows", lambda path, kind: seen.add(path))
    read_data(tiny())
    banks = {f"evals/{name}/test" for name in BANKS if name != "truth"} | {"evals/open/dev"}
    assert seen == {f"data/{n}" for n in {"prompts.jsonl", "judge", "truth/train", "truth/dev", "truth/test"} | banks}


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


def test_a_brief_check_notes_the_missing_reasons_and_no_more(tiny):
    with console.capture() as captured:
        check(tiny(), "my.toml", brief=True)
    lines = captured.get().splitlines()
    assert lines[0].startswith("note: no reason is given for")
    assert "ppo.iterations" in captured.get()
    assert len(lines) < 10


def test_check_prints_what_each_stage_reads_and_writes(tmp_path):
    done = command("truthward", "check", "recipes/tiny.toml", f"runs={tmp_path}")
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
    done = command(*words)
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
