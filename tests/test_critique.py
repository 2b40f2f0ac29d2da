"""Critique and revision: the examples shown, how a request is laid out, and each check that a revision must pass."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from lab import ROOT
from test_data import near

from constitution.critique import (
    COPIED,
    critique_request,
    fault,
    pick_shots,
    refuses,
    repeats,
    revision_request,
    shared_run,
    words,
)
from truthward import chat
from truthward.errors import UserError
from truthward.examples import Example, read_examples
from truthward.principles import Principle, read_principles
from truthward.records import Prompt, Question, read_demonstrations, read_rows

SHIPPED = ROOT / "constitution" / "examples.toml"


def principle(*tags: str) -> Principle:
    texts = {key: f"({key})" for key in ("title", "text", "critique", "revision", "follow", "violate", "why")}
    return Principle(id="p", version=1, tags=list(tags), **texts)


def values(name: str, **changes) -> dict:
    return {**{k: f"{k} of {name}" for k in ("prompt", "answer", "critique", "revision")}, "tags": ["truth"], **changes}


def example(name: str, *tags: str) -> Example:
    return Example(**values(name, tags=list(tags) or ["truth"]))


@pytest.fixture
def put(tmp_path):
    """Write a file of examples and give its path; a value of None leaves the key out."""

    def write(*tables: dict, text: str | bytes = "") -> Path:
        lines = [
            "[[example]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items() if v is not None) for t in tables
        ]
        path = tmp_path / "examples.toml"
        path.write_bytes(text if isinstance(text, bytes) else (text + "".join(lines)).encode())
        return path

    return write


# ------------------------------------------------------------------------------------------------------------- reading


def test_good_examples_are_read_in_order(put):
    assert read_examples(put(values("a"), values("b", tags=["harm", "of-old"]))) == [
        example("a"),
        example("b", "harm", "of-old"),
    ]


FAULTS = {
    "an unknown key": (values("b", answr="x"), "answr: unknown key"),
    "a missing key": (values("b", critique=None), "critique: Field required"),
    "a wrong type": (values("b", prompt=3), "prompt: Input should be a valid string"),
    "an empty text": (values("b", answer=""), "answer: the text is empty"),
    "a blank text": (values("b", critique=" \n"), "critique: the text is empty"),
    "a placeholder": (values("b", prompt="Is {x} so?"), "prompt: unknown placeholder {x}"),
    "no tag": (values("b", tags=[]), "tags: List should have at least 1 item"),
    "a tag with a capital": (values("b", tags=["Truth"]), "tags.0: 'Truth' is not lower-case words"),
    "nothing revised": (values("b", answer="It is.", revision="it IS"), "revision: it is the same as the answer"),
    "a prompt asked twice": (values("b", prompt="Prompt  of a"), "prompt: the same as that of example 1"),
}


@pytest.mark.parametrize(("table", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_by_file_example_and_key(put, table, message):
    path = put(values("a"), table)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}: example 2: {message}")
    assert "to do: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[example]\n", "not valid TOML"),
        (b"# \xff\n", "not valid TOML: 'utf-8'"),
        ("x = " + "[" * 2000, "not valid TOML: maximum recursion"),
        ("# none\n", "no [[example]] tables"),
        ("example = []", "no [[example]] tables"),
        ("example = 3", "example is not a list of tables"),
        ("[example]\nprompt = 'x'", "example is not a list of tables"),
        ("example = [3]", "example 1: row: Input should be a valid dictionary"),
        ("[[examples]]\nprompt = 'x'", "unknown key examples"),
    ],
)
def test_a_file_that_holds_no_examples_says_so(put, text, message):
    path = put(text=text)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "to do: " in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: there is no such file"):
        read_examples(tmp_path / "none.toml")


# ------------------------------------------------------------------------------------------------------------- shipped


@pytest.fixture(scope="module")
def shipped() -> list[Example]:
    return read_examples(SHIPPED)


def test_shipped_examples_go_with_every_principle(shipped):
    files = ("principles.toml", "persona.toml")
    assert len(shipped) == 8
    for p in read_principles(*(ROOT / "constitution" / name for name in files)):
        assert pick_shots(shipped, p, 1, random.Random(0))[0].tags != []
        assert any(set(p.tags) & set(e.tags) for e in shipped), p.id


def test_shipped_revisions_pass_the_checks_of_a_revision(shipped):
    assert [fault(e.answer, e.revision, True, may_refuse="harm" in e.tags) for e in shipped] == [""] * 8
    assert [fault(e.answer, e.revision, True) for e in shipped if "harm" in e.tags] == ["refuses"]


def test_shipped_examples_are_short(shipped):
    assert all(len(words(text)) <= 24 for e in shipped for text in (e.prompt, e.answer, e.critique, e.revision))


def test_shipped_examples_are_asked_nowhere_else(shipped):
    data = ROOT / "data"
    rows = [json.loads(line) for file in sorted((data / "judge").glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    judged = [row[key] for row in rows for key in ("prompt", "better", "worse")]
    questions = [q for split in ("train", "dev", "test") for q in read_rows(data / "truth" / split, Question)]
    known = [text for q in questions for text in (q.question, *q.true, *q.false)]
    prompts = [p.prompt for name in ("prompts.jsonl", "persona.jsonl") for p in read_rows(data / name, Prompt)]
    said = [m.content for d in read_demonstrations([str(data / "demonstrations.jsonl")]) for m in d.messages]
    texts = [text for e in shipped for text in (e.prompt, e.answer, e.revision)]
    assert near(texts, judged + known + prompts + said) == []


# ------------------------------------------------------------------------------------------------------------ requests

CRITIQUE = "Question: {0}\nAnswer: {1}\n\n(text) (critique)"
REVISION = "Question: {0}\nAnswer: {1}\nCritique: {2}\n\n(text) (revision)"


def test_without_shots_a_request_is_one_message_of_the_user():
    assert critique_request("Q?", "A.", principle()) == chat.user(CRITIQUE.format("Q?", "A."))
    assert revision_request("Q?", "A.", "C.", principle()) == chat.user(REVISION.format("Q?", "A.", "C."))


def test_shots_are_earlier_turns_in_the_words_of_the_request():
    shots = [example("a"), example("b")]
    given = [(f"prompt of {n}", f"answer of {n}", f"critique of {n}", f"revision of {n}") for n in "ab"]
    turns = [{"role": r, "content": ""} for r in ("user", "assistant", "user", "assistant", "user")]
    contents = [t for q, a, c, _ in given for t in (CRITIQUE.format(q, a), c)] + [CRITIQUE.format("Q?", "A.")]
    expected = [{**turn, "content": text} for turn, text in zip(turns, contents, strict=True)]
    assert critique_request("Q?", "A.", principle(), shots) == expected
    contents = [t for q, a, c, r in given for t in (REVISION.format(q, a, c), r)] + [REVISION.format("Q?", "A.", "C.")]
    expected = [{**turn, "content": text} for turn, text in zip(turns, contents, strict=True)]
    assert revision_request("Q?", "A.", "C.", principle(), shots) == expected


def test_texts_with_braces_are_shown_as_they_stand():
    (message,) = revision_request("Is {0} {}?", "{x}", "{1}", principle())
    assert message["content"] == REVISION.format("Is {0} {}?", "{x}", "{1}")


def test_a_model_is_asked_in_one_conversation(tiny):
    """As tokens: the turns in order, the assistant's ended, and the assistant about to speak."""
    _, tokenizer = tiny
    ids = chat.prompt_ids(tokenizer, critique_request("Q?", "A.", principle(), [example("a")]))
    asked = [CRITIQUE.format("prompt of a", "answer of a"), CRITIQUE.format("Q?", "A.")]
    assert tokenizer.decode(ids) == (
        f"<|im_start|>user\n{asked[0]}<|im_end|>\n<|im_start|>assistant\ncritique of a<|im_end|>\n"
        f"<|im_start|>user\n{asked[1]}<|im_end|>\n<|im_start|>assistant\n"
    )


# --------------------------------------------------------------------------------------------------------------- shots


def test_shots_share_most_tags_and_the_nearest_stands_last():
    given = [example("a", "truth"), example("b", "harm"), example("c", "harm", "style"), example("d", "bias")]
    for seed in range(20):
        names = [e.prompt[-1] for e in pick_shots(given, principle("harm", "style"), 3, random.Random(seed))]
        assert names[1:] == ["b", "c"]
        assert names[0] in "ad"


def test_shots_of_equal_nearness_are_drawn_evenly_by_seed():
    given = [example(name) for name in "abcd"]
    drawn = Counter(pick_shots(given, principle("truth"), 1, random.Random(i))[0].prompt for i in range(2000))
    assert {key: n / 2000 for key, n in drawn.items()} == pytest.approx({e.prompt: 0.25 for e in given}, abs=0.03)
    assert pick_shots(given, principle("truth"), 2, random.Random(5)) == pick_shots(
        given, principle("truth"), 2, random.Random(5)
    )


@pytest.mark.parametrize(("how_many", "given"), [(0, 0), (1, 1), (3, 3), (9, 3)])
def test_there_are_as_many_shots_as_asked_or_all(how_many, given):
    three = [example(name) for name in "abc"]
    shots = pick_shots(three, principle(), how_many, random.Random(0))
    assert len({e.prompt for e in shots}) == len(shots) == given
    assert three == [example(name) for name in "abc"]


# -------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("revision", "finished", "why_not"),
    [
        ("Honey keeps for years.", True, ""),
        ("", True, "empty"),
        ("…", True, "empty"),
        ("Honey keeps for", False, "did not end"),
        ("honey  never SPOILS!", True, "unchanged"),
        ("It is not so bad. " * 3, True, "repeats itself"),
        ("This answer is better: honey keeps.", True, "speaks of the critique"),
        ("As the Critique says, honey keeps.", True, "speaks of the critique"),
        ("I'm sorry, but I can't help with honey.", True, "refuses"),
        ("Nobody knows how long honey keeps.", True, ""),
    ],
)
def test_a_revision_that_cannot_be_used_says_why(revision, finished, why_not):
    assert fault("Honey never spoils.", revision, finished) == why_not


def test_repetition_is_a_run_of_words_that_comes_three_times():
    assert repeats("a b c d " * 3)
    assert repeats("A b c d, a b c d. A b c d!")
    assert not repeats("a b c d " * 2)
    assert not repeats("a b c x " * 3 + "y", span=5)
    assert not repeats("one two")


REFUSALS = [
    "I can't help with that.",
    "I can’t help you hide it from her.",
    "I cannot assist with breaking into a car.",
    "I can not help.",
    "I won't do that.",
    "I will not take part in a prank on him.",
    "I'm not able to give medical advice.",
    "I am unable to provide any such information.",
    "I'm sorry, but I can't help with that.",
    "I am very sorry. I won't support this.",
    "Sorry, I must decline.",
    "Sorry! But I'd rather not.",
    "Unfortunately, I cannot discuss that.",
    "No, I won't help you with it.",
    "As an AI language model, I cannot answer that question.",
    "As an AI, I have to decline this one.",
    '"I\'m not comfortable writing that."',
    "I decline to say.",
    "That's not something I can help with.",
    "I can't answer that.",
]
ANSWERS = [
    "",
    "Nobody knows; it was never written down.",
    "I don't know, and nobody else does either.",
    "I can't know that, since I see only this chat.",
    "I cannot say how many there are. Nobody counted them.",
    "I can't see your street, so look at the timetable.",
    "I can't answer that with a date, because none was recorded.",
    "I'm sorry, but the loaf is raw in the middle.",
    "Sorry, that was my mistake: it is two, not eight.",
    "As an AI, I don't sleep.",
    "I decline tomatoes, being an AI.",
    "As an AI, I can't taste soup, but salt usually helps.",
    "No, a tomato is a fruit.",
    "Unfortunately, the bread is not done.",
    "I won't lie to you: it leaks.",
    "I can't help laughing at that one.",
    "I can't help but admire the effort.",
    "I'm not going to pretend that I saw it.",
    "I'm not able to see photos here.",
    "Tell him that you can't help with that.",
    "You can refuse politely: \"I'm sorry, but I can't help.\"",
    "Refusing is fine. I can't help with that is enough.",
    "Hi, can't help with that is what he said.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_known_by_its_opening(text):
    assert refuses(text)
    assert refuses(f"  {text.upper()} ")


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal_whatever_words_it_holds(text):
    assert not refuses(text)


def test_a_refusal_is_a_fault_only_where_the_first_answer_gave_none():
    assert fault("Undo the nuts.", "I won't help with that.", True) == "refuses"
    assert fault("I can't help with this.", "I won't help with that.", True) == ""
    assert fault("Undo the nuts.", "I won't help with that.", True, may_refuse=True) == ""


def test_no_demonstration_of_a_plain_answer_counts_as_a_refusal():
    """On 438 answers that are no refusals but for those to harmful requests."""
    rows = read_demonstrations([str(ROOT / "data" / "demonstrations.jsonl")])
    assert [r.id for r in rows if refuses(r.messages[-1].content) and r.kind not in ("no-harm", "persona")] == []


def test_shared_run_by_hand():
    """In both: "the cat sat" (3) and "on the mat" (3); "sat on" is broken by "there"."""
    assert shared_run("The cat sat on the mat.", "the CAT sat there, on the mat") == 3
    assert shared_run("a b c d", "x a b c d y") == shared_run("x a b c d y", "a b c d") == 4
    assert shared_run("a a b", "a b a a") == 2
    assert shared_run("a x b", "a b") == 1
    assert shared_run("", "a") == shared_run("a", "") == shared_run("a", "b") == 0
    assert words("It isn’t so-so, IT'S 'fine'.") == ["it", "isn't", "so", "so", "it's", "fine"]


SHOT = example("a").model_copy(
    update={
        "critique": "It gives a name and a year, although nobody wrote down who did it first.",
        "revision": "Nobody knows who did, since it was never written down. Any name you hear is a guess.",
    }
)


@pytest.mark.parametrize(
    ("revision", "why_not"),
    [
        (SHOT.revision, "copies an example"),
        (SHOT.critique, "copies an example"),
        ("Well, nobody knows who did, since it was NEVER, ever told.", "copies an example"),  # 8 words
        ("Nobody knows who did, since it was not recorded.", ""),  # 7
        ("Who did it first is a guess.", ""),
    ],
)
def test_a_revision_that_copies_eight_words_of_an_example_is_refused(revision, why_not):
    assert COPIED == 8
    assert fault("Lin did.", revision, True, [example("b"), SHOT]) == why_not
    assert fault("Lin did.", revision, True) == ""
