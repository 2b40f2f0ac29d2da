"""Rows of data: every fault is one error that names file, line and field, and no input gives anything else."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lab import write

from truthward.errors import UserError
from truthward.records import (
    Demonstration,
    Preference,
    Prompt,
    Question,
    Revision,
    by_prompt,
    draw,
    read_demonstrations,
    read_preferences,
    read_rows,
    truth_preferences,
    write_rows,
)

KINDS = (Demonstration, Prompt, Question, Preference, Revision)
GOOD = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
QUESTION = {"id": "q", "topic": "t", "kind": "k", "question": "Is it?", "true": ["Yes."], "false": ["No."]}
REVISION = {
    **dict.fromkeys(("prompt_id", "prompt", "answer", "critique", "revision", "principle", "model"), "text"),
    **{"principle_version": 1, "round": 1, "seed": 1, "score_before": -1.0, "score_after": 0.0, "helped": True},
}


def preference(**changes) -> dict:
    return {**GOOD, **changes}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


def refusal(read, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "to do: " in str(caught.value) or caught.value.where
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- reading


def test_rows_come_back_as_they_were_written(file):
    rows = [Preference(**GOOD), Preference(**preference(prompt='é\u2028\x85 "q"\n', probability=0.75, principle=["a"]))]
    write_rows(file, rows)
    assert read_rows(file, Preference) == rows


def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [preference(prompt=name)])
    (tmp_path / "notes.txt").write_text("not rows")
    assert [row.prompt for row in read_rows(tmp_path, Preference)] == ["a", "b"]


def test_empty_lines_count_as_lines_and_not_as_rows(file):
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(preference(seed="x")) + "\n")
    assert f"{file}:3: seed: " in refusal(read_rows, file, Preference)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("{'prompt': 'a'}", "not valid JSON"),
        ("null", "row: "),
        ("[]", "row: "),
        (json.dumps(preference(chosen=3)), "chosen: "),
        (json.dumps(preference(chosen="")), "chosen: "),
        (json.dumps(preference(probability=0.4)), "probability: "),
        (json.dumps(preference(probability=float("nan"))), "probability: "),
        (json.dumps(preference(seed=1.5)), "seed: "),
        (json.dumps(preference(principle=["a", 3])), "principle.1: "),
        (json.dumps(preference(chosn="x")), "chosn: "),
        (json.dumps({"prompt": "a", "chosen": "b"}), "rejected: Field required"),
    ],
)
def test_a_bad_line_is_named_with_its_field(file, line, field):
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    assert refusal(read_rows, file, Preference).startswith(f"{file}:2: {field}")


def test_the_keys_of_a_row_are_listed(file):
    file.write_text('{"promt": "a"}')
    assert "a prompt has the keys id, kind, prompt" in refusal(read_rows, file, Prompt)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (Demonstration, {"id": "d", "messages": [{"role": "user", "content": "a"}]}, "messages: "),
        (Demonstration, {"id": "d", "messages": [{"role": "user", "content": "a"}] * 2}, "the last message must be"),
        (Demonstration, {"id": "d", "messages": [{"role": "bot", "content": "a"}] * 2}, "messages.0.role: "),
        (Question, {**QUESTION, "false": ["Yes."]}, "an answer stands under both true and false"),
        (Question, {**QUESTION, "true": []}, "true: "),
    ],
)
def test_rules_beyond_types_are_checked_too(file, kind, row, message):
    write(file, [row])
    text = refusal(read_rows, file, kind)
    assert text.startswith(f"{file}:1: ")
    assert message in text


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_refused(file, content):
    file.write_text(content)
    assert f"{file}: no rows" in refusal(read_rows, file, Prompt)


def test_what_is_not_there_or_not_text_is_refused(tmp_path, file):
    assert f"{file}: there is no such file" in refusal(read_rows, file, Prompt)
    file.write_bytes(b'{"id": "\xff"}')
    assert f"{file}: not UTF-8" in refusal(read_rows, file, Prompt)
    (tmp_path / "empty").mkdir()
    assert "no rows" in refusal(read_rows, tmp_path / "empty", Prompt)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def near_rows(draw) -> str:
    kind = draw(st.sampled_from(KINDS))
    keys = draw(st.lists(st.sampled_from(list(kind.model_fields)), max_size=12, unique=True))
    return json.dumps({k: draw(JSON | st.just([{"role": "user", "content": "a"}, {"role": "assistant"}])) for k in keys})


@given(st.lists(near_rows() | st.text(max_size=20) | JSON.map(json.dumps), max_size=3), st.sampled_from(KINDS))
@example(['{"\\ud800": 1}'], Prompt)
@example(["1" * 5000], Prompt)
@example(["[" * 100_000], Prompt)
def test_any_lines_give_rows_or_a_user_error(tmp_path_factory, lines, kind):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        rows = read_rows(path, kind)
    except UserError as error:
        assert str(path) in error.where
    else:
        assert rows
        assert all(isinstance(row, kind) for row in rows)


@given(st.binary(max_size=40))
def test_any_bytes_give_rows_or_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_rows(path, Question)


# ------------------------------------------------------------------------------------- demonstrations and preferences


def test_revisions_are_demonstrations_only_when_they_helped(tmp_path):
    rows = [{**REVISION, "prompt_id": "a", "revision": "Better."}, {**REVISION, "prompt_id": "b", "helped": False}]
    write(tmp_path / "revisions-1.jsonl", rows)
    write(tmp_path / "demos.jsonl", [{"id": "d", "messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}])
    demos, revisions = str(tmp_path / "demos.jsonl"), str(tmp_path / "revisions-1.jsonl")
    read = read_demonstrations([demos, revisions])
    assert [d.id for d in read] == ["d", "a/1"]
    assert [(m.role, m.content) for m in read[1].messages] == [("user", "text"), ("assistant", "Better.")]


def test_a_truth_bank_pairs_answers_that_match_and_names_its_row():
    question = Question(**{**QUESTION, "true": ["Yes.", "Aye."], "false": ["No.", "Nay.", "Never."]})
    pairs = truth_preferences([question], "bank")
    assert [(p.chosen, p.rejected, p.source) for p in pairs] == [("Yes.", "No.", "bank/q"), ("Aye.", "Nay.", "bank/q")]
    crossed = [(p.chosen, p.rejected) for p in truth_preferences([question], "bank", cross=True)]
    assert crossed == [(t, f) for t in question.true for f in question.false]


@pytest.fixture
def sources(tmp_path):
    """Twenty rows in a file, ten in a bank, thirty from the constitution."""
    write(tmp_path / "file.jsonl", [preference(prompt=f"file {i}") for i in range(20)])
    (tmp_path / "bank").mkdir()
    write(tmp_path / "bank" / "t.jsonl", [{**QUESTION, "question": f"bank {i}"} for i in range(10)])
    write(tmp_path / "preferences.jsonl", [preference(prompt=f"constitution {i}") for i in range(30)])
    return [str(tmp_path / "file.jsonl"), str(tmp_path / "bank"), "constitution"], tmp_path


def test_preferences_come_from_every_source_in_order(sources):
    rows = read_preferences(*sources)
    assert [row.prompt.split()[0] for row in rows] == ["file"] * 20 + ["bank"] * 10 + ["constitution"] * 30
    assert len({row.prompt for row in rows}) == 60


def test_preferences_are_drawn_by_seed(sources):
    rows = read_preferences(*sources)
    drawn = draw(rows, 30, seed=1)
    assert drawn == draw(read_preferences(*sources), 30, seed=1)
    assert drawn != draw(rows, 30, seed=2)
    assert len({row.prompt for row in drawn}) == 30
    assert len({row.prompt.split()[0] for row in drawn}) == 3
    assert [row.prompt for row in drawn] != sorted(row.prompt for row in drawn)
    assert {row.prompt for row in draw(rows, 1000, seed=1)} == {row.prompt for row in rows}


def test_pairs_of_a_prompt_are_kept_together(sources):
    rows = read_preferences(*sources)
    again = [Preference(**preference(prompt=row.prompt, chosen="Aye.")) for row in reversed(rows)]
    groups = by_prompt(rows + again)
    assert [g[0] for g in groups] == rows
    assert all(len(g) == 2 and len({p.prompt for p in g}) == 1 for g in groups)


def test_a_constitution_without_preferences_adds_none_but_alone_is_refused(sources):
    names, run = sources
    (run / "preferences.jsonl").write_text("")
    assert len(read_preferences(names, run)) == 30
    assert "no " in refusal(read_preferences, ["constitution"], run)


def test_preferences_of_a_constitution_that_was_not_run_are_refused():
    assert "run the constitution stage first" in refusal(read_preferences, ["constitution"], None)
