"""Conversations with one model and with two side by side, as they are started and piped."""

import io
import shutil
import sys
from pathlib import Path

import pytest

from truthward import cli
from truthward.ledger import Run, plan
from truthward.talk import _heads, _under

LINES = "What is tea?\nAnd iron?\nAnd a bee?\n"
OPTIONS = ["--temperature", "1", "--max-new-tokens", "12", "--system", "Be brief."]


@pytest.fixture
def said(monkeypatch, capsys):
    """What ``truthward chat`` with these words prints to lines from a pipe, and its exit code."""

    def run(*words, lines=LINES):
        monkeypatch.setattr(sys, "argv", ["truthward", "chat", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    return run


@pytest.fixture
def paths(lab) -> dict[str, Path]:
    return {name: planned.path for name, planned in plan(lab.recipe()).items()}


def parts(output: str, *names: str) -> dict[str, str]:
    """The answers behind each name, joined, without blanks."""
    found, current = dict.fromkeys(names, ""), ""
    for line in output.split("\n"):
        head = next((name for name in names if line.startswith(f"{name}:")), "")
        current = head or current
        found[current] += "".join(line.removeprefix(f"{head}:" if head else "").split())
    return found


def test_two_models_answer_each_line_as_each_does_alone(said, paths):
    """With the same settings and, from the second line on, with its own answers before it and never the other's."""
    alone = {name: said(paths[name], *OPTIONS)[1].out for name in ("sft", "dpo")}
    code, both = said(paths["sft"], "--compare", paths["dpo"], *OPTIONS)
    assert code == 0, both.err
    assert parts(both.out, "sft", "dpo") == {name: "".join(text.split()) for name, text in alone.items()}
    assert alone["sft"] != alone["dpo"]
    heads = [line.partition(":")[0] for line in both.out.split("\n") if line.startswith(("sft: ", "dpo: "))]
    assert heads == ["sft", "dpo"] * 3


def test_settings_reach_both(said, paths):
    whole = said(paths["sft"], "--compare", paths["dpo"], *OPTIONS)[1].out
    for number, other in enumerate(("0", "3", "Be long.")):
        changed = [*OPTIONS[: 2 * number + 1], other, *OPTIONS[2 * number + 2 :]]
        told = parts(said(paths["sft"], "--compare", paths["dpo"], *changed)[1].out, "sft", "dpo")
        assert all(told[name] != text for name, text in parts(whole, "sft", "dpo").items()), changed


def test_an_empty_line_ends(said, paths):
    assert said(paths["sft"], "--compare", paths["dpo"], lines="\nWhat is tea?\n")[1].out == ""


def test_names_tell_runs_apart():
    def heads(*runs):
        return _heads(*(Run(Path(path), {"stage": stage}) for path, stage in runs))

    assert heads(("r/base-1", "base"), ("r/dpo-2", "dpo")) == ["base: ", "dpo:  "]
    assert heads(("r/dpo-1", "dpo"), ("r/dpo-2", "dpo")) == ["dpo-1: ", "dpo-2: "]
    assert heads(("a/dpo-1", "dpo"), ("b/dpo-1", "dpo")) == ["a/dpo-1: ", "b/dpo-1: "]
    assert heads(("a/c/dpo-1", "dpo"), ("b/c/dpo-1", "dpo"))[0].endswith("a/c/dpo-1: ")


def test_further_lines_of_an_answer_stand_below_its_first():
    assert _under("dpo: ", "One.\nTwo.") == "dpo: One.\n     Two."
    assert _under("", "One.\nTwo.") == "One.\nTwo."


@pytest.mark.parametrize("bad", ["nowhere", "", "itself", "its own path", "no weights"])
def test_what_cannot_be_compared_is_refused_in_one_message(said, paths, tmp_path, bad):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(paths["base"] / "manifest.json", empty)
    first = paths["sft"]
    given, words = {
        "nowhere": (tmp_path / "nowhere", "not a run directory"),
        "": ("", "not a run directory"),
        "itself": (first, "a model is compared with itself"),
        "its own path": (first / ".." / first.name, "a model is compared with itself"),
        "no weights": (empty, "there are no weights"),
    }[bad]
    code, output = said(first, "--compare", given)
    assert (code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert words in output.err
    assert "Traceback" not in output.err
