"""The whole pipeline as its user starts it: complete, idempotent, killed anywhere and still the same to the last bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from lab import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from truthward import chat, models
from truthward.console import inert
from truthward.errors import UserError
from truthward.export import export
from truthward.generate import generate
from truthward.ledger import Run, plan
from truthward.recipe import load_recipe

pytestmark = pytest.mark.slow
RECIPE = "recipes/tiny.toml"
CHANGES = [  # long enough, and with checkpoints close enough, to be killed on the way
    "model.threads=1",
    "sft.epochs=0.2",
    "sft.checkpoint_every=2",
    "constitution.max_prompts=48",
    "dpo.checkpoint_every=1",
]
MOMENTS = {  # stage -> what is there when it is killed
    "base": "manifest.json",
    "sft": "checkpoints/checkpoint-2/trainer_state.json",
    "evals-sft": "manifest.json",
    "constitution": "groups.jsonl",
    "reward": "checkpoints/checkpoint-2/trainer_state.json",
    "dpo": "checkpoints/checkpoint-1/trainer_state.json",
    "ppo": "checkpoints/iteration-00001",
}


def start(runs: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "truthward", "run", RECIPE, f"runs={runs}", *CHANGES]
    log = open(f"{runs}.log", "a")  # noqa: SIM115
    return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def directories(runs: Path, *more: str) -> dict[str, Path]:
    return {name: planned.path for name, planned in plan(load_recipe(RECIPE, [f"runs={runs}", *CHANGES, *more])).items()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Where the recipe has run once, undisturbed."""
    path = tmp_path_factory.mktemp("pipeline") / "undisturbed"
    done = commands.run("truthward", "run", RECIPE, f"runs={path}", *CHANGES, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_a_run_completes_every_stage_and_writes_the_report(runs):
    for name, path in directories(runs).items():
        m = Run.load(path).manifest
        assert (m["status"], m["stage"], m["resumed"]) == ("complete", name.split("-")[0], 0)
        assert {"metrics", "seconds", "packages", "git", "data", "parents", "recipe", "incidents"} <= m.keys()
        if m["stage"] in ("sft", "reward", "dpo", "ppo"):
            rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    page = (runs / "tiny" / "report.html").read_text()
    assert all(name in page for name in ("base", "sft", "constitution", "reward", "dpo", "ppo"))
    assert not re.search(r"<(script|img|link|iframe)\b", page)  # one page, nothing from elsewhere


def test_a_second_run_says_up_to_date_and_does_nothing(runs):
    paths = directories(runs)
    before = {name: snapshot(path) for name, path in paths.items()}
    done = commands.run("truthward", "run", RECIPE, f"runs={runs}", *CHANGES)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if "up to date" in line] == list(paths)
    assert {name: snapshot(path) for name, path in paths.items()} == before
    assert "truthward check" not in done.stdout, "nothing runs, so nothing is checked"


def test_a_changed_value_makes_a_new_directory_and_leaves_the_old_one(runs):
    before = {path: snapshot(path) for path in directories(runs).values()}
    changes = ['stages=["base","sft"]', 'evals.models=["base"]', "sft.learning_rate=1e-3", "sft.epochs=0.05"]
    done = commands.run("truthward", "run", RECIPE, f"runs={runs}", *CHANGES, *changes)
    assert done.returncode == 0, done.stderr
    changed = directories(runs, *changes)["sft"]
    assert changed not in before
    assert Run.load(changed).done
    assert {path: snapshot(path) for path in before} == before


# --------------------------------------------------------------------------------------------------------------- kills


def kill_in(runs: Path, name: str) -> None:
    """Start the recipe, and kill its whole process group as soon as a stage has come to its moment."""
    path, process = directories(runs)[name], start(runs)
    try:
        for _ in range(30_000):
            assert process.poll() is None, Path(f"{runs}.log").read_text()
            if (path / "manifest.json").exists() and (path / MOMENTS[name]).exists():
                break
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert Run.load(path).manifest["status"] == "running", f"{name} was complete before it was killed"


def metrics(path: Path) -> list[dict]:
    """What was logged, but for the times."""
    with open(path / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "gemm_share/"))} for row in rows]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    files = [p for p in path.rglob("*.safetensors") if "checkpoints" not in p.parts]
    return {f"{p.relative_to(path)}:{name}": t for p in files for name, t in load_file(p).items()}


@pytest.mark.timeout(900)
def test_a_run_killed_in_every_stage_ends_like_an_undisturbed_one(runs, tmp_path):
    killed = tmp_path / "killed"
    for name in MOMENTS:
        kill_in(killed, name)
    assert start(killed).wait(timeout=500) == 0, Path(f"{killed}.log").read_text()
    for name, path in directories(killed).items():
        other = runs / "tiny" / path.name
        resumed, undisturbed = Run.load(path), Run.load(other)
        assert (name, resumed.manifest["status"]) == (name, "complete")
        assert (name, resumed.manifest["resumed"]) == (name, int(name in MOMENTS))
        assert (name, resumed.manifest["metrics"]) == (name, undisturbed.manifest["metrics"])
        found, expected = tensors(path), tensors(other)
        assert found.keys() == expected.keys()
        assert [key for key, t in expected.items() if not torch.equal(found[key], t)] == [], name
        if (other / "metrics.jsonl").exists():
            assert metrics(path) == metrics(other), name
        for file in ("revisions.jsonl", "preferences.jsonl", "evals.json"):
            assert (path / file).exists() == (other / file).exists()
            if (other / file).exists():
                assert (path / file).read_bytes() == (other / file).read_bytes(), f"{name}: {file}"


# ------------------------------------------------------------------------------------------------------ chat and export


def test_chat_answers_from_standard_input_as_the_model_does(runs):
    run = Run.load(directories(runs)["ppo"])
    options = ["--temperature", "1", "--max-new-tokens", "24", "--system", "Be brief."]
    done = commands.run("truthward", "chat", str(run.path), *options, stdin="What is salt?\nAnd pepper?\n")
    assert done.returncode == 0, done.stderr
    model, tokenizer = models.load(run), models.load_tokenizer(run)
    messages, answers = chat.user("What is salt?", "Be brief."), []
    for turn, following in enumerate(("And pepper?", "")):
        ids, eos, pad = chat.prompt_ids(tokenizer, messages), tokenizer.eos_token_id, tokenizer.pad_token_id
        (answer,) = generate(model, [ids], [turn], eos=eos, pad_id=pad, max_new_tokens=24, temperature=1.0)
        answers.append(chat.decode(tokenizer, answer.ids))
        messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": following}]
    assert "".join(done.stdout.split()) == "".join(inert("".join(answers)).split()) != ""


def test_an_exported_model_loads_anywhere_and_gives_the_same_logits(runs, tmp_path):
    run = Run.load(directories(runs)["ppo"])
    done = commands.run("truthward", "export", str(run.path), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(chat.user("What is salt?"), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == chat.prompt_ids(models.load_tokenizer(run), chat.user("What is salt?"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    base = models.load(Run.load(directories(runs)["base"]))
    with torch.no_grad():
        logits = exported(ids).logits
        assert torch.equal(logits, models.load(run)(ids).logits)
        assert not torch.equal(logits, base(ids).logits)
    assert "lora" not in " ".join(name for name, _ in exported.named_parameters())
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\n")
    assert [m["stage"] for m in json.loads((tmp_path / "out" / "truthward.json").read_text())][0] == "base"
    with pytest.raises(UserError, match="already exists"):
        export(run, tmp_path / "out")
