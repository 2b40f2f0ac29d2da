"""What a judge said behind an endpoint: read, turned into a log-odds, and kept."""

import math

import pytest
from faulty_server import completion
from hypothesis import given
from hypothesis import strategies as st

from constitution.replies import FLOOR, SPOKEN, Reply, append, parse, read
from truthward.errors import UserError


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"A": math.log(0.6), "B": math.log(0.3)}, math.log(2)),
        ({"A": math.log(0.2), " A": math.log(0.3), "\nB": math.log(0.25), "b": -1.0, "AB": -1.0}, math.log(2)),
        ({"A": math.log(0.8), "The": math.log(0.1), "x": math.log(0.05)}, math.log(16)),  # B is at most the smallest
        ({"x": math.log(0.5), "B": math.log(0.5)}, 0.0),  # A may be as likely as B
        ({"A": 0.0, "B": -math.inf}, -FLOOR),
        ({"A": 0.0, "B": -9999.0}, -FLOOR),
        ({"The": -0.1, "a": -3.0}, None),
        ({}, None),
    ],
)
def test_log_probabilities_make_a_log_odds(top, expected):
    reply = parse(completion("?", top)[1], "logprobs")
    assert reply.choice == (expected if expected is None else pytest.approx(expected))
    swapped = {token.translate({65: 66, 66: 65}): value for token, value in top.items()}
    assert parse(completion("?", swapped)[1], "logprobs").choice == (expected and pytest.approx(-expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 1),
        (" **B**\n", -1),
        ("Answer: B, not A", -1),
        ("(A)", 1),
        ("ABBA Bee a b", None),
        ("", None),
        (None, None),
        ("I cannot say.", None),
    ],
)
def test_text_counts_as_said_with_probability_nine_tenths(text, expected):
    assert pytest.approx(math.log(9)) == SPOKEN
    assert parse(completion(text)[1], "text").choice == (expected and expected * SPOKEN)


@given(st.lists(st.tuples(st.sampled_from(["A", " A", "B", "\tB", "x", "y"]), st.floats(-20, 0)), max_size=20))
def test_a_missing_letter_is_never_above_what_is_listed_and_order_is_nothing(top):
    choice = Reply("logprobs", "", top).choice
    assert choice == (None if choice is None else pytest.approx(Reply("logprobs", "", top[::-1]).choice))
    seen = {letter: [math.exp(p) for token, p in top if token.strip() == letter] for letter in "AB"}
    if seen["A"] and seen["B"]:
        assert choice == pytest.approx(math.log(sum(seen["A"]) / sum(seen["B"])))
    elif seen["A"] or seen["B"]:
        assert (choice >= 0) if seen["A"] else (choice <= 0)
    else:
        assert choice is None


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"choices": null}', b'{"choices": [{}]}', b"\xff"])
def test_what_is_no_completion_raises_what_the_caller_takes_for_a_fault(content):
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        parse(content, "text")


def test_a_log_probability_must_be_a_number():
    for bad in (b"NaN", b"null", b'"?"'):
        with pytest.raises((ValueError, TypeError)):
            parse(completion("A", {"A": -7.5})[1].replace(b"-7.5", bad), "logprobs")


def test_a_damaged_line_is_pointed_at(tmp_path):
    for number in range(3):
        append(tmp_path / "cache", str(number), "m", Reply("text", "A", [("A", -1.0)]))
    assert read(tmp_path / "cache", "m") == {str(n): Reply("text", "A", [("A", -1.0)]) for n in range(3)}
    text = (tmp_path / "cache").read_text().splitlines()
    (tmp_path / "cache").write_text("\n".join([text[0], text[1][:-3], text[2], ""]))
    with pytest.raises(UserError, match="cache:2: this line is damaged"):
        read(tmp_path / "cache", "m")


def test_a_reply_is_on_the_disk_before_it_is_used(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("os.fsync", lambda number: seen.append(read(tmp_path / "cache", "m")))
    for number in range(2):
        append(tmp_path / "cache", str(number), "m", Reply("text", "B", []))
    assert [list(known) for known in seen] == [["0"], ["0", "1"]]
