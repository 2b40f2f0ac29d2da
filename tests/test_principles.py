"""The constitution as input: every fault is one error that names file, principle and key; nothing else is raised."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lab import ROOT

from truthward.errors import UserError
from truthward.principles import (
    TEXTS,
    Principle,
    advice,
    read_constitution,
    read_persona,
    read_principles,
)

SHIPPED = ROOT / "constitution" / "principles.toml"
PERSONA = ROOT / "constitution" / "persona.toml"
WREN = """[persona]
name = "Wren"
voice = "Plain."
humour = "Dry."
limits = "An AI."
[persona.why]
voice = "a"
humour = "b"
limits = "c"
"""


def values(name: str, **changes) -> dict:
    texts = {key: f"{key} of {name}" for key in ("title", *TEXTS, "why")}
    return {"id": name, "version": 1, **texts, **changes}


def toml(*tables: dict, head: str = "") -> str:
    """Tables of principles; a value of None leaves the key out, bytes stand as they are."""
    lines = [
        [f"{k} = {v.decode() if isinstance(v, bytes) else json.dumps(v)}" for k, v in t.items() if v is not None]
        for t in tables
    ]
    return head + "".join("[[principle]]\n" + "\n".join(rows) + "\n" for rows in lines)


def principle(name: str, **changes) -> Principle:
    return Principle(**values(name, **changes))


@pytest.fixture
def put(tmp_path):
    """Write a file and give its path."""

    def write(text: str | bytes, name: str = "principles.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(read, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "to do: " in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ reading


def test_good_principles_are_read_in_order(put):
    path = put(toml(values("a"), values("b-2", weight=2.0, tags=["truth", "of-old"])))
    first, second = read_principles(path)
    assert (first.id, first.weight, first.tags, second.weight, second.tags) == ("a", 1.0, [], 2.0, ["truth", "of-old"])
    assert first.follow == "follow of a"


FAULTS = {
    "an unknown key": (values("b", wieght=2.0), "wieght: unknown key"),
    "a missing key": (values("b", why=None), "why: Field required"),
    "a wrong type": (values("b", title=3), "title: Input should be a valid string"),
    "an empty text": (values("b", follow=""), "follow: the text is empty"),
    "a blank text": (values("b", critique=" \n\t"), "critique: the text is empty"),
    "a placeholder": (values("b", revision="Rewrite {answer}."), "revision: unknown placeholder {answer}"),
    "a nameless placeholder": (values("b", text="Keep {} true."), "text: unknown placeholder {}"),
    "a placeholder in double braces": (values("b", violate="Say {{ x }}."), "violate: unknown placeholder { x }"),
    "version 0": (values("b", version=0), "version: Input should be greater than or equal to 1"),
    "a version in quotes": (values("b", version="1"), "version: Input should be a valid integer"),
    "weight 0": (values("b", weight=0.0), "weight: Input should be greater than 0"),
    "a negative weight": (values("b", weight=-1.0), "weight: Input should be greater than 0"),
    "an endless weight": (values("b", weight=b"inf"), "weight: Input should be a finite number"),
    "a weight that is none": (values("b", weight=b"nan"), "weight: Input should be"),
    "a tag with a capital": (values("b", tags=["Truth"]), "tags.0: 'Truth' is not lower-case words"),
    "follow that is violate": (values("b", follow="Do so.", violate="do  SO."), "violate: it is the same as follow"),
}


@pytest.mark.parametrize(("table", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_by_file_principle_and_key(put, table, message):
    path = put(toml(values("a"), table))
    assert refusal(read_principles, path).startswith(f"{path}: principle 2 (b): {message}")


@pytest.mark.parametrize("name", ["", "B", "no stereotypes", "no_stereotypes", "-a", "a-", "a--b", "7-up", "naïve", "a\n"])
def test_an_id_is_lower_case_words_with_hyphens(put, name):
    path = put(toml(values("a"), values("x", id=name)))
    assert refusal(read_principles, path).startswith(f"{path}: principle 2: id: {name!r} is not lower-case words")


def test_an_id_stands_once_and_so_does_a_text(put):
    path = put(toml(values("a"), values("b"), values("a", text="Another.")))
    assert refusal(read_principles, path).startswith(
        f"{path}: principle 3 (a): id: used twice, first by {path}: principle 1"
    )
    path = put(toml(values("a", text="Tell the truth."), values("b", text="tell the  TRUTH.")))
    assert refusal(read_principles, path).startswith(
        f"{path}: principle 2 (b): text: the same as that of {path}: principle 1"
    )


def test_files_together_are_one_constitution(put):
    one, other = put(toml(values("a"), values("b")), "one.toml"), put(toml(values("c")), "other.toml")
    assert [p.id for p in read_principles(one, other)] == ["a", "b", "c"]
    put(toml(values("b", text="Another.")), "other.toml")
    assert refusal(read_principles, one, other).startswith(f"{other}: principle 1 (b): id: used twice, first by {one}")


def test_weights_whose_sum_is_endless_are_refused(put):
    path = put(toml(values("a", weight=1e308), values("b", weight=1e308)))
    assert refusal(read_principles, path).startswith(f"{path}: principle 2 (b): weight: the sum is not finite")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[principle]\n", "not valid TOML"),
        (b"# \xff\n", "not valid TOML: 'utf-8'"),
        (toml(values("a", version=b"1" * 5000)), "not valid TOML: Exceeds the limit"),
        ("x = " + "[" * 2000, "not valid TOML: maximum recursion"),
        ("x = " + "{a = " * 2000, "not valid TOML: maximum recursion"),
        ("# none\n", "no [[principle]] tables"),
        ("principle = []", "no [[principle]] tables"),
        ("principle = 3", "principle is not a list of tables"),
        ("[principle]\nid = 'x'", "principle is not a list of tables"),
        ("principle = [1]", "principle 1: row: "),
        ("[[principles]]\nid = 'x'", "unknown key principles"),
        ("a." * 3000 + "b = 1", "brackets within brackets"),
        (toml({**values("b"), "a." * 3000 + "b": 1}), "brackets within brackets"),
        (toml(values("a", weight=b"1" + b"0" * 400)), "principle.0.weight: an integer beyond 64 bits"),
        (toml(values("a", text="NUL \0")), "principle.0.text: the control character '\\x00'"),
        (toml(values("a", why="hf_" + "a1" * 17)), "principle.0.why: this looks like a key or a password"),
    ],
    ids=range(16),
)
def test_a_file_that_holds_no_constitution_is_refused(put, text, message):
    path = put(text)
    assert refusal(read_principles, path).startswith(f"{path}: {message}")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert refusal(read_principles, tmp_path / "x.toml").startswith(f"{tmp_path / 'x.toml'}: there is no such file")
    assert refusal(read_principles, tmp_path).startswith(f"{tmp_path}: there is no such file")


TOML = (
    st.sampled_from(["[[principle]]", "[persona]", "[persona.why]", "principle = 1", "\n", "id = 'a'", "tags = [1]"])
    | st.text()
)


@given(st.lists(TOML, max_size=6).map("\n".join))
@example(toml(values("a")))
def test_any_text_is_a_constitution_or_one_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        assert read_constitution(path).principles
    except UserError as error:
        assert error.where.startswith(str(path))


# ------------------------------------------------------------------------------------------------------------- advice


def test_prompts_of_very_different_length_are_warned_of():
    """Of 100 characters, 75 may be enough and 74 are not, whichever side is shorter."""
    long, enough, short = "f" * 100, "v" * 75, "v" * 74
    assert advice([principle("a", follow=long, violate=enough), principle("b", follow=enough + "x", violate=long)]) == []
    (one,) = advice([principle("a", follow=long, violate=short)])
    assert one.startswith("a: follow has 100 characters, violate 74")
    (other,) = advice([principle("a", follow=short, violate=long)])
    assert other.startswith("a: follow has 74 characters, violate 100")


def test_texts_that_principles_share_are_warned_of():
    shared = [principle("a", revision="Rewrite it."), principle("b"), principle("c", revision="rewrite  it.")]
    assert advice(shared) == ["c: revision is the same as that of a"]


# ------------------------------------------------------------------------------------------------------------- persona


def test_a_persona_gives_principles_of_its_own(put):
    path = put(toml(values("a", tags=["persona", "wit"]), head=WREN))
    persona, principles = read_persona(path)
    assert (persona.name, persona.humour, persona.why.limits) == ("Wren", "Dry.", "c")
    assert principles == read_principles(path)
    assert [p.id for p in principles] == ["a"]


@pytest.mark.parametrize(
    ("head", "tags", "message"),
    [
        (WREN, ["wit"], "principle 1 (a): tags: not tagged persona"),
        (WREN.replace('humour = "Dry."\n', ""), ["persona"], "persona: humour: Field required"),
        (WREN.replace('humour = "b"\n', ""), ["persona"], "persona: why.humour: Field required"),
        (WREN.replace('"Dry."', '" "'), ["persona"], "persona: humour: the text is empty"),
        (
            WREN.replace('voice = "Plain', 'voise = "Plain'),
            ["persona"],
            "persona: voice: Field required; voise: unknown key",
        ),
        ("persona = 3\n", ["persona"], "persona: row: "),
        ("", ["persona"], "no [persona] table"),
    ],
)
def test_a_fault_of_a_persona_is_named(put, head, tags, message):
    path = put(toml(values("a", tags=tags), head=head))
    assert refusal(read_persona, path).startswith(f"{path}: {message}")


# ------------------------------------------------------------------------------------------------------ shipped files


def test_the_shipped_constitution_is_whole():
    shipped = read_principles(SHIPPED)
    assert len(shipped) >= 16
    assert {p.weight for p in shipped if "truth" in p.tags} == {2.0}
    assert {"wit-without-cruelty", "one-steady-wren"} <= {p.id for p in shipped if "persona" in p.tags}


def test_the_shipped_persona_joins_it():
    persona, principles = read_persona(PERSONA)
    assert persona.name == "Wren"
    assert {"wit", "steadiness"} <= {tag for p in principles for tag in p.tags}
    joined = read_principles(SHIPPED, PERSONA)
    assert joined == read_principles(SHIPPED) + principles
    assert advice(joined) == []
