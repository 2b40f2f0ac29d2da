"""The judge and its qualification, revisions and their checks, what rows carry, and exact resume."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import ROOT, Lab

from constitution import __main__ as constitution
from constitution import judge as judging
from constitution.judge import Case, Judge, measure, pick, require_qualified, soft_label
from truthward import chat
from truthward.errors import UserError
from truthward.ledger import Run, plan
from truthward.principles import Principle
from truthward.records import Preference, Prompt, Question, Revision, read_rows
from truthward.stage import run_stage


def principle(name: str, weight: float = 1.0) -> Principle:
    texts = {key: key for key in ("title", "text", "critique", "revision", "why")}
    return Principle(id=name, version=2, follow=f"follow {name}", violate=f"violate {name}", weight=weight, **texts)


@pytest.fixture
def stub(monkeypatch, tiny):
    """A model that a function stands for: ``stub(lambda system, question, answer: log p)``; gives a tokenizer."""
    _, tokenizer = tiny

    def put(logprob):
        def answer_sums(model, items, **options):
            rows = []
            for item in items:
                turns = tokenizer.decode(item.prompt).split("<|im_start|>")[1:-1]
                texts = dict(turn.removesuffix("<|im_end|>\n").split("\n", 1) for turn in turns)
                answers = [chat.decode(tokenizer, answer) for answer in item.answers]
                rows.append([logprob(texts.get("system", ""), texts["user"], a) for a in answers])
            return rows

        monkeypatch.setattr(judging, "answer_sums", answer_sums)
        return tokenizer

    return put


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("method", "expected"), [("likelihood", [-1.5, -1.5]), ("contrast", [1.5, -0.375])])
def test_a_score_is_the_mean_a_token_over_principles(stub, method, expected):
    """Tokens with the end: ``abc`` 4, ``abcdefg`` 8. Likelihood: mean of -4/4, -8/4 and of -8/8, -16/8."""
    table = {
        ("follow a", "abc"): -4.0,
        ("follow b", "abc"): -8.0,
        ("violate a", "abc"): -8.0,
        ("violate b", "abc"): -16.0,
        ("follow a", "abcdefg"): -8.0,
        ("follow b", "abcdefg"): -16.0,
        ("violate a", "abcdefg"): -6.0,
        ("violate b", "abcdefg"): -12.0,
    }
    tokenizer = stub(lambda system, question, answer: table[system, answer])
    case = Case("q?", ["abc", "abcdefg"], [principle("a"), principle("b")])
    assert Judge(None, tokenizer, method).scores([case]) == [pytest.approx(expected)]


def test_every_case_keeps_its_own_scores(stub):
    tokenizer = stub(lambda system, question, answer: -float(len(question)) * (len(answer) + 1))
    cases = [Case("q" * n, ["a"] * k, [principle("a")] * m) for n, k, m in ((1, 3, 2), (5, 1, 1), (2, 2, 3))]
    assert Judge(None, tokenizer).scores(cases) == [[-1.0] * 3, [-5.0], [-2.0] * 2]


def test_a_real_models_likelihood_prefers_what_it_says_itself(tiny):
    """Of all single letters, the judge under likelihood prefers the one that the model finds likeliest."""
    model, tokenizer = tiny
    letters = list("abcdefgh")
    (scores,) = Judge(model, tokenizer).scores([Case("Which?", letters, [principle("a")])])
    prompt = chat.prompt_ids(tokenizer, chat.user("Which?", "follow a"))
    totals = []
    for letter in letters:
        ids = chat.answer_ids(tokenizer, letter)
        logprobs = model(input_ids=model.dummy_inputs["input_ids"].new_tensor([prompt + ids])).logits[0].log_softmax(-1)
        totals.append(sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)) / len(ids))
    assert scores == pytest.approx(totals, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ qualification

QUESTIONS = [
    Question(id=str(i), topic="t", kind="k", question=f"Is {i}?", true=["yes a", "yes b"], false=["not a", "not b"])
    for i in range(40)
]


def record(stub, logprob) -> dict:
    return measure(None, stub(logprob), QUESTIONS, [principle("a"), principle("b")], 1, 400, seed=0)


def test_a_judge_that_tells_true_from_false_qualifies(stub):
    found = record(stub, lambda system, question, answer: float("yes" in answer and "follow" in system))
    assert {m: (r["accuracy"]["mean"], r["refused"]) for m, r in found["methods"].items()} == {
        "contrast": (1.0, False),
        "likelihood": (1.0, False),
    }
    assert found["methods"]["contrast"]["accuracy"]["n"] == len(QUESTIONS)  # questions, not pairs
    require_qualified(found)


def test_the_better_method_is_chosen(stub):
    """A model that likes true answers under any system prompt: contrast cancels it and stays at chance."""
    found = record(stub, lambda system, question, answer: float("yes" in answer))
    assert found["chosen"] == "likelihood"
    assert found["methods"]["contrast"] == {"accuracy": {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 40}, "refused": True}
    require_qualified(found)


def test_a_judge_above_chance_whose_interval_is_not_is_refused(stub):
    """Right on 21 questions of 40."""
    found = record(stub, lambda system, question, answer: float(("yes" in answer) == (int(question[3:-1]) < 21)))
    assert found["methods"]["likelihood"]["accuracy"]["mean"] == pytest.approx(21 / 40)
    with pytest.raises(UserError, match="no judge clears chance"):
        require_qualified(found)


@pytest.mark.parametrize("worse", [False, True])
def test_a_judge_at_or_below_chance_is_refused(stub, worse):
    coin = random.Random(1)
    found = record(stub, lambda system, question, answer: -float("yes" in answer) if worse else coin.random())
    with pytest.raises(UserError, match=r"no judge clears chance.*likelihood 0\.\d+") as caught:
        require_qualified(found)
    assert "stronger constitution.parent" in str(caught.value)


# ------------------------------------------------------------------------------------------------ labels and drawing


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_a_soft_label_is_a_probability_and_the_swapped_one_is_its_complement(difference, temperature):
    label = soft_label(difference, temperature)
    assert 0 <= label <= 1
    assert label + soft_label(-difference, temperature) == pytest.approx(1)


def test_soft_labels_by_hand():
    assert soft_label(0, 4) == 0.5
    assert soft_label(4, 4) == pytest.approx(1 / (1 + math.exp(-1)))
    assert soft_label(4, 8) < soft_label(4, 4) < soft_label(8, 4)


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
    group = constitution.Workshop.group
    monkeypatch.setattr(constitution.Workshop, "group", lambda self, prompts: done.append(1) or group(self, prompts))
    again = run(world)
    assert again.path == whole.path
    assert {name: (again.path / name).read_bytes() for name in names} == files
    assert len(done) == 3 - kept  # what was whole is not made again
    assert again.manifest["resumed"] == 1


def test_a_resumed_run_reads_groups_whose_text_holds_odd_line_ends(tmp_path):
    path = tmp_path / "groups.jsonl"
    groups = [{"revisions": [{"text": "a\u2028b\x85c\u2029d\x0be"}], "preferences": []}, {"revisions": []}]
    path.write_text("".join(json.dumps(g, ensure_ascii=False) + "\n" for g in groups) + '{"torn', encoding="utf-8")
    assert constitution._whole_lines(path) == groups
    assert constitution._whole_lines(path) == groups


@pytest.mark.parametrize("text", ["", '{"torn'])
def test_nothing_whole_is_nothing_done(tmp_path, text):
    assert constitution._whole_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "groups.jsonl").write_text(text)
    assert constitution._whole_lines(tmp_path / "groups.jsonl") == []


def test_an_unqualified_judge_stops_the_stage_and_warn_goes_on(world, monkeypatch):
    chance = {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "refused": True}
    record = {"methods": {"contrast": chance, "likelihood": chance}, "chosen": "contrast"}
    monkeypatch.setattr(constitution, "measure", lambda *_: record)
    for _ in range(2):  # the record is kept, and refuses again
        with pytest.raises(UserError, match="no judge clears chance"):
            run(world, "constitution.judge_gate=block")
    recipe = world.recipe(*SETTINGS, "constitution.judge_gate=block")
    stopped = Run.load(plan(recipe)["constitution"].path)
    assert not stopped.done
    assert stopped.manifest["judge"] == record
    assert not (stopped.path / "preferences.jsonl").exists()
    went_on = run(world, "constitution.judge_gate=warn", "constitution.rounds=1")
    assert went_on.done
    assert went_on.manifest["judge"] == record
    assert json.loads((went_on.path / "groups.jsonl").read_text().splitlines()[0])["revisions"]
