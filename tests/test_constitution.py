"""The constitution stage: what rows carry, drawing, exact resume, and what happens when no judge qualifies."""

import json
import random
from collections import Counter

import pytest
from faulty_server import Server, completion
from lab import ROOT, Lab, principle

from constitution import __main__ as constitution
from constitution.qualify import pick
from constitution.workshop import Workshop
from truthward.console import console
from truthward.errors import UserError
from truthward.ledger import Run, plan
from truthward.records import Preference, Prompt, Revision, read_rows
from truthward.stage import run_stage


def test_principles_are_drawn_by_weight_without_repetition_and_by_seed():
    some = [principle("a"), principle("b", 2.0), principle("c", 7.0)]
    firsts = Counter(pick(some, 1, random.Random(i))[0].id for i in range(2000))
    assert {k: n / 2000 for k, n in firsts.items()} == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.7}, abs=0.03)
    assert all(len({p.id for p in pick(some, 2, random.Random(i))}) == 2 for i in range(50))
    assert len(pick(some, 9, random.Random(0))) == 3
    assert pick(some, 2, random.Random(5)) == pick(some, 2, random.Random(5))
    assert len({tuple(p.id for p in pick(some, 2, random.Random(i))) for i in range(50)}) > 3


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def world(lab, tmp_path, monkeypatch) -> Lab:
    """A world whose constitution works in groups of two prompts and keeps every pair."""
    monkeypatch.setattr(constitution, "GROUP", 2)
    return lab.copy(tmp_path / "runs")


SETTINGS = (
    "constitution.max_prompts=6",
    "constitution.max_new_tokens=24",
    "constitution.rounds=2",
    "constitution.min_confidence=0.5",
    "constitution.ways=['samples', 'contrast', 'revisions']",
)


def run(world: Lab, *overrides: str) -> Run:
    recipe = world.recipe(*SETTINGS, *overrides)
    run_stage(recipe, "constitution", constitution.run)
    return Run.load(plan(recipe)["constitution"].path)


def test_rows_carry_what_produced_them(world):
    made = run(world)
    parent = made.parent("model").manifest["fingerprint"]
    revisions = read_rows(made.path / "revisions.jsonl", Revision)
    preferences = read_rows(made.path / "preferences.jsonl", Preference)
    shipped = {p.id: p.version for p in constitution.read_principles(ROOT / "constitution/principles.toml")}
    prompts = {p.id: p.prompt for p in read_rows(world.home / "prompts.jsonl", Prompt)}
    assert Counter(r.round for r in revisions) == {1: 6, 2: 6}
    for r in revisions:
        assert (r.prompt, r.model, r.principle_version) == (prompts[r.prompt_id], parent, shipped[r.principle])
        assert r.helped == (r.why_not == "")
        assert not r.helped or r.score_after > r.score_before
    assert len({r.seed for r in revisions}) == len(revisions)
    for p in preferences:
        assert p.model == parent
        assert p.principle
        assert set(p.principle) <= shipped.keys()
        assert p.source.startswith("constitution/p")
        assert 0.5 <= p.probability <= 1
        assert p.seed > 0
        assert p.chosen != p.rejected
    helped = [(r.prompt, r.revision, r.answer, r.round) for r in revisions if r.helped]
    assert [(p.prompt, p.chosen, p.rejected, p.round) for p in preferences if p.round] == helped
    assert made.manifest["metrics"] == {
        "prompts": 6,
        "revisions": 12,
        "helped": len(helped),
        "preferences": len(preferences),
    }
    assert 0 < len(helped) < len(preferences)


def test_the_second_round_starts_from_a_revision_only_if_that_helped(world):
    made = read_rows(run(world).path / "revisions.jsonl", Revision)
    first, second = ({r.prompt_id: r for r in made if r.round == n} for n in (1, 2))
    for key, r in second.items():
        assert r.answer == (first[key].revision if first[key].helped else first[key].answer)


def test_pairs_of_too_little_confidence_are_left_out(world):
    rows = read_rows(run(world).path / "preferences.jsonl", Preference)
    limit = sorted(r.probability for r in rows)[len(rows) // 2]
    kept = read_rows(run(world, f"constitution.min_confidence={limit}").path / "preferences.jsonl", Preference)
    assert kept == [r for r in rows if r.probability >= limit]
    assert 0 < len(kept) < len(rows)


def interrupted(world: Lab, keep: bytes) -> Run:
    """What a kill leaves: a manifest that says running, some of the groups, no result."""
    made = run(world)
    (made.path / "groups.jsonl").write_bytes(keep)
    (made.path / "revisions.jsonl").unlink()
    (made.path / "preferences.jsonl").unlink()
    made.record(status="running")
    return made


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_rows_byte_for_byte(world, monkeypatch, kept):
    whole = run(world)
    names = ("groups.jsonl", "revisions.jsonl", "preferences.jsonl")
    files = {name: (whole.path / name).read_bytes() for name in names}
    groups = files["groups.jsonl"].splitlines(keepends=True)
    assert len(groups) == 3
    torn = b"".join(groups[kept : kept + 1])
    interrupted(world, b"".join(groups[:kept]) + torn[: len(torn) // 2])
    done = []
    group = Workshop.group
    monkeypatch.setattr(Workshop, "group", lambda self, prompts: done.append(1) or group(self, prompts))
    again = run(world)
    assert again.path == whole.path
    assert {name: (again.path / name).read_bytes() for name in names} == files
    assert len(done) == 3 - kept  # what was whole is not made again
    assert again.manifest["resumed"] == 1


def test_a_resumed_run_reads_groups_whose_text_holds_odd_line_ends(tmp_path):
    path = tmp_path / "groups.jsonl"
    groups = [{"revisions": [{"text": "a\u2028b\x85c\u2029d\x0be"}], "preferences": []}, {"revisions": []}]
    path.write_text("".join(json.dumps(g, ensure_ascii=False) + "\n" for g in groups) + '{"torn', encoding="utf-8")
    assert constitution.whole_lines(path) == groups
    assert constitution.whole_lines(path) == groups


@pytest.mark.parametrize("text", ["", '{"torn'])
def test_nothing_whole_is_nothing_done(tmp_path, text):
    assert constitution.whole_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "groups.jsonl").write_text(text)
    assert constitution.whole_lines(tmp_path / "groups.jsonl") == []


def test_an_unqualified_judge_stops_the_stage_and_warn_goes_on(world, monkeypatch):
    fit = {"brier": 0.25, "ece": 0.1}
    chance = {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "refused": True, "temperature": 1.0, **fit}
    record = {"methods": {"contrast": chance, "likelihood": chance}, "principles": {}, "chosen": {}}
    monkeypatch.setattr(constitution, "qualify", lambda *_: record)
    for _ in range(2):  # the record is kept, and refuses again
        with pytest.raises(UserError, match=r"no judge clears chance.*contrast 0\.500.*likelihood 0\.500") as caught:
            run(world, "judge.gate=block")
    assert "judge.base_url" in str(caught.value)
    stopped = Run.load(plan(world.recipe(*SETTINGS, "judge.gate=block"))["constitution"].path)
    assert not stopped.done
    assert stopped.manifest["judge"] == record
    assert not (stopped.path / "preferences.jsonl").exists()
    went_on = run(world, "judge.gate=warn", "constitution.rounds=1")
    assert went_on.done
    assert went_on.manifest["judge"] == record
    assert json.loads((went_on.path / "groups.jsonl").read_text().splitlines()[0])["revisions"]


def test_only_principles_that_qualified_are_drawn_and_judged_by(world, monkeypatch):
    fit = {"brier": 0.1, "ece": 0.1}
    fine = {"accuracy": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 9}, "refused": False, "temperature": 1.0, **fit}
    record = {"methods": {"contrast": fine}, "principles": {}, "chosen": {"short-and-plain": "contrast"}}
    monkeypatch.setattr(constitution, "qualify", lambda *_: record)
    made = run(world)
    rows = [r.principle for r in read_rows(made.path / "revisions.jsonl", Revision)]
    rows += [p for r in read_rows(made.path / "preferences.jsonl", Preference) for p in r.principle]
    assert set(rows) == {"short-and-plain"}


def test_a_contrast_pair_is_one_that_the_panel_sees_so_too(world):
    rows = read_rows(run(world).path / "preferences.jsonl", Preference)
    ways = Counter(p.source.rsplit("/", 1)[1] for p in rows)
    assert ways["contrast"]
    assert ways["samples"]
    assert ways["revision"]
    assert ways["contrast"] < 6  # of six made; the others were judged the other way round


def test_labels_are_held_within_the_clamp(world):
    rows = read_rows(run(world, "judge.clamp=0.4").path / "preferences.jsonl", Preference)
    free = read_rows(run(world).path / "preferences.jsonl", Preference)
    assert [p.probability for p in rows] == [min(p.probability, 0.6) for p in free]
    assert max(p.probability for p in free) > 0.6


def test_another_stage_may_judge(world):
    own, other = (run(world, f"judge.model={name}").manifest for name in ("sft", "base"))
    assert own["parents"]["judge"] == own["parents"]["model"]
    assert other["parents"]["judge"].startswith("base-")
    assert own["judge"]["methods"] != other["judge"]["methods"]
    assert own["judge"] == run(world).manifest["judge"]


def test_a_run_keeps_its_constitution(world):
    made = run(world)
    (copy,) = (made.path / "principles").glob("*.toml")
    assert copy.read_bytes() == (ROOT / "constitution" / "principles.toml").read_bytes()


def by_length(body):
    """A server that takes the shorter answer, whatever the principle and the order."""
    text = body["messages"][-1]["content"]
    first, second = (len(text.split(f"{letter}: ")[1].split("\n")[0]) for letter in "AB")
    return completion("A" if first < second else "B", {"A": -1.0 - first / 50, "B": -1.0 - second / 50})


def test_a_server_may_judge_and_is_asked_once(world):
    """In the lab's pairs the better answer is one letter shorter; a second run of the same rows asks nothing."""
    with Server(by_length) as server, console.capture() as captured:
        where = (f"judge.base_url={server.url}", "judge.model=m", "judge.key_env=", "judge.methods=['choice']")
        made = run(world, *where)
        asked = len(server.asked)
        for name in ("groups.jsonl", "revisions.jsonl", "preferences.jsonl"):
            (made.path / name).unlink()
        made.record(status="running")
        again = run(world, *where)
    assert len(server.asked) == asked
    assert again.manifest["judge"]["methods"]["choice"]["accuracy"]["mean"] == 1.0
    assert again.manifest["judge"]["chosen"] == {"short-and-plain": "choice", "facts-over-myths": "choice"}
    for p in read_rows(again.path / "preferences.jsonl", Preference):
        assert len(p.chosen) < len(p.rejected)
    assert "to qualify: " in captured.get()
    assert "for the rows: " in captured.get()
