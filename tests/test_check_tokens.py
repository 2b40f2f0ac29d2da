"""Mistakes that only the tokenizer shows: control tokens, templates, masks, rows too long; each planted alone."""

import json

import pytest
from check_lab import Planted, assert_found, demonstration, facts, find, ids, pair, rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from truthward import chat
from truthward.check.facts import KNOWN

PLAIN = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

pytestmark = pytest.mark.usefixtures("at_root")


def base(*special: str, template: str | None = None, eos: str = "<|im_end|>", normalizer=None, vocabulary: int = 259):
    """A change that names a folder with a byte tokenizer of our making and a configuration."""

    def change(folder):
        tokens = special or ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        words = {t: i for i, t in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        inner = Tokenizer(models.BPE(vocab=words, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        if normalizer:
            inner.normalizer = normalizer
        inner.add_special_tokens(list(tokens))
        made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, chat_template=template)
        made.save_pretrained(folder / "base")
        config = {**KNOWN["tiny-random"], "vocab_size": vocabulary}
        (folder / "base" / "config.json").write_text(json.dumps(config))
        return [f"model.base={folder / 'base'}"]

    return change


MARKS = ("<s>", "</s>", "<pad>")
FRIENDLY = PLAIN.replace("{% for", "<s>system\nYou are a helpful, harmless and honest assistant.</s>{% for", 1)
SPACED = PLAIN.replace("{{ m['content'] }}", "{{ ' ' + m['content'] if m['role'] == 'assistant' else m['content'] }}")
PLANTED = [
    Planted("tokenizer-absent", "note", "model.base", "Llama-3.1", ["model.base=meta-llama/Llama-3.1-8B-Instruct"], "tiny"),
    Planted("tokenizer-unfit", "error", "model.base", "no chat template", base("<s>", "</s>", eos="</s>"), "tiny"),
    Planted("tokenizer-unfit", "error", "model.base", "pad with", base("<s>", "</s>", eos="</s>", template=PLAIN), "tiny"),
    Planted(
        "control-token",
        "error",
        "TMP/planted.jsonl: x",
        "<|im_end|>",
        rows("sft.data", [demonstration("Why?", "So.<|im_end|> And so.")]),
        "tiny",
    ),
    Planted(
        "control-token",
        "error",
        "TMP/planted.jsonl",
        "<|endoftext|>",
        rows("ppo.prompts", [{"id": "x", "prompt": "<|endoftext|>"}]),
        "tiny",
    ),
    Planted("vocabulary-small", "error", "model.base", "200 embeddings", base(vocabulary=200), "tiny"),
    Planted(
        "text-lossy",
        "error",
        "data/demonstrations.jsonl: demo-001",
        "change on the way",
        base(normalizer=normalizers.Lowercase()),
        "tiny",
    ),
    Planted("template-adds", "warning", "model.base", "helpful", base(*MARKS, eos="</s>", template=FRIENDLY), "tiny"),
    Planted("template-end", "error", "model.base", "</s>", base(*MARKS, "<end>", eos="<end>", template=PLAIN), "tiny"),
    Planted("template-differs", "warning", "model.base", "other tokens", base(*MARKS, eos="</s>", template=SPACED), "tiny"),
    Planted(
        "mask-empty", "error", "TMP/planted.jsonl: x", "no word", rows("sft.data", [demonstration("Why?", " ")]), "tiny"
    ),
    Planted(
        "mask-thin", "warning", "sft.data", "learned from", rows("sft.data", [demonstration("Why? " * 100, "So.")]), "tiny"
    ),
    Planted("row-long", "error", "sft.max_length", "longer than 64", ["sft.max_length=64"], "tiny"),
    Planted("row-long", "error", "reward.max_length", "never end", ["reward.max_length=64"], "tiny"),
    Planted("row-long", "error", "dpo.max_length", "raise dpo.max_length to", ["dpo.max_length=128"], "tiny"),
    Planted("prompt-long", "error", "ppo.max_prompt_tokens", "prompts are longer", ["ppo.max_prompt_tokens=32"], "tiny"),
    Planted("length-beyond", "error", "sft.max_length", "2048 positions", ["sft.max_length=4096"], "tiny"),
    Planted("length-beyond", "error", "ppo.max_new_tokens", "2048 positions", ["ppo.max_new_tokens=1500"], "tiny"),
]


@pytest.mark.parametrize("planted", PLANTED, ids=ids(PLANTED))
def test_a_planted_mistake_is_found(planted, tmp_path):
    assert_found(planted, tmp_path)


def test_an_end_token_that_is_no_label_is_found(monkeypatch):
    whole = chat.encode

    def without_end(tokenizer, messages):
        ids, mask = whole(tokenizer, messages)
        return ids, [*mask[:-1], False]

    assert find("end-unlabelled", facts("tiny", [])) == []
    monkeypatch.setattr(chat, "encode", without_end)
    (finding,) = find("end-unlabelled", facts("tiny", []))
    assert (finding.level, finding.where) == ("error", "sft.data")
    assert "438 of 438 answers" in finding.what


def test_packing_that_drops_labels_is_found(monkeypatch):
    import trl.data_utils

    whole = trl.data_utils.pack_dataset
    assert find("packing-loses", facts("tiny", [])) == []
    monkeypatch.setattr(trl.data_utils, "pack_dataset", lambda rows, *rest: whole(rows.select(range(300)), *rest))
    (finding,) = find("packing-loses", facts("tiny", []))
    assert (finding.level, finding.where) == ("error", "sft.packing")
    assert "300 of 438 ends" in finding.what


def test_lengths_are_those_that_the_stages_count(tiny):
    subject = facts("tiny", [])
    row = subject.texts["sft"][0]
    encoded, _ = chat.encode(tiny[1], [*row.messages, {"role": "assistant", "content": row.answers[0]}])
    assert subject.tokens("sft")[0] == len(encoded)
    prompt, answers = subject.lengths_of("dpo")[0]
    assert prompt == len(chat.prompt_ids(tiny[1], subject.texts["dpo"][0].messages))
    assert answers == [len(chat.answer_ids(tiny[1], text)) for text in subject.texts["dpo"][0].answers]


def test_a_pair_of_which_one_answer_is_a_control_token_is_found_before_the_reward_stage_meets_it(tmp_path):
    change = rows("reward.preferences", [pair("Why?", "So.", "<|endoftext|>")])(tmp_path)
    assert "control token" in find("control-token", facts("tiny", change))[0].what
