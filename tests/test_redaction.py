"""Secrets planted wherever they could get in, and searched for in everything that is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_report
from hypothesis import given
from hypothesis import strategies as st
from lab import ROOT, furnish, write

from truthward import provenance, tracking
from truthward.card import model_card
from truthward.errors import UserError
from truthward.export import export
from truthward.ledger import Run, plan, write_json
from truthward.recipe import load_recipe
from truthward.records import Prompt, read_rows, write_rows
from truthward.redaction import clean, holds_secret, tidy, without_secrets
from truthward.report import write_report
from truthward.stage import guarded

CORE = "Zq7Kp2Xv9Lm4Rt8Wn3Bs6Jd1"  # never seen again when a secret around it is hidden
SECRETS = {
    "hugging face": f"hf_{CORE}AbCd",
    "openai": f"sk-proj-{CORE}",
    "github": f"ghp_{CORE}AbCdEf",
    "gitlab": f"glpat-{CORE}",
    "aws": "AKIAZQ7KP2XV9LM4RT8W",
    "google": f"AIza{CORE}AbCdEfGh",
    "slack": f"xoxb-{CORE}",
    "web token": f"eyJhbGciOi{CORE}.eyJzdWIi{CORE}.{CORE}",
    "bearer": f"Authorization: Bearer {CORE}",
    "assignment": f'export MY_API_KEY="{CORE}"',
    "wandb": "wandb login --key=0123456789abcdef0123456789abcdef01234567",
    "address": f"https://me:{CORE}@example.org/v1",
    "pem": f"-----BEGIN PRIVATE KEY-----\n{CORE}\n-----END PRIVATE KEY-----",
    "pem cut off": f"+-----BEGIN RSA PRIVATE KEY-----\n+{CORE}",
}
PARTS = (CORE, CORE.upper()[:16], "0123456789abcdef0123456789abcdef01234567")
ORDINARY = [
    "tokenizer.pad_token = spare_token_number_1_of_the_list[0]",
    "self.eos_token_id, max_new_tokens=64, key=lambda pair: pair[0]",
    "data/risk-assessment-of-2025-and-later.jsonl task-123456789012345678",
    "password: see the manual",
    "http://127.0.0.1:8000/v1 and mail@example.org",
    "sha256 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "The secret of bread: water, flour, salt and 24 hours.",
]


def leaks(text: str) -> bool:
    return any(part in text for part in PARTS)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_hidden_and_what_stands_around_it_stays(secret):
    text = f"first {secret} last"
    assert leaks(text)
    hidden = without_secrets(text)
    assert not leaks(hidden)
    assert hidden.startswith("first ")
    assert "***" in hidden
    assert "BEGIN" in secret or hidden.endswith(" last")
    assert without_secrets(hidden) == hidden


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text):
    assert not holds_secret(text)


def test_our_own_sources_and_data_hold_nothing_that_looks_like_a_secret():
    """A rule that is too eager would maul a recorded diff."""
    files = [*ROOT.glob("*/*.py"), *ROOT.glob("*/*.toml"), *ROOT.glob("data/**/*.jsonl"), *ROOT.glob("docs/*.md")]
    own = {"truthward/redaction.py", "tests/test_endpoint.py", "tests/test_redaction.py"}
    found = {str(f.relative_to(ROOT)) for f in files if holds_secret(f.read_text(encoding="utf-8"))}
    assert len(files) > 100
    assert found <= own


@given(st.text(), st.sampled_from(list(SECRETS.values())), st.text())
def test_a_secret_is_hidden_in_any_text(before, secret, after):
    assert not leaks(without_secrets(f"{before} {secret} {after}"))


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("MY_SERVICE_TOKEN", "correct horse battery", True),
        ("DB_PASSWORD", "hunter2222", True),
        ("OPENAI_API_KEY", "short", False),  # and yet no key; hiding it would maul ordinary words
        ("MY_KEY", "dictionary", False),
        ("SSH_AUTH_SOCK", "/tmp", False),  # a path that exists
        ("TOKENIZERS_PARALLELISM", "a value of 23 characters", False),
        ("EDITOR", "a value of 23 characters", False),
    ],
)
def test_the_environments_secrets_are_hidden(monkeypatch, name, value, hidden):
    monkeypatch.setenv(name, value)
    assert (value not in without_secrets(f"it says {value} here")) == hidden


def test_what_a_record_calls_a_password_is_hidden_whatever_it_looks_like():
    value = {"db_password": "x", "api-key": "y", "key_env": "OPENAI_API_KEY", "pad_token": "<pad>", "n": [{"secret": "z"}]}
    expected = {"db_password": "***", "api-key": "***", "n": [{"secret": "***"}]}
    assert clean(value) == value | expected


def test_homes_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    assert tidy(f"{tmp_path}/ann/data/x and /home/bob/y, /Users/eve/z") == "~/data/x and ~/y, ~/z"
    assert tidy(f"{Path.cwd()}/data/x") == "data/x"
    assert tidy("/homework/x and a/root/b") == "/homework/x and a/root/b"
    assert clean({"/home/bob/x": ["/root/y"]}) == {"~/x": ["~/y"]}
    assert clean("in /root/y", homes=True) == "in /root/y"


def test_what_no_file_can_hold_is_replaced(tmp_path):
    """As a reason for an override on the command line may have it, where bytes are no UTF-8."""
    write_json(tmp_path / "x.json", {"reason": "a\udcff", "\ud800": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"reason": "a\ufffd", "\ufffd": 1}


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("place", ["value", "why", "override", "reason", "key"])
def test_a_recipe_that_holds_a_key_is_refused_and_told_of_the_variable(tmp_path, secret, place, capsys):
    said = json.dumps(secret)
    text = {
        "value": f"[judge]\nbase_url = {said}",
        "why": f"[judge.why]\nmodel = {said}",
        "key": f"[judge]\n{said} = 1",
    }.get(place, "")
    (tmp_path / "my.toml").write_text(text)
    overrides = {"override": [f"judge.model={said}"], "reason": ["judge.model=x"]}.get(place, [])
    why = secret if place == "reason" else ""
    with pytest.raises(UserError, match=r"judge\.key_env") as error:
        load_recipe(tmp_path / "my.toml", overrides, why)
    assert not leaks(str(error.value))


def test_a_message_on_the_terminal_hides_what_a_server_said(capsys):
    def work() -> None:
        raise UserError(f"the server answers: bad key {SECRETS['openai']} \x1b[31m", where="judge")

    assert guarded(work) == 2
    said = capsys.readouterr().err
    assert "bad key ***" in said
    assert not leaks(said)
    assert "\x1b" not in said


def test_a_home_in_a_recorded_recipe_is_found_again(tmp_path, monkeypatch):
    """Records have ``~/`` in its place, and a card's recipe must load."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text('[sft]\ndata = ["~/d.jsonl"]\nwhy = {data = "in ~/d.jsonl"}')
    recipe = load_recipe(tmp_path / "my.toml")
    assert recipe.sft.data == [f"{tmp_path}/d.jsonl"]
    assert recipe.sft.why["data"] == "in ~/d.jsonl"


# ------------------------------------------------------------------------------------------------------ what is written

EVERY = "; ".join(SECRETS.values())


def written(folder: Path) -> dict[str, str]:
    """Every file below a folder, as far as it can be read as text."""
    return {str(p): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()}


def test_no_secret_gets_into_a_run_its_card_or_its_report(tmp_path, monkeypatch):
    """Planted: in the diff, an incident, a gate's override, metrics, what models said, and the environment."""
    recipe = test_report.furnish(tmp_path)
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "a-pass-phrase-of-words")
    said = f"{EVERY} in {Path.home()}/x"
    monkeypatch.setattr(provenance, "git", lambda *words, **where: said if words[0] == "diff" else "abc")
    monkeypatch.setattr(test_report, "ATTACK", f"{EVERY} a-pass-phrase-of-words")
    runs = {name: Run.find(planned.path) for name, planned in plan(recipe).items()}
    base, sft, evals = runs["base"], runs["sft"], runs["evals-sft"]
    for run in (base, sft, evals):
        run.record(**provenance.surroundings())
        run.incident("server", said=f"{EVERY} a-pass-phrase-of-words", where=f"{Path.home()}/.netrc")
    evals.override(f"because {EVERY}")
    tracking.Tracker(sft, None).log(99, {"loss": 1.0, "note": EVERY, f"a {SECRETS['aws']}": 1.0})
    write_json(evals.path / "evals.json", test_report._evals(plan(recipe), recipe, "sft"))
    write_rows(sft.path / "rows.jsonl", [Prompt(id="p", prompt=f"{EVERY} a-pass-phrase-of-words")])
    (sft.path / "README.md").write_text(model_card(Run.load(sft.path)))
    write_report(recipe)
    files = written(Path(recipe.runs))
    texts = {place: text for place, text in files.items() if leaks(text) or "a-pass-phrase-of-words" in text}
    assert texts == {}
    assert [place for place, text in files.items() if f"{Path.home()}/" in text] == []
    assert "***" in (Path(recipe.runs) / "small" / "report.html").read_text()
    assert "***" in (evals.path / "manifest.json").read_text()
    (row,) = read_rows(sft.path / "rows.jsonl", Prompt)
    assert row.prompt.startswith("***; ")
    assert not leaks(json.dumps(sft.manifest))  # nor does it stay in memory, from where wandb takes it


def test_no_secret_gets_into_a_whole_run_its_export_or_wandbs_folder(tmp_path, monkeypatch):
    """Two stages and their evals for real, wandb offline; a key in the data, in the environment and in the working tree."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "a-pass-phrase-of-words")
    monkeypatch.setattr(provenance, "git", lambda *words, **where: EVERY if words[0] == "diff" else "abc")
    lab = furnish(home)
    said = f"{SECRETS['openai']} a-pass-phrase-of-words"
    write(home / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"Say {said}"} for i in range(2)])
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": said}]
    write(home / "demonstrations.jsonl", [{"id": f"d{i}", "messages": talk} for i in range(4)])
    for stage in ("base", "sft", "constitution"):
        made = lab.run(stage, "sft.max_length=256")
    export(Run.load(plan(lab.recipe("sft.max_length=256"))["sft"].path), tmp_path / "out")
    files = written(lab.runs) | written(tmp_path / "out")
    assert any("wandb" in place for place in files)
    assert any(place.endswith("groups.jsonl") for place in files)
    assert made.done
    assert [place for place, text in files.items() if leaks(text) or "a-pass-phrase-of-words" in text] == []
    kept = (
        "manifest.json",
        "metrics.jsonl",
        "evals.json",
        "config.yaml",
        "README.md",
        "truthward.json",
        "adapter_config.json",
    )
    homely = [p for p, text in files.items() if p.endswith(kept) and "checkpoint" not in p and str(home) in text]
    assert homely == []


def test_the_manifest_says_where_it_is_within_the_runs_folder_alone(tmp_path, monkeypatch):
    """What wandb is given as its configuration."""
    given = {}
    recipe = test_report.furnish(tmp_path)
    run = Run.load(plan(recipe)["sft"].path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options))
    tracking._wandb(recipe, run)
    assert given["config"]["run"] == f"small/{run.path.name}"
    assert str(tmp_path) not in given["config"]["run"]
