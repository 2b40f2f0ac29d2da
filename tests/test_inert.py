"""What models, files and people say is read in the report, on the card and on the terminal, and never works there."""

from __future__ import annotations

import html.parser
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import test_report
from hypothesis import given
from hypothesis import strategies as st
from odd import ATTACKS

from truthward import console, talk
from truthward.amendments import show, users
from truthward.card import model_card
from truthward.console import Inert, inert, plain, say, tell
from truthward.ledger import Run, plan, write_json
from truthward.report import closing_table, write_report

TAGS = """html head meta title style body main h1 h2 h3 p a nav div table thead tbody tr th td span br small dl dt dd code
strong figure figcaption svg g path defs use text clippath rect tspan"""
ALLOWED = set(re.findall(r"\w+", TAGS))
HREF = re.compile(r"#[\w-]+")


class Page(html.parser.HTMLParser):
    """Every element and attribute of a page that could do something, and all of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.works += [tag] if tag not in ALLOWED else []
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "srcdoc", "action", "formaction", "data"):
                self.works.append(f"{tag} {name}")
            if name in ("href", "xlink:href") and not HREF.fullmatch(value or ""):
                self.works.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.works.append(f"comment {data[:20]}")


def planted(tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tree of runs in which the attack stands wherever a text of somebody else's can."""
    monkeypatch.setattr(test_report, "ATTACK", attack)
    recipe = test_report.furnish(tmp_path)
    places = plan(recipe)
    sft, evals = Run.load(places["sft"].path), places["evals-sft"].path
    sft.incident(attack, detail=attack)
    sft.record(dtype=attack, dtype_reason=attack, git={"commit": attack, "diff": attack}, packages={attack: attack})
    sft.record(data={attack: attack})
    values = json.loads((evals / "evals.json").read_text(encoding="utf-8"))
    score = values["metrics"]["truth.mc1"]
    values["metrics"][f"skills.{attack}"] = score
    values["about"][f"skills.{attack}"] = {"label": attack, "better": "higher"}
    values["by_topic"]["truth"][attack] = values["by_topic"]["truth"]["sky"]
    values["baselines"][attack] = dict.fromkeys(test_report._all(0), 0.5)
    values["items"].append({**values["items"][0], "set": "skills", "id": attack, "picked": attack})
    values["first_questions"] = [
        {"prompt": attack, "kind": attack, "greedy": f"begin {attack} end", "sampled": f"first {attack} last"}
    ]
    for key in ("against_parent", "against_base"):
        for one in ("truth", "skills"):
            values[key]["flipped"].append({"set": one, "id": attack, "better": False, "before": attack, "after": attack})
    values |= {"bank": attack, "dtype_reason": attack}
    write_json(evals / "evals.json", values)
    write_json(places["evals-sft"].path / "manifest.json", Run.load(evals).manifest | {"dtype": attack})
    return recipe


@pytest.mark.parametrize("attack", ATTACKS, ids=[repr(a) for a in ATTACKS])
def test_an_attack_is_text_in_the_report_and_on_the_card(tmp_path, monkeypatch, attack):
    recipe = planted(tmp_path, attack, monkeypatch)
    text = write_report(recipe).read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.works == []
    assert not console.ODD.search(text)
    for said in (f"begin {attack} end", f"first {attack} last"):
        assert inert(said) in "".join(page.texts)
    card = model_card(Run.load(plan(recipe)["sft"].path))
    assert not console.ODD.search(card)
    assert not works(card)


def works(card: str) -> str:
    """What of a card is neither in a code block, nor between backticks, nor plain, and could work as HTML or a link."""
    outside = re.sub(r"^```.*?^```$", "", card.partition("\n---\n")[2], flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    return "".join(re.findall(r"<[a-z/!]|\]\(|`", outside))


def test_a_card_in_which_something_works_is_found():
    assert works("---\n---\n| `a` | <b> |") == "<b"
    assert works("---\n---\n[x](y)")
    assert not works("---\n---\n| `<b>` | &lt;b> |\n```toml\n<b>\n```\n")


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """A terminal with colours, of which every byte is kept."""
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Inert(file=file, force_terminal=True, color_system="truecolor", width=500))
    return file


STYLES = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.parametrize("attack", ATTACKS, ids=[repr(a) for a in ATTACKS])
def test_an_attack_is_text_on_the_terminal(terminal, capsys, monkeypatch, attack):
    say(f"[bold]run[/] {plain(attack)} [dim]end[/]")
    line = terminal.getvalue()
    assert STYLES.sub("", line) == f"run {inert(attack)} end\n"
    assert line.startswith("\x1b[1mrun\x1b[0m ")  # our own styles stay
    tell(attack)
    assert capsys.readouterr().out == f"{inert(attack)}\n"


@given(st.text())
def test_whatever_somebody_says_is_said_as_it_stands(text):
    file = io.StringIO()
    own = Inert(file=file, width=10_000)
    own.print(f"[bold]a[/]{plain(text)}[red]b[/]", highlight=False, soft_wrap=True)
    lines = inert(text).expandtabs(8) if "\t" in text else inert(text)
    assert "\t" in text or file.getvalue() == f"a{lines}b\n"


@given(st.text(alphabet="[]/\\ abred=#", max_size=12))
def test_markup_that_is_none_does_not_stop_a_run(text):
    say(text)  # not escaped, as a slip of ours would have it


def test_tables_and_json_are_inert_too(terminal, tmp_path, monkeypatch):
    recipe = planted(tmp_path, "\x1b[2J\x1b]0;t\x07[/red]", monkeypatch)
    console.console.print(closing_table(recipe))
    console.console.print_json(json.dumps({"a": "\x1b[2J"}))
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x07" not in terminal.getvalue()


def test_a_conversation_prints_what_a_model_says_inert(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    lines = ["hello", ""]
    monkeypatch.setattr(talk.models, "load", lambda run: None)
    monkeypatch.setattr(talk.models, "load_tokenizer", lambda run: type("T", (), {"eos_token_id": 1, "pad_token_id": 0}))
    monkeypatch.setattr(talk, "use_threads", lambda n: None)
    monkeypatch.setattr(talk, "generate", lambda *a, **k: [type("C", (), {"ids": []})])
    monkeypatch.setattr(talk.chat, "prompt_ids", lambda tokenizer, messages: [])
    monkeypatch.setattr(talk.chat, "decode", lambda tokenizer, ids: "\x1b[2J[red]hi[/]")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    talk.talk(Run(Path("x")), "", 0.0, 4)
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}[2J[red]hi[/]\n"


def test_a_constitution_from_a_folder_with_brackets_in_its_name_is_listed(tmp_path, capsys):
    folder = tmp_path / "[red]x[" / "[/]"
    folder.mkdir(parents=True)
    shipped = Path(__file__).parent.parent / "constitution" / "principles.toml"
    (folder / "p.toml").write_bytes(shipped.read_bytes())
    show([str(folder / "p.toml")])
    assert "[red]x[" in capsys.readouterr().out


def test_unreadable_runs_are_passed_over_with_a_warning(tmp_path, capsys):
    for name, text in (("a", "{"), ("b", "[1]"), ("c", '{"stage": "[/]"}')):
        (tmp_path / "r" / name).mkdir(parents=True)
        (tmp_path / "r" / name / "manifest.json").write_text(text)
    assert list(users(tmp_path)) == []
    assert capsys.readouterr().out.count("passed over") == 3
