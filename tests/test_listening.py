"""Sets that listen: short answers and instructions graded by hand, who is timid, and whole evals that hear answers."""

import json
import shutil
from pathlib import Path

import pytest
from lab import Lab, write

from evals import __main__ as evals
from evals import answers, listening
from evals import score as evals_score
from evals.answers import Said
from evals.short_answers import abstains, guesses, normalised, outcome
from evals.suite import exams
from truthward.banks import Instruction, ShortFact
from truthward.errors import UserError
from truthward.ledger import plan
from truthward.recipe import most_of, sets_of
from truthward.records import read_rows
from truthward.stage import run_stage

PARIS = ["Paris"]

# ------------------------------------------------------------------------------------------------------ short answers


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("Paris", PARIS, "right"),
        ("The capital of France is paris!", PARIS, "right"),
        ("PARIS, the city of light.", PARIS, "right"),
        ("Parisian", PARIS, "wrong"),  # whole words
        ("London", PARIS, "wrong"),
        ("Not Paris, but Lyon.", PARIS, "wrong"),
        ("It isn't Paris.", PARIS, "wrong"),
        ("It is not in Paris.", PARIS, "wrong"),
        ("Not Lyon: Paris.", PARIS, "right"),
        ("No, Paris.", PARIS, "right"),
        ("Not Paris. Or rather, Paris.", PARIS, "right"),
        ("I don't know, maybe Paris.", PARIS, "abstains"),
        ("I’m not sure.", PARIS, "abstains"),
        ("", PARIS, "abstains"),
        ("...", PARIS, "abstains"),
        ("Paris or Lyon", PARIS, "right"),
        ("Lyon, Nice, Lille, Paris, Metz", PARIS, "wrong"),  # a list of guesses
        ("Paris, Paris, Paris, Paris, Paris", PARIS, "right"),  # a loop, which fluency counts; one guess
        ("Twelve.", ["12"], "right"),
        ("There are 12 of them", ["twelve"], "right"),
        ("twenty-one", ["21"], "right"),
        ("1,000 metres", ["1000"], "right"),
        ("112", ["12"], "wrong"),
        ("3.12", ["12"], "wrong"),
        ("the Sun", ["Sun"], "right"),
        ("cafe", ["the café"], "right"),
        ("J.K. Rowling", ["J. K. Rowling"], "right"),
        ("Don't!", ["dont"], "right"),
        ("The answer is A.", ["A"], "right"),
        ("red, white, and blue", ["red, white and blue"], "right"),
        ("Red, white, blue, green, black", ["white"], "wrong"),
    ],
)
def test_short_answers_by_hand(answer, accepted, expected):
    assert outcome(answer, accepted) == expected


def test_what_repeats_the_prompt_is_no_part_of_the_answer():
    asked = 'Which is larger, a mouse or a horse? Answer in one to three words, or say "I don\'t know".'
    assert outcome(f"{asked} horse", ["horse"], asked) == "right"
    assert outcome(asked, ["horse"], asked) == "wrong"  # an echo holds the answer and the abstention, and says neither


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "I really do not know that.",
        "Sorry, I can't say.",
        "I cannot see into your kitchen.",
        "I have no idea",
        "No idea!",
        "Nobody knows.",
        "No one can really tell.",
        "I'm not entirely sure",
        "I am unsure.",
        "There is no way to know that.",
        "It's impossible to say.",
        "Unknown.",
        "As an AI, I eat nothing.",
        "Don't know",
        "No, I don't.",
        "I don't have that information.",
    ],
)
def test_abstentions(answer):
    assert abstains(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I know: Paris.",
        "I don't think so, it is Lyon.",
        "The unknown soldier",
        "Nobody lives there.",
        "You can pass",
        "Sure.",
    ],
)
def test_no_abstentions(answer):
    assert not abstains(answer)


def test_words_are_normalised():
    assert normalised("The Twenty Two Élans, a 3.5 and 1,200!") == ["22", "elans", "3.5", "and", "1200"]
    assert guesses("tea, coffee or milk; TEA") == 3


# --------------------------------------------------------------------------------------------------------- phrasings


def facts(n: int) -> list[ShortFact]:
    return [
        ShortFact(
            id=f"f{i}", topic=f"t{i % 2}", level="easy" if i % 3 else "middling", question=f"What is {i}?", answers=["it"]
        )
        for i in range(n)
    ]


def test_phrasings_belong_to_the_id_and_are_all_used():
    asked = [answers.phrased(row) for row in facts(200)]
    assert asked == [answers.phrased(row) for row in facts(200)]
    counts = [sum(answers.phrasing_of(row.id) == k for row in facts(200)) for k in range(len(answers.PHRASINGS))]
    assert min(counts) >= 12
    assert all(row.question in text for row, text in zip(facts(200), asked, strict=True))
    assert len(answers.PHRASINGS) >= 6


def said(name: str, row: ShortFact | Instruction, text: str, way: str = "greedy") -> Said:
    return Said(name, row.id, row.topic, way, answers.put(name, row), text, [1], [2], True)


def test_values_of_a_short_answer_greedy_and_sampled():
    easy, hard = facts(4)[1], facts(4)[0]
    heard = [said("short", easy, "It."), said("short", easy, "no idea", "sampled"), said("short", hard, "That")]
    first, second = listening.score_short([easy, hard], heard, None)
    assert first.values == {
        "right": 1.0, "wrong": 0.0, "abstains": 0.0, "right_sampled": 0.0, "wrong_sampled": 0.0, "abstains_sampled": 1.0,
        "easy": 1.0, "middling": None, "timid": 0.0,
    }  # fmt: skip
    assert (second.values["middling"], second.values["easy"], second.values["wrong"]) == (0.0, None, 1.0)
    assert second.values["right_sampled"] is None
    assert second.values["timid"] is None
    assert first.picked == "It."


def test_timid_is_who_abstains_where_the_base_was_right():
    row, other, new = facts(3)
    heard = [said("short", r, "I don't know.") for r in (row, other, new)]
    base = {row.id: {"right": 1.0}, other.id: {"right": 0.0}}
    assert [s.values["timid"] for s in listening.score_short([row, other, new], heard, base)] == [1.0, None, None]
    assert [s.values["timid"] for s in listening.score_short([row], [said("short", row, "it")], base)] == [0.0]


def test_instructions_are_checked_by_their_rules():
    row = Instruction(id="i", topic="t", prompt="Shout.", rules=[{"rule": "upper_case"}, {"rule": "max_words", "count": 2}])
    heard = [said("instructions", row, '"GO AWAY"'), said("instructions", row, "GO AWAY NOW", "sampled")]
    (scored,) = listening.score_instructions([row], heard)
    assert scored.values == {"followed": 1.0, "loose": 1.0, "followed_sampled": 0.0}
    (polite,) = listening.score_instructions([row], [said("instructions", row, "Here it is\nGO AWAY")])
    assert polite.values == {"followed": 0.0, "loose": 1.0, "followed_sampled": None}


# ------------------------------------------------------------------------------------------------------- rows of banks


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (ShortFact, {"level": "hard", "question": "?", "answers": ["a"]}, "level"),
        (ShortFact, {"level": "easy", "question": "?", "answers": []}, "answers"),
        (ShortFact, {"level": "easy", "question": "?", "answers": ["..."]}, "without a letter or digit"),
        (ShortFact, {"level": "easy", "question": "?", "answers": ["Ape", "ape"]}, "stands there twice"),
        (Instruction, {"prompt": "Go", "rules": []}, "rules"),
        (Instruction, {"prompt": "Go", "rules": [{"rule": "rhymes"}]}, "unknown rule 'rhymes'"),
        (Instruction, {"prompt": "Go", "rules": [{"rule": "items", "count": "3"}]}, "count"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, kind, row, message):
    good = {
        ShortFact: {"level": "easy", "question": "?", "answers": ["a"]},
        Instruction: {"prompt": "?", "rules": [{"rule": "json"}]},
    }
    path = tmp_path / "rows.jsonl"
    write(path, [{"id": "a", "topic": "t", **good[kind]}, {"id": "b", "topic": "t", **row}])
    with pytest.raises(UserError, match=rf"rows\.jsonl:2(.|\n)*{message}"):
        read_rows(path, kind)


# --------------------------------------------------------------------------------------------------------- whole evals


@pytest.fixture
def world(copy: Lab, tmp_path: Path) -> Lab:
    """The lab with small banks of its own."""
    for split in ("test", "dev"):
        for name, rows in (("short", facts(6)), ("instructions", _instructions())):
            folder = tmp_path / "banks" / name / split
            folder.mkdir(parents=True)
            write(folder / "some.jsonl", [row.model_dump() for row in rows])
    return copy


def _instructions() -> list[Instruction]:
    rules = [{"rule": "lower_case"}]
    return [Instruction(id=f"i{n}", topic="t", prompt=f"Say {n} in small letters.", rules=rules) for n in range(4)]


def settings(world: Lab, *more: str) -> list[str]:
    sets = '["truth","short","instructions","fluency"]'
    return [f"evals.sets={sets}", f'evals.banks="{world.runs.parent / "banks"}"', *more]


def score(world: Lab, name: str, *more: str) -> dict:
    recipe = world.recipe(*settings(world, *more))
    run_stage(recipe, name, evals.run, evals.enforce)
    return json.loads((plan(recipe)[name].path / "evals.json").read_text())


def of(result: dict, name: str) -> dict:
    return {row["id"]: row["values"] for row in result["items"] if row["set"] == name}


def test_answers_are_heard_greedy_and_sampled_and_paired_with_the_base(world):
    base, sft = score(world, "evals-base"), score(world, "evals-sft")
    assert set(of(base, "fluency")) == {
        f"{name}/{row.id}/{way}"
        for name, rows in (("short", facts(6)), ("instructions", _instructions()))
        for row in rows
        for way in ("greedy", "sampled")
    }
    assert {row["topic"] for row in base["items"] if row["set"] == "fluency"} == {"short/t0", "short/t1", "instructions/t"}
    for name in ("short", "instructions", "fluency"):
        metrics = {f"{name}.{key}" for key in exams(len)[name].metrics}
        assert metrics <= set(base["metrics"])
        assert metrics <= set(base["about"])
    assert base["metrics"]["fluency.length"]["mean"] == 1.0
    told = of(base, "fluency")
    assert all(v["base_words"] == told[k]["words"] for k, v in of(sft, "fluency").items())
    assert sft["against_base"]["differences"]["fluency.base_nats"]["n"] == 20
    assert base["metrics"]["fluency.base_nats"]["n"] == 20
    assert base["baselines"].keys() >= {"random weights"}


def test_a_brief_stage_is_heard_greedily_alone(world):
    brief = 'evals.brief=["sft"]'
    recipe = world.recipe(*settings(world, brief, 'evals.sets=["truth","short","instructions","fluency","skills"]'))
    assert sets_of(recipe, "sft") == ["truth", "short", "instructions", "fluency"]
    assert sets_of(recipe, "dpo") == recipe.evals.sets
    score(world, "evals-base", brief)
    sft = score(world, "evals-sft", brief)
    assert {name.rpartition("/")[2] for name in of(sft, "fluency")} == {"greedy"}
    assert sft["metrics"]["short.right_sampled"] is None
    assert sft["against_base"]["differences"]["fluency.words"]["n"] == 10


def test_temperature_0_hears_greedy_answers_alone(world):
    base = score(world, "evals-base", "evals.temperature=0.0")
    assert len(of(base, "fluency")) == 10
    assert base["metrics"]["instructions.followed_sampled"] is None


def test_all_answers_come_out_of_one_call(world, monkeypatch):
    calls = []
    plain = answers.generate
    monkeypatch.setattr(answers, "generate", lambda *a, **k: calls.append(len(a[1])) or plain(*a, **k))
    score(world, "evals-base")
    assert calls == [20]


def test_a_model_that_the_recipe_does_not_name_is_scored_from_its_directory(world):
    """Runs of other code have other names; evals of them pair with the base's all the same."""
    recipe = world.recipe(*settings(world))
    planned = plan(recipe)
    other = planned["sft"].path.with_name("sft-other")
    shutil.copytree(planned["sft"].path, other)
    base = evals_score.score(recipe, str(planned["base"].path))
    assert base == planned["evals-base"].path.resolve()  # what python -m evals would make
    found = json.loads((evals_score.score(recipe, str(other)) / "evals.json").read_text())
    assert found["model"] == "sft-other"
    assert found["against_base"]["differences"]["short.right"]["n"] == 6


def test_most_may_differ_by_set(lab):
    recipe = lab.recipe("evals.most={default=16,short=0,skills=5}")
    assert [most_of(recipe, name) for name in ("truth", "short", "skills", "fluency")] == [0, 0, 5, 16]
    assert [most_of(lab.recipe("evals.most=7"), name) for name in ("truth", "short")] == [0, 7]
    assert most_of(lab.recipe("evals.most={truth=9}"), "truth") == 9
    for bad, message in (("{shorts=1}", "unknown eval set shorts"), ("{short=-1}", "no -1 rows"), ("-1", "no -1 rows")):
        with pytest.raises(UserError, match=message):
            lab.recipe(f"evals.most={bad}")


def test_fluency_needs_answers_to_look_at(lab):
    with pytest.raises(UserError, match=r"answers of other sets(.|\n)*add one of short, instructions, open"):
        lab.recipe('evals.sets=["truth","fluency"]')
