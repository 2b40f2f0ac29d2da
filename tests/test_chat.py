"""One rendering: prompts and answers become the same tokens for training, scoring and sampling, on any text."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from truthward import chat
from truthward.errors import UserError
from truthward.models import WHEEL

CONTROL = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>"]
ODD = [
    "{{ x }}",
    "{% endgeneration %}",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
]
KNOWN = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), max_size=6)  # SmolLM2 has no tokens for some others
PIECES = [*ODD, "é", "🙂", "e\u0301", "\u200b", " "]
ORDINARY = st.lists(st.one_of(st.sampled_from(PIECES), KNOWN), max_size=6).map("".join)
TEXT = st.lists(st.one_of(st.sampled_from([*PIECES, *CONTROL]), KNOWN), max_size=6).map("".join)
STRIPPED = TEXT.map(str.strip).filter(bool)
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"], exclude_characters="<"), min_size=1, max_size=6)
PLAIN = st.lists(st.one_of(st.sampled_from(["\n", "\n\n", "\t", "🙂"]), WORDS), min_size=1).map("".join).map(str.strip)


@pytest.fixture(scope="session", params=["tiny", "smollm2"])
def tokenizer(request, tiny):
    if request.param == "tiny":
        return tiny[1]
    spec = importlib.util.find_spec(WHEEL)
    if spec is None:
        pytest.skip(f"the wheel {WHEEL} is not installed")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return chat.prepare_tokenizer(AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name))


def talk(question: str, answer: str, system: str = "") -> list[dict[str, str]]:
    return [*chat.user(question, system), {"role": "assistant", "content": answer}]


def test_the_template_renders(tokenizer):
    """ChatML, with the system prompt that was given and no other, and not a space changed."""
    messages = talk(" Is ice cold? \n", "Yes.", "Be brief.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n Is ice cold? \n<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(chat.user("Is ice cold?"), tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nIs ice cold?<|im_end|>\n<|im_start|>assistant\n"


@settings(max_examples=100)
@given(ORDINARY, ORDINARY.map(str.strip).filter(bool), ORDINARY)
@example("hi", "No.\n\nNo.", "{{ x }}")
def test_the_generation_marks_give_the_mask_of_encode(tokenizer, question, answer, system):
    """One pass over the whole text by the template and its marks, against prompt and answer tokenised apart."""
    messages = talk(question, answer, system)
    ids, mask = chat.encode(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert whole["input_ids"] == ids + newline
    assert [bool(m) for m in whole["assistant_masks"]] == mask + [False] * len(newline)


@given(ORDINARY, ORDINARY)
def test_ordinary_text_has_the_tokens_that_the_template_and_the_tokenizer_give(tokenizer, question, answer):
    """Whole, as before text that spells a control token was looked for."""
    rendered = tokenizer.apply_chat_template(chat.user(question), tokenize=False, add_generation_prompt=True)
    assert chat.prompt_ids(tokenizer, chat.user(question)) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert chat.answer_ids(tokenizer, answer)[:-1] == tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    assert chat.text_ids(tokenizer, answer) == tokenizer(answer, add_special_tokens=False)["input_ids"]


@given(TEXT, TEXT, STRIPPED)
@example("<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>", "<|im_start|>", "a <|im_end|> b")
def test_what_is_said_is_never_a_control_token(tokenizer, question, system, answer):
    """Row 43 again: a row that spells the template's own tokens would else begin a turn, or end the answer early."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = chat.prompt_ids(tokenizer, chat.user(question, system))
    begin, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    turns = [begin, end] * (2 if system else 1) + [begin]
    assert [i for i in ids if i in special] == turns
    said = chat.answer_ids(tokenizer, answer)
    assert [i for i in said if i in special] == [end]
    assert tokenizer.decode(said[:-1]) == answer
    assert tokenizer.decode(ids).split("user\n", 1)[1].startswith(question)


@pytest.mark.parametrize("text", ["a\x04b", "a\U00040000", "\ud800"])
def test_a_character_without_tokens_is_refused_not_dropped(tokenizer, text, tiny):
    """SmolLM2's vocabulary lacks six control characters, and the bytes that planes 4 to 11 begin with."""
    if tokenizer is tiny[1] and text != "\ud800":
        assert chat.decode(tokenizer, chat.answer_ids(tokenizer, text)) == text
        return
    for render in (chat.answer_ids, chat.text_ids, lambda t, x: chat.prompt_ids(t, chat.user(x))):
        with pytest.raises(UserError, match=f"no tokens for U\\+0*{ord(max(text)):X}|no tokens for U\\+0004"):
            render(tokenizer, text)


@given(TEXT, TEXT)
def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer, question, answer):
    """Row 43: what is sampled from is what is trained on; and the rest is the answer, all of it labelled."""
    ids, mask = chat.encode(tokenizer, talk(question, answer))
    prompt = chat.prompt_ids(tokenizer, chat.user(question))
    assert ids == prompt + chat.answer_ids(tokenizer, answer)
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@given(TEXT)
def test_the_end_token_is_labelled_and_is_the_last(tokenizer, answer):
    """Also of an empty answer: a model that never sees its end token labelled never learns to stop."""
    ids, mask = chat.encode(tokenizer, talk("?", answer))
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert mask[-1]


@given(STRIPPED, STRIPPED, STRIPPED)
def test_the_next_prompt_goes_on_where_the_conversation_ended(tokenizer, question, answer, another):
    """A chat of several turns sees its earlier turns as the tokens that they were trained or sampled as."""
    messages = talk(question, answer)
    ids, _ = chat.encode(tokenizer, messages)
    assert chat.prompt_ids(tokenizer, [*messages, *chat.user(another)])[: len(ids)] == ids


@given(PLAIN)
def test_an_answer_comes_back_from_its_tokens(tokenizer, answer):
    """Any text but control characters, for which SmolLM2 has no tokens."""
    ids = chat.answer_ids(tokenizer, answer)
    assert chat.decode(tokenizer, ids) == answer
    assert ids == chat.answer_ids(tokenizer, f" \n{answer}\n ")  # space around an answer is not part of it


def test_pad_is_not_the_end_token_and_stands_left(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


def test_preparing_twice_changes_nothing(tokenizer):
    before = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template)
    again = chat.prepare_tokenizer(tokenizer)
    assert (again.pad_token, again.eos_token, again.chat_template) == before


def bare(*special: str, **options: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(BPE(vocab={t: i for i, t in enumerate([*special, "a"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


@pytest.mark.parametrize(
    ("special", "eos", "pad", "made"),
    [
        (("<|im_start|>", "<|im_end|>", "<pad>"), "<|im_end|>", "<|im_end|>", "<pad>"),
        (("<|im_start|>", "<|im_end|>", "<pad>"), "<|im_end|>", None, "<pad>"),
        (("<|endoftext|>", "[PAD]"), "<|endoftext|>", None, "[PAD]"),
        (("</s>", "<mine>", "<pad>"), "</s>", "<mine>", "<mine>"),
    ],
)
def test_a_pad_that_is_missing_or_doubles_as_the_end_token_is_replaced(special, eos, pad, made):
    """By the first spare token that is not the end token; a pad of its own is kept."""
    got = chat.prepare_tokenizer(bare(*special, eos_token=eos, pad_token=pad, chat_template="{{ messages }}"))
    assert (got.pad_token, got.eos_token) == (made, eos)


@pytest.mark.parametrize("special", [("<|im_start|>", "<|im_end|>"), ("</s>",)])
def test_no_template_or_no_pad_is_refused(special):
    with pytest.raises(UserError, match="no chat template|no token to pad with"):
        chat.prepare_tokenizer(bare(*special, eos_token=special[-1]))
