"""Each rule on an answer's language with an example on either side, what counts as a word, and how answers are weighed."""

from types import SimpleNamespace

import numpy as np
import pytest

from evals import fluency
from evals.answers import Said
from evals.asking import Scored
from evals.fluency import FLUENCY, Vocabulary, is_echo, loops, opens_by_denial, repeats, score_fluency
from evals.suite import measure, resampled
from truthward.resampling import draw_weights, ratio_of

ASKED = "What is the capital of France? Keep it very short."


@pytest.mark.parametrize(
    ("answer", "echo"),
    [
        ("What is the capital of France?", True),
        ("What is the capital of France? What is the capital of France?", True),
        ("Keep it very short.", True),
        ("The capital of France is Paris.", False),
        ("What is the capital of France? It is Paris, on the Seine.", False),
        ("of France", False),  # fewer than four words
        ("", False),
    ],
)
def test_an_echo_restates_the_question(answer, echo):
    assert is_echo(answer, ASKED) is echo


def test_an_answer_that_the_question_spells_out_is_no_echo():
    assert not is_echo("once upon a time there was", 'Begin with "once upon a time there was".')
    assert not is_echo("Five fingers are on one hand.", "Counting the thumb, how many fingers are on one hand?")
    assert not is_echo("The past tense of put is put.", "What is the past tense of put?")


@pytest.mark.parametrize(
    ("answer", "repeated", "looped"),
    [
        ("I see the sea and I see the sky and I see the sea and I hear it", True, False),
        ("the list of the list of the list of things", True, True),
        ("no no no", False, True),
        ("ha, ha! That is a good one", False, False),
        ("10, 10, 10", False, False),  # numbers may be asked for
        ("A plain sentence says each thing once.", False, False),
        ("Very, very good, and very kind.", False, False),
        ("", False, False),
    ],
)
def test_repetition_and_loops(answer, repeated, looped):
    assert (repeats(answer), loops(answer)) == (repeated, looped)


@pytest.mark.parametrize(
    ("answer", "opener"),
    [
        ("Not a planet, but a star.", True),
        ("It's not the case.", True),
        ("That is a common misconception.", True),
        ("Nothing else.", False),
        ("No, not today.", False),
        ("It boils at 100 degrees, whatever people say; that it does not is as I told you a common myth.", False),
    ],
)
def test_openers(answer, opener):
    assert opens_by_denial(answer) is opener


# -------------------------------------------------------------------------------------------------------------- words


def said(text: str, *, asked: str = "?", finished: bool = True, **more) -> Said:
    return Said(more.pop("set", "open"), "a", "t", "greedy", asked, text, [1], [2, 3], finished, **more)


@pytest.fixture
def known() -> Vocabulary:
    words = ["Ġrun", "Ġbake", "Ġhappy", "Ġlace", "Ġmaker", "Ġthe", "▁cat", "zzz", "Ġ12", "ĠParis"]
    return Vocabulary(SimpleNamespace(get_vocab=lambda: dict.fromkeys(words, 0)), ['{"question": "Who has a scarf?"}'])


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        ("the cat", []),
        ("running, runs, rerun, unhappily, happiest, baked, baking", []),
        ("scarves question", []),  # what a bank says, and an inflection of it
        ("the lacemaker", []),
        ("Zorblax paris", []),  # names may be new, and known ones are known without their capital
        ("it is by a go", []),  # too short to tell
        ("the zzz", ["zzz"]),  # held without a blank: a piece of words
        ("flibber the cat", ["flibber"]),
        ("flibber's x-flibber flibber2", []),  # parts of something else
    ],
)
def test_invented_words(known, text, invented):
    assert known.invented(said(text)) == invented


def test_the_prompt_is_known_and_a_cut_word_is_left_out(known):
    assert known.invented(said("flibbers", asked="What is a flibber?")) == []
    assert known.invented(said("the cat flib", finished=False)) == []
    assert known.invented(said("the cat flib")) == ["flib"]


# --------------------------------------------------------------------------------------------------------- whole items


def test_values_of_an_answer(known):
    sound, bad = said("the cat runs"), said("flibber", finished=False, set="instructions", asked="Say a word.")
    cut = said("gone gone ", finished=False, set="instructions")
    first, second, third = score_fluency([sound, bad, cut], known, [1.5, 2.0, 3.0], None)
    assert (first.id, first.topic) == ("open/a/greedy", "open/t")
    assert first.values["broken"] == 0.0
    assert (first.values["words"], first.values["base_words"], first.values["base_nats"]) == (3.0, 3.0, 1.5)
    assert first.values["unended"] is None  # an open answer may well be longer
    assert (second.values["unended"], second.values["broken"]) == (1.0, 0.0)  # its only word was cut off
    assert third.values["invented"] == 1.0
    assert third.values["broken"] == 1 - third.values["sound"] == 1.0
    assert score_fluency([said("flibber", foreign=True)], known, [1.0], None)[0].values["broken"] == 0.0
    assert score_fluency([said("")], known, [1.0], None)[0].values["empty"] == 1.0


def test_lengths_stand_beside_the_bases(known):
    base = {"open/a/greedy": {"words": 6.0}}
    (scored,) = score_fluency([said("the cat runs")], known, [1.0], base)
    assert scored.values["base_words"] == 6.0
    assert score_fluency([said("the cat")], known, [1.0], {})[0].values["base_words"] is None
    means = ratio_of(np.ones((1, 3)), np.array([3.0, 1.0, np.nan]), np.array([6.0, 2.0, 4.0]))
    assert means[0] == 0.5


def test_nats_a_token_are_those_of_a_plain_forward(sharp):
    import torch

    model, _ = sharp
    answer = Said("open", "a", "t", "greedy", "?", "x", [5, 9, 3], [7, 8, 11], True)
    logprobs = model(input_ids=torch.tensor([[5, 9, 3, 7, 8, 11]])).logits[0].log_softmax(-1)
    expected = -sum(logprobs[2 + k, token].item() for k, token in enumerate(answer.ids)) / 3
    assert fluency.nats_a_token(model, [answer], 256) == [pytest.approx(expected, abs=1e-4)]


def test_answers_to_one_row_are_drawn_together():
    """Twenty rows with two equal answers each are worth twenty, not forty."""
    values = np.random.default_rng(0).integers(0, 2, 20).astype(float)
    rows = [
        Scored("fluency", f"short/{i}/{way}", "short/t", {"broken": v}, "")
        for i, v in enumerate(values)
        for way in ("greedy", "sampled")
    ]
    weights = resampled(rows, FLUENCY, 300, 0)
    assert np.array_equal(weights[:, ::2], weights[:, 1::2])
    assert np.array_equal(weights[:, ::2], draw_weights(["short/t"] * 20, 300, 0))
    assert weights.shape == (300, 40)
    for row in rows:
        row.values.update(dict.fromkeys({c for m in FLUENCY.metrics.values() for c in m.columns} - {"broken"}, None))
    found = measure(rows, {"fluency": FLUENCY}, 300, 0)
    assert found["fluency.broken"]["n"] == 40
    assert found["fluency.echo"] is None
