"""Rules that need the tokenizer: control tokens in texts, the template's round trip, masks and end tokens, rows too long."""

from __future__ import annotations

from typing import Any

from truthward import chat
from truthward.check.facts import Facts
from truthward.check.findings import Found, as_finding, error, note, rule, warning
from truthward.records import Prompt

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
SAMPLE = 200  # rows that are rendered and compared; a template is the same for all
MARK = "Zebra quartz 7"  # no template writes this by itself


def _all_texts(facts: Facts) -> list[tuple[str, str]]:
    found = [(row.where, m["content"]) for rows in facts.texts.values() for row in rows for m in row.messages]
    found += [(row.where, answer) for rows in facts.texts.values() for row in rows for answer in row.answers]
    for stage, table in facts.uses("constitution", "ppo"):
        paths = table.prompts if stage == "constitution" else [table.prompts]
        found += [(path, p.prompt) for path in paths for p in facts.rows(path, Prompt)]
    return list(dict.fromkeys(found))


@rule("tokenizer-unfit", "tokenizer-absent")
def absent(facts: Facts) -> Found:
    """Whether the tokenizer can be asked at all."""
    if facts.tokenizer is None and facts.unfit:
        yield as_finding("tokenizer-unfit", facts.unfit)
    elif facts.tokenizer is None and facts.planned:
        text = f"the tokenizer of {facts.recipe.model.base} is not on this machine yet"
        why = "template, masks and lengths were judged by rules of thumb"
        fix = "after the stage base they are judged by the tokenizer itself"
        yield note("tokenizer-absent", "model.base", text, why=why, fix=fix)


@rule("control-token")
def control_tokens(facts: Facts) -> Found:
    """The text of a control token inside a message: it would be read as the token itself."""
    special = set(CHATML) if facts.tokenizer is None else {*facts.tokenizer.all_special_tokens}
    found = [(where, token) for where, text in _all_texts(facts) for token in special if token in text]
    if found:
        where, token = found[0]
        text = f"{len(found)} texts hold a control token, the first {token}"
        why = "it would end a turn, start one or be taken for padding in the midst of a text"
        yield error("control-token", where, text, why=why, fix="take it out, or write it with a space inside")


@rule("text-lossy", "vocabulary-small")
def round_trip(facts: Facts) -> Found:
    """What comes back when texts are made tokens and tokens text."""
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return
    if facts.shape.vocabulary and len(tokenizer) > facts.shape.vocabulary:
        text = f"the tokenizer has {len(tokenizer)} tokens, the model {facts.shape.vocabulary} embeddings"
        fix = "give the tokenizer that belongs to the model"
        yield error("vocabulary-small", "model.base", text, why="training would stop at the first such token", fix=fix)
    texts = [(where, text.strip()) for where, text in _all_texts(facts)]
    lost = [(w, t, back) for w, t in texts if (back := chat.decode(tokenizer, chat.answer_ids(tokenizer, t))) != t]
    special = [*tokenizer.all_special_tokens]
    lost = [row for row in lost if not any(token in row[1] for token in special)]
    if lost:
        where, before, after = lost[0]
        at = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), min(len(before), len(after)))
        shown = (before[max(0, at - 20) : at + 20], after[max(0, at - 20) : at + 20])
        text = (
            f"{len(lost)} of {len(texts)} texts change on the way through the tokenizer, e.g. {shown[0]!r} to {shown[1]!r}"
        )
        tell = error if len(lost) > 0.01 * len(texts) else warning
        why = "the model can neither read nor write them as they stand"
        yield tell("text-lossy", where, text, why=why, fix="take another tokenizer, or normalise the texts yourself")


@rule("template-adds", "template-end", "template-differs")
def template(facts: Facts) -> Found:
    """What the chat template puts around a message."""
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return
    turns = chat.user(MARK)
    around = facts.render(turns).replace(MARK, " ")
    for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), "user", "assistant", "model", "system"):
        around = around.replace(token, " ")
    letters = "".join(c for c in around if c.isalpha())
    if len(letters) > 15:
        text = f"it adds words of its own to every prompt: {' '.join(around.split())[:80]!r}"
        why = "every stage and every user of the model sees a system prompt that nobody wrote"
        yield warning("template-adds", "model.base", text, why=why, fix="take the default system prompt out of the template")
    answered = [*turns, {"role": "assistant", "content": MARK}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    end = whole.rpartition(MARK)[2].strip()
    if not end.startswith(str(tokenizer.eos_token)):
        text = f"an answer ends with {end[:30]!r} in the template and with {tokenizer.eos_token!r} in training"
        why = "the model would learn another end than the one it was made with, and others would wait for"
        yield error("template-end", "model.base", text, why=why, fix="set the tokenizer's eos_token to the template's end")
    ids, _ = chat.encode(tokenizer, answered)
    rendered = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if rendered[: len(ids)] != ids and end.startswith(str(tokenizer.eos_token)):
        text = "a whole conversation, rendered at once, has other tokens than prompt and answer one after the other"
        why = "the model was made with one and is trained with the other"
        yield warning("template-differs", "model.base", text, why=why, fix="see what the template puts before an answer")


@rule("mask-empty", "mask-thin", "end-unlabelled", "packing-loses")
def masks(facts: Facts) -> Found:
    """Which tokens SFT learns from, before and after packing."""
    tokenizer = facts.tokenizer
    rows = facts.texts.get("sft", []) if tokenizer is not None else []
    if not rows:
        return
    encoded = [chat.encode(tokenizer, [*r.messages, {"role": "assistant", "content": r.answers[0]}]) for r in rows]
    labels = [[i for i, m in zip(ids, mask, strict=True) if m] for ids, mask in encoded]
    total, learnt = sum(len(ids) for ids, _ in encoded), sum(map(len, labels))
    empty = [row.where for row, some in zip(rows, labels, strict=True) if not set(some) - {tokenizer.eos_token_id}]
    if empty:
        text = f"{len(empty)} rows have no word to learn from"
        yield error("mask-empty", empty[0], text, why="their loss is 0 and says that all is well", fix="take them out")
    if learnt < 0.02 * total:
        text = f"{learnt} of {total} tokens are learned from"
        why = "nearly all of the time goes into tokens without a loss"
        yield warning("mask-thin", "sft.data", text, why=why, fix="shorten the prompts")
    ended = sum(some[-1:] == [tokenizer.eos_token_id] for some in labels)
    if ended < len(labels):
        text = f"{len(labels) - ended} of {len(labels)} answers have no end token to learn"
        yield error(
            "end-unlabelled", "sft.data", text, why="the model would not learn to stop", fix="see truthward.chat.encode"
        )
    if facts.recipe.sft.packing:
        yield from _packed(facts, encoded, learnt, ended)


def _packed(facts: Facts, encoded: list[tuple[list[int], list[bool]]], learnt: int, ended: int) -> Found:
    """The same counts after TRL's own packing, of those rows that fit."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    room = facts.recipe.sft.max_length
    if any(len(ids) > room for ids, _ in encoded):
        return  # found as row-long
    rows = [
        {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]} for ids, mask in encoded
    ]
    columns: Any = pack_dataset(Dataset.from_list(rows), room, "bfd")["labels"]
    after = [i for labels in columns for i in labels if i != -100]
    if (len(after), after.count(facts.tokenizer.eos_token_id)) != (learnt, ended):
        left = after.count(facts.tokenizer.eos_token_id)
        text = f"packing leaves {len(after)} of {learnt} labels, and {left} of {ended} ends"
        why = "what was cut is never learned, and nothing says so"
        fix = "set sft.packing = false, or install the version of TRL that constraints.txt names"
        yield error("packing-loses", "sft.packing", text, why=why, fix=fix)


@rule("row-long", "prompt-long", "length-beyond")
def long_rows(facts: Facts) -> Found:
    """Rows over the limits, and limits over the model's."""
    longest = {  # what each stage compares with its max_length
        "sft": lambda prompt, answers: prompt + sum(answers),
        "reward": lambda prompt, answers: prompt + max(answers),
        "dpo": lambda prompt, answers: prompt + sum(answers),
    }
    for stage, table in facts.uses("sft", "reward", "dpo"):
        counts = [longest[stage](*lengths) for lengths in facts.lengths_of(stage)]
        long = [n for n in counts if n > table.max_length]
        if long:
            rows, first = facts.texts[stage], counts.index(long[0])
            where = rows[first].where if first < len(rows) else f"{table.replay} with replay_tokens"
            share = f"{len(long)} of {len(counts)} rows ({len(long) / len(counts):.1%})"
            text = f"{share} are longer than {table.max_length} tokens (longest {max(long)}; the first is {where})"
            why = "cut, they would teach answers that never end; so the stage refuses them"
            fix = f"raise {stage}.max_length to {max(long)}, or shorten or drop these rows"
            yield error("row-long", f"{stage}.max_length", text, why=why, fix=fix)
        if stage != "dpo" and 0 < facts.shape.positions < table.max_length:  # positions count within a branch
            text = f"{table.max_length} tokens on a model that knows {facts.shape.positions} positions"
            yield error("length-beyond", f"{stage}.max_length", text, why="beyond them it is lost", fix="lower it")
    for _, table in facts.uses("ppo"):
        prompts = [p.prompt for p in facts.rows(table.prompts, Prompt)]
        counts = facts.lengths([facts.render(chat.user(text)) for text in prompts])
        if long := [n for n in counts if n > table.max_prompt_tokens]:
            text = f"{len(long)} of {len(counts)} prompts are longer than {table.max_prompt_tokens} tokens"
            text += f" (longest {max(long)})"
            fix = f"raise it to {max(long)}, or drop these prompts"
            yield error("prompt-long", "ppo.max_prompt_tokens", text, why="PPO would stop at the first", fix=fix)
        if 0 < facts.shape.positions < table.max_prompt_tokens + table.max_new_tokens:
            text = f"prompt and answer may have {table.max_prompt_tokens + table.max_new_tokens} tokens"
            text += f" on a model that knows {facts.shape.positions} positions"
            yield error(
                "length-beyond", "ppo.max_new_tokens", text, why="beyond them it is lost", fix="lower one of the two"
            )
