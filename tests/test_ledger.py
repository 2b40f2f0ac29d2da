"""Run directories: what their names depend on, that writes are whole, and that nobody works in one twice."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import ROOT, write

from truthward import fingerprint, ledger
from truthward.errors import UserError
from truthward.fingerprint import code_of, hash_code, hash_path
from truthward.ledger import Run, open_run, plan, whole_directory, write_json, write_text
from truthward.recipe import load_recipe
from truthward.stage import run_stage

DEMONSTRATION = {"id": "d", "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}
TINY = """
unexplained = "warn"
stages = ["base", "sft", "dpo"]
[model]
base = "tiny-random"
[sft]
data = ["{home}/demos.jsonl"]
[dpo]
preferences = ["data/truth/train"]
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A recipe whose data lie in a folder of this test's own: ``world("sft.epochs=2")`` is its recipe."""
    monkeypatch.chdir(ROOT)
    write(tmp_path / "demos.jsonl", [DEMONSTRATION])

    def world(*overrides: str, text: str = TINY, why: str = ""):
        (tmp_path / "small.toml").write_text(text.format(home=tmp_path))
        return load_recipe(tmp_path / "small.toml", [f"runs={tmp_path}/runs", *overrides], why)

    return world


@pytest.fixture(autouse=True)
def _fresh_hashes():
    """Hashes are remembered by path for the life of a process; a test changes what they were made from."""
    yield
    hash_path.cache_clear()
    forget_code()


def names(recipe) -> dict[str, str]:
    hash_path.cache_clear()
    return {name: planned.path.name for name, planned in plan(recipe).items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


ALL = {"base", "evals-base", "sft", "evals-sft", "dpo", "evals-dpo"}

# ------------------------------------------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("seed=18", ALL),
        ("model.dtype=float32", ALL),
        ("model.base=smollm2-135m-instruct", ALL),
        ("sft.epochs=2", {"sft", "evals-sft", "dpo", "evals-dpo"}),
        ("dpo.beta=0.2", {"dpo", "evals-dpo"}),
        ("evals.resamples=100", {"evals-base", "evals-sft", "evals-dpo"}),
        ("ppo.kl_coef=0.3", set()),
        ("launch.ranks=2", set()),
        ("launch.zero=2", set()),
        ("unexplained=stop", set()),
    ],
)
def test_a_setting_renames_its_stage_and_those_that_come_from_it(world, override, moved):
    assert changed(names(world()), names(world(override))) == moved


def test_reasons_do_not_rename_a_run(world):
    assert names(world()) == names(world(text=TINY + "[dpo.why]\nbeta = 'x'\npreferences = 'y'\n[why]\nseed = 'z'"))
    assert names(world("dpo.beta=0.2")) == names(world("dpo.beta=0.2", why="to see"))


def test_the_content_of_data_renames_a_run_and_its_place_on_disk_does_not(world, tmp_path):
    before = names(world())
    write(tmp_path / "demos.jsonl", [{**DEMONSTRATION, "id": "e"}])
    assert changed(before, names(world())) == {"sft", "evals-sft", "dpo", "evals-dpo"}
    write(tmp_path / "demos.jsonl", [DEMONSTRATION])
    assert names(world()) == names(world(f"runs={tmp_path}/elsewhere", "name=other")) == before


def test_a_folder_is_hashed_by_its_file_names_and_contents(tmp_path):
    def value() -> str:
        hash_path.cache_clear()
        return hash_path(str(tmp_path))

    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    seen = {value()}
    (tmp_path / "b").rename(tmp_path / "c")
    seen.add(value())
    (tmp_path / "c").write_text("3")
    seen.add(value())
    (tmp_path / "d").write_text("")
    assert len(seen | {value()}) == 4


PPO = (
    TINY.replace('"dpo"]', '"ppo"]')
    + """
[ppo]
rewards = ["{home}/mine.py:short", "{home}/classifier", "some/hub-id"]
ptx_data = ["{home}/demos.jsonl"]
ptx_coef = 0.1
"""
)


def test_what_ppos_answers_are_scored_by_renames_it(world, tmp_path):
    """The file of a function, a classifier's folder and the demonstrations count by their content."""
    (tmp_path / "classifier").mkdir()
    for name, text in (("mine.py", "def short(completions): ..."), ("classifier/config.json", "{}")):
        (tmp_path / name).write_text(text)
    planned = plan(world(text=PPO))["ppo"]
    assert planned.parents == {"model": plan(world(text=PPO))["sft"].path.name}
    assert {Path(path).name for path in planned.data} == {"mine.py", "classifier", "demos.jsonl", "prompts.jsonl"}
    before = names(world(text=PPO))
    for name in ("mine.py", "classifier/config.json"):
        (tmp_path / name).write_text("changed")
        after = names(world(text=PPO))
        assert changed(before, after) == {"ppo", "evals-ppo"}
        before = after


def test_ppo_starts_from_its_parent_and_shares_the_preference_models_base():
    """With an adapter as its parent, and with the preference model's own parent."""
    stages = ["base", "sft", "constitution", "reward", "dpo", "ppo"]
    for parent, start in (("dpo", "dpo"), ("sft", None)):
        planned = plan(load_recipe("recipes/tiny.toml", [f"ppo.parent={parent}"]))
        parents = planned["ppo"].parents
        expected = {"model": "sft", "reward": "reward"} | ({"start": start} if start else {})
        assert parents == {role: planned[stage].path.name for role, stage in expected.items()}
        assert set(stages) <= planned.keys()


def test_missing_data_are_named(world):
    with pytest.raises(UserError, match="gone.jsonl: there is no such file"):
        plan(world("sft.data=['gone.jsonl']"))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A package ``planted``: __main__ -> one -> two (a late import); ``three`` is imported by nobody."""
    folder = tmp_path / "planted"
    files = {
        "__init__": "",
        "__main__": "from planted import one",
        "one": "def f():\n    import planted.two",
        "two": "import json",
        "three": "import planted.one",
    }
    for name, text in files.items():
        write_text(folder / f"{name}.py", text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fingerprint, "OUR_PACKAGES", (*fingerprint.OUR_PACKAGES, "planted"))
    importlib.invalidate_caches()
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] == "planted"]:
        del sys.modules[name]


def forget_code() -> None:
    hash_code.cache_clear()
    code_of.cache_clear()


def code(module: str) -> str:
    forget_code()
    return hash_code(module)


@pytest.mark.parametrize(("name", "counts"), [("one", True), ("two", True), ("__main__", True), ("three", False)])
def test_a_change_in_code_counts_where_the_module_is_reached(planted, name, counts):
    before = code("planted")
    (planted / f"{name}.py").write_text((planted / f"{name}.py").read_text() + "\nx = 1")
    assert (code("planted") != before) == counts


def test_changed_code_renames_the_stage_that_reaches_it_and_what_comes_from_it(world, planted, monkeypatch):
    monkeypatch.setitem(ledger.CODE, "sft", "planted")
    before = names(world())
    (planted / "two.py").write_text("import json, os")
    forget_code()
    assert changed(before, names(world())) == {"sft", "evals-sft", "dpo", "evals-dpo"}


@pytest.mark.parametrize(
    ("module", "reached", "beyond"),
    [
        ("sft", {"sft.trainer", "sft.__main__", "truthward.records"}, {"evals.truth", "reward.losses", "truthward.cli"}),
        (
            "rl.ppo",
            {"rl.losses", "rl.rewards", "rl.update", "truthward.generate"},
            {"rl.dpo", "truthward.stats", "sft.trainer"},
        ),
        ("evals", {"evals.truth", "evals.baselines", "truthward.stats"}, {"truthward.report", "truthward.card"}),
        ("truthward.base", {"truthward.models"}, {"truthward.report", "truthward.card", "truthward.trainers"}),
    ],
)
def test_the_hash_covers_what_a_stage_reaches_and_no_more(module, reached, beyond):
    found = code_of(module).keys()
    assert reached <= found
    assert not beyond & found
    assert all(name.split(".")[0] in ("truthward", module.split(".")[0]) for name in found)


# ----------------------------------------------------------------------------------------------------- atomic writing


class Crash(BaseException):
    pass


def crash(*_):
    raise Crash


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_old_content(tmp_path, monkeypatch, moment):
    path = tmp_path / "manifest.json"
    write_json(path, {"old": True})
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, crash)
        with pytest.raises(Crash):
            write_json(path, {"new": "x" * 100_000})
    assert json.loads(path.read_text()) == {"old": True}
    write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"new": True}


def test_a_number_that_is_not_json_is_refused_before_the_file_is_touched(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert (tmp_path / "x.json").read_text() == "1\n"


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with whole_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
        assert not (tmp_path / "model").exists()
    with pytest.raises(Crash), whole_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        crash()
    assert [p.read_text() for p in (tmp_path / "model").iterdir()] == ["old"]
    with whole_directory(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []  # nothing of the crashed attempt
        (folder / "b").write_text("new")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["b"]


# --------------------------------------------------------------------------------------------------------------- runs


def test_the_manifest_holds_what_the_contract_names(world):
    recipe = world("sft.epochs=2", why="to see")
    run_stage(recipe, "base", lambda _, run: run.finish(metrics={"m": 1}))
    with open_run(recipe, "sft") as run:
        assert Run.load(run.path).manifest["status"] == "running"
        run.incident("set aside", row=3)
        run.finish(metrics={})
    m = Run.load(run.path).manifest
    assert (m["stage"], m["status"], m["seed"]) == ("sft", "complete", 17)
    assert m["parents"] == {"model": plan(recipe)["base"].path.name}
    assert run.path.name == f"sft-{m['fingerprint']}"
    assert m["recipe"]["sft"]["why"] == {"epochs": "to see"}
    assert m["recipe"]["dpo"]["beta"] == 0.1  # defaults too
    ((path, value),) = m["data"].items()
    assert value == hash_path(path)
    assert set(m["git"]) == {"commit", "diff"}
    assert {"torch", "transformers", "trl", "peft"} <= m["packages"].keys()
    assert {"cpu", "cores", "python"} <= m["machine"].keys()
    assert m["seconds"] >= 0
    assert m["peak_memory_gb"] > 0
    assert [(i["kind"], i["row"]) for i in m["incidents"]] == [("set aside", 3)]


def test_a_complete_run_is_not_done_again(world):
    calls = []

    def work(_, run):
        calls.append(run.manifest["resumed"])
        run.finish()

    run_stage(world(), "base", work)
    before = (plan(world())["base"].path / "manifest.json").read_text()
    run_stage(world(), "base", work, again=lambda _, run: calls.append("again"))
    assert calls == [0, "again"]
    assert (plan(world())["base"].path / "manifest.json").read_text() == before


def test_an_interrupted_run_resumes_and_keeps_its_history(world):
    def crashing(_, run):
        run.incident("odd")
        crash()

    with pytest.raises(Crash):
        run_stage(world(), "base", crashing)
    first = Run.load(plan(world())["base"].path).manifest
    run_stage(world(), "base", lambda _, run: run.finish())
    last = Run.load(plan(world())["base"].path).manifest
    assert (first["status"], first["resumed"], last["status"], last["resumed"]) == ("running", 0, "complete", 1)
    assert last["started"] == first["started"]
    assert last["incidents"] == first["incidents"] != []


@pytest.mark.parametrize("begun", [False, True])
def test_a_stage_whose_parent_is_not_complete_is_refused(world, begun):
    if begun:
        with open_run(world(), "base"):
            pass
    with pytest.raises(UserError, match=r"python -m truthward.base"):
        run_stage(world(), "sft", crash)


def test_a_stage_that_the_recipe_lacks_is_refused(world):
    with pytest.raises(UserError, match="has no stage ppo"), open_run(world(), "ppo"):
        pass


@pytest.mark.parametrize(("content", "message"), [(None, "not a run directory"), ("{", "not valid JSON")])
def test_what_is_no_run_directory_is_refused(tmp_path, content, message):
    if content:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Run.load(tmp_path)


HOLD = """
import sys
from truthward.ledger import open_run
from truthward.recipe import load_recipe
with open_run(load_recipe(sys.argv[1], sys.argv[2:]), "base"):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_in_the_same_run_is_refused_until_the_first_is_gone(world, tmp_path):
    recipe = world()
    arguments = [sys.executable, "-c", HOLD, str(tmp_path / "small.toml"), f"runs={tmp_path}/runs"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another process"):
            run_stage(recipe, "base", crash)
        other.kill()
        other.wait()
    run_stage(recipe, "base", lambda _, run: run.finish())
    assert Run.load(plan(recipe)["base"].path).done
    assert Path(plan(recipe)["base"].path).parent == tmp_path / "runs" / "small"
