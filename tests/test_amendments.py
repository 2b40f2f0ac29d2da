"""What two constitutions differ in, which runs used which, and how the commands tell it."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import ROOT
from test_principles import PERSONA, SHIPPED, WREN, principle, refusal, toml, values

from truthward import cli
from truthward.amendments import compare, shares, show, show_difference, users, word_diff
from truthward.console import console
from truthward.errors import UserError
from truthward.ledger import Run, hash_path
from truthward.principles import COPIES, TEXTS, Constitution, keep_copies, located, read_constitution, read_principles


def constitution(*principles) -> Constitution:
    return Constitution(list(principles), None)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def printed(work, *arguments, **options) -> str:
    with console.capture() as captured:
        work(*arguments, **options)
    return captured.get()


# ---------------------------------------------------------------------------------------------------------- difference


def test_a_difference_by_hand():
    old = constitution(principle("a"), principle("b", weight=2.0), principle("c", tags=["x"]), principle("d"))
    new = constitution(
        principle("a"),
        principle("b", weight=1.0, text="Another.", version=2),
        principle("c", tags=["x", "y"], why="Since."),
        principle("e"),
    )
    found = compare(old, new)
    assert ([p.id for p in found.added], [p.id for p in found.removed], found.faults) == (["e"], ["d"], [])
    assert found.changed == {
        "b": [("version", 1, 2), ("text", "text of b", "Another."), ("weight", 2.0, 1.0)],
        "c": [("tags", ["x"], ["x", "y"]), ("why", "why of c", "Since.")],
    }
    assert (found.moved, found.persona) == ([], [])
    assert shares(old.principles) == {"a": 0.2, "b": 0.4, "c": 0.2, "d": 0.2}
    assert shares(new.principles) == {"a": 0.25, "b": 0.25, "c": 0.25, "e": 0.25}


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_changes_only_with_its_version(key):
    old = constitution(principle("a", version=2), principle("b"))
    for version, ending in ((3, None), (4, None), (2, "version is still 2"), (1, "version fell from 2 to 1")):
        new = constitution(principle("a", version=version, **{key: "Another."}), principle("b"))
        assert compare(old, new).faults == ([f"a: {key} changed and {ending}"] if ending else [])


@pytest.mark.parametrize("change", [{"title": "T"}, {"why": "W"}, {"weight": 3.0}, {"tags": ["t"]}, {"version": 2}])
def test_what_no_model_reads_changes_freely(change):
    found = compare(constitution(principle("a")), constitution(principle("a", **change)))
    assert (list(found.changed), found.faults) == (["a"], [])


def test_another_order_is_a_difference():
    a, b, c = principle("a"), principle("b"), principle("c")
    assert compare(constitution(a, b, c), constitution(a, c, b)).moved == ["b", "c"]
    assert compare(constitution(a, b, c), constitution(b, c)).moved == []  # what is gone moves nobody


def test_a_persona_is_compared_too(tmp_path):
    old = read_constitution(put(tmp_path / "a.toml", toml(values("a", tags=["persona"]), head=WREN)))
    other = WREN.replace('"Dry."', '"Wry."').replace('"c"', '"d"')
    new = read_constitution(put(tmp_path / "b.toml", toml(values("a", tags=["persona"]), head=other)))
    assert compare(old, new).persona == [("humour", "Dry.", "Wry."), ("why.limits", "c", "d")]
    assert compare(constitution(*old.principles), new).persona[0] == ("name", None, "Wren")


ANY = st.lists(
    st.builds(
        principle,
        st.sampled_from("abcdefgh"),
        version=st.integers(1, 9),
        weight=st.floats(0.1, 9),
        text=st.text(min_size=1).filter(lambda t: t.strip() and "{" not in t),
        tags=st.lists(st.sampled_from(["x", "y"])),
    ),
    min_size=1,
    unique_by=lambda p: p.id,
).map(lambda principles: Constitution(principles, None))


@given(ANY)
def test_nothing_differs_from_itself(one):
    assert not any(compare(one, one))


@given(ANY, ANY)
def test_a_difference_leads_from_one_to_the_other_and_back(old, new):
    there, back = compare(old, new), compare(new, old)
    assert (there.added, there.removed) == (back.removed, back.added)
    fields = {p.id: p.model_dump() for p in old.principles}
    for p in there.removed:
        del fields[p.id]
    for name, changes in there.changed.items():
        for key, was, now in changes:
            assert fields[name][key] == was
            fields[name][key] = now
    assert fields | {p.id: p.model_dump() for p in there.added} == {p.id: p.model_dump() for p in new.principles}
    assert sum(shares(new.principles).values()) == pytest.approx(1)


def test_a_text_is_compared_word_by_word():
    assert word_diff("Say what is true.", "Say now what is so.").plain == "Say {+now+} what is [-true.-] {+so.+}"
    assert word_diff("a b c", "a c").plain == "a [-b-] c"
    assert word_diff("a", "a").plain == "a"


# ---------------------------------------------------------------------------------------------------------------- runs


def run(runs: Path, name: str, file: Path | None = None, **parents: str) -> Path:
    """A finished run; one of the constitution names its file by a path that does not exist any more."""
    recipe = {"name": "r", "stages": ["base"], "model": {"base": "tiny-random"}}
    record = {"stage": name.split("-")[0], "status": "complete", "parents": parents, "recipe": recipe}
    if file:
        record["data"] = {"gone.toml": hash_path(str(file))}
        record["recipe"] = {**recipe, "constitution": {"principles": ["gone.toml"]}}
        put(runs / "r" / name / COPIES / "1-gone.toml", file.read_text())
    return put(runs / "r" / name / "manifest.json", json.dumps(record)).parent


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """A constitution and the next version of it."""
    old, new = toml(values("a")), toml(values("a", text="Another.", version=2))
    return put(tmp_path / "a.toml", old), put(tmp_path / "b.toml", new)


def test_a_run_is_read_by_its_own_copy(two, tmp_path):
    made = run(tmp_path, "constitution-1", two[1])
    two[1].unlink()
    assert located(made) == [made / COPIES / "1-gone.toml"]
    assert read_principles(*located(made))[0].version == 2
    assert located(two[0]) == [two[0]]


def test_several_copies_keep_their_order(tmp_path):
    """Ten comes after two; the same file may stand twice, which reading them refuses."""
    made, names = run(tmp_path, "constitution-1"), [f"{i}.toml" for i in range(11)]
    for name in names:
        put(tmp_path / name, toml(values(f"p-{name[:-5]}", text=f"Text {name}.")))
    keep_copies([str(tmp_path / name) for name in names], made)
    assert [p.id for p in read_principles(*located(made))] == [f"p-{i}" for i in range(11)]


def test_a_directory_without_a_constitution_is_refused(two, tmp_path):
    made = run(tmp_path, "constitution-1", two[0])
    (made / COPIES / "1-gone.toml").unlink()
    assert refusal(located, made).startswith(f"{made}: the run keeps no {COPIES}")
    other = run(tmp_path, "sft-1")
    assert refusal(located, other).startswith(f"{other}: not a run of the constitution stage")
    with pytest.raises(UserError, match="not a run directory"):
        located(tmp_path)


def test_runs_are_found_by_content_and_by_descent(two, tmp_path):
    one = run(tmp_path, "constitution-1", two[0], model="sft-1")
    other = run(tmp_path, "constitution-2", two[1], model="sft-1")
    run(tmp_path, "sft-1")
    reward = run(tmp_path, "reward-1", model="sft-1", preferences="constitution-1")
    dpo = run(tmp_path, "dpo-1", model="sft-1", preferences="constitution-2")
    ppo = run(tmp_path, "ppo-1", model="dpo-1", reward="reward-1", start="lost-1")
    again = run(tmp_path, "constitution-3", two[0], model="dpo-1")  # a second round, by a model of the first
    a, b = (hash_path(str(file)) for file in two)
    found = {made.path: used for made, used in users(tmp_path)}
    assert found == {one: {a}, other: {b}, reward: {a}, dpo: {b}, ppo: {a, b}, again: {a, b}}


@pytest.mark.slow
def test_a_real_run_keeps_its_constitution(lab):
    made = Run.load(next(lab.runs.glob("*/constitution-*")))
    (copy,) = located(made.path)
    assert copy.read_bytes() == SHIPPED.read_bytes()
    assert hash_path(str(copy)) in made.manifest["data"].values()
    assert {used for _, uses in users(lab.runs) for used in uses} == {hash_path(str(SHIPPED))}
    assert {made.stage for made, _ in users(lab.runs)} >= {"constitution", "reward", "dpo"}  # and what other tests began


# ------------------------------------------------------------------------------------------------------------ commands


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["truthward", "principles", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_the_listing_shows_every_principle_and_what_is_to_be_said_against_it(tmp_path):
    odd = values("b", violate="v" * 100, title="[bold]odd[/]", tags=["x", "y"])
    path = put(tmp_path / "a.toml", toml(values("a", weight=3.0), odd))
    text = printed(show, [str(path)])
    assert "│ a  │ 1       │ 3      │ 75.0% │      │ title of a   │" in text
    assert "│ b  │ 1       │ 1      │ 25.0% │ x, y │ [bold]odd[/] │" in text
    assert text.index("odd") < text.index("warning b: follow has 11 characters, violate 100;")
    assert text.endswith("2 principles in order, 1 warnings\n")
    assert "follow of a" not in text
    long = printed(show, [str(path)], long=True)
    assert all(f"  {key:9}{key} of a\n" in long for key in (*TEXTS, "why"))


def test_the_difference_is_shown_with_the_runs_that_used_either(two, tmp_path):
    made = run(tmp_path / "runs", "constitution-1", two[0])
    run(tmp_path / "runs", "constitution-2", put(tmp_path / "c.toml", toml(values("z"))))
    text = printed(show_difference, str(made), str(two[1]), str(tmp_path / "runs"))
    assert "│ a  │ 1 -> 2  │ 100.0%       │ 100.0% │ version, text │" in text
    assert "  version  1 -> 2\n  text     [-text of a-] {+Another.+}\n" in text
    assert "│ r/constitution-1 │ constitution │ complete │ A    │" in text
    assert "constitution-2" not in text
    same = printed(show_difference, str(two[0]), str(made), str(tmp_path / "runs"))
    assert "have the same principles" in same
    assert "│ r/constitution-1 │ constitution │ complete │ A and B │" in same
    assert "no run in nowhere used either" in printed(show_difference, str(two[0]), str(two[1]), "nowhere")


def test_commands_end_with_their_exit_codes(two, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with console.capture():
        assert command(monkeypatch) == 0
        assert command(monkeypatch, SHIPPED, PERSONA, "--long") == 0
        assert command(monkeypatch, "list", two[0]) == 0
        assert command(monkeypatch, "diff", *two) == 0
        assert command(monkeypatch, "diff", *two, "--runs", two[0].parent) == 0
        assert command(monkeypatch, "nothing.toml") == 2
    assert capsys.readouterr().err.startswith("error: nothing.toml: there is no such file")


def test_a_text_without_a_new_version_ends_with_exit_code_2(two, tmp_path, monkeypatch, capsys):
    late = put(tmp_path / "late.toml", toml(values("a", text="Another.")))
    with console.capture() as captured:
        assert command(monkeypatch, "diff", two[0], late) == 2
    assert "{+Another.+}" in captured.get()
    message = f"error: {late}: a: text changed and version is still 1\n  to do: raise the version by one"
    assert capsys.readouterr().err.startswith(message)
