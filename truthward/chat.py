"""Rendering: the one way in which prompts and answers become tokens, for SFT, reward, DPO, PPO and evals alike.

Every text that a model sees is ``prompt_ids(...) + answer_ids(...)``: the answer is always tokenised by itself, so that
what training, scoring and sampling see are the same tokens. Many silent faults of this field are two renderings.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from truthward.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ChatML without a default system prompt; the generation marks say which words are the assistant's.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
BARE = "{{- messages[0]['content'] -}}"
PAD_CANDIDATES = ("<|endoftext|>", "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer our template (where it speaks ChatML) and a pad token that does not double as the end of an answer.

    Raises:
        UserError: it has no chat template and no ChatML tokens, or no token to pad with.
    """
    vocabulary = tokenizer.get_vocab()
    if {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys():
        tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|im_end|>"
    elif not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", where="model.base", fix="use a chat model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [t for t in PAD_CANDIDATES if t in vocabulary and t != tokenizer.eos_token]
        if not spare:
            raise UserError(
                "no token to pad with beside the end token", where="model.base", fix=f"add one of {PAD_CANDIDATES}"
            )
        tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "left"
    return tokenizer


def user(text: str, system: str = "") -> list[dict[str, str]]:
    """Messages of a single question, with a system prompt if one is given."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Tokens up to where the assistant begins to speak; what is said in a message stays text, whatever it looks like.

    Raises:
        UserError: the tokenizer has no tokens for a character.
    """
    written = [message["content"] for message in messages]
    return _ids(tokenizer, messages, written, add_generation_prompt=True)


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a whole answer, its end token included."""
    assert tokenizer.eos_token_id is not None
    return [*text_ids(tokenizer, text.strip()), tokenizer.eos_token_id]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text without a template, as :func:`prompt_ids` has them within one.

    Raises:
        UserError: the tokenizer has no tokens for a character.
    """
    return _ids(tokenizer, [{"role": "user", "content": text}], [text], chat_template=BARE)


def _ids(tokenizer: PreTrainedTokenizerBase, messages: Any, written: list[str], **options: Any) -> list[int]:
    """Where a text spells a control token (``<|im_end|>``), its pieces are encoded apart; any other goes through whole."""
    for text in written:
        _require_tokens(tokenizer, text)
    if any(map(_control(tokenizer).search, written)):
        try:
            found: Any = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=True, **options)
        except ValueError as error:
            raise UserError(
                str(error), where="model.base", fix="use a tokenizer whose control tokens no text gives"
            ) from error
        return found["input_ids"]
    whole: Any = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=8)
def _control(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What the tokenizer would take for more than text."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _require_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """SmolLM2 has no tokens for six control characters and for characters beyond U+40000, and would drop them in silence."""
    lost = sorted(c for c in set(text) if not _has_tokens(tokenizer, c))
    if lost:
        begins = " ".join(text.split())[:60]
        what = f"the tokenizer has no tokens for {', '.join(f'U+{ord(c):04X}' for c in lost[:5])}"
        raise UserError(what, where=f"the text that begins {begins!r}", fix="take them out of the text")


@functools.lru_cache(maxsize=2**16)
def _has_tokens(tokenizer: PreTrainedTokenizerBase, character: str) -> bool:
    if character in " \t\r\n":
        return True
    if "\ud800" <= character <= "\udfff":
        return False
    ids = tokenizer(character, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    known = bool(ids) and tokenizer.unk_token_id not in ids
    return known and ("\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(ids) or character == "\N{REPLACEMENT CHARACTER}")


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """A conversation that ends with the assistant: its tokens, and which of them are the words of its last turn."""
    prompt, answer = prompt_ids(tokenizer, messages[:-1]), answer_ids(tokenizer, messages[-1]["content"])
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The words of an answer, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
