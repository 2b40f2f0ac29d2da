"""Mistakes in the data, each planted in a file of its own."""

import json
import random
import time

import pytest
from check_lab import Planted, assert_found, demonstration, facts, ids, pair, rows
from lab import ROOT, write

from truthward.check.facts import packed
from truthward.check.rows import NEAR, twins, words

TEST_ROW = json.loads((ROOT / "data/truth/test/space-astronomy.jsonl").read_text().splitlines()[0])
TESTED, TWIN = TEST_ROW["question"], f"So {TEST_ROW['question'].lower().rstrip('?')} !"
FIRST = "What is the capital of France?"
DEV_ROW = json.loads(next(iter(sorted((ROOT / "data/truth/dev").glob("*.jsonl")))).read_text().splitlines()[0])
SENTENCES = [
    f"Statement {n} is about {word} alone." for n, word in enumerate(["tea", "salt", "iron", "bees", "rain", "sand"] * 12)
]

pytestmark = pytest.mark.usefixtures("at_root")


def bank(folder, name, made):
    (folder / name).mkdir()
    write(folder / name / "planted.jsonl", made)
    return folder / name


def leaky_validation(folder):
    train = json.loads(next(iter(sorted((ROOT / "data/truth/train").glob("*.jsonl")))).read_text().splitlines()[0])
    return [f"reward.validation={bank(folder, 'dev', [train])}"]


def validation_of_the_test(folder):
    return [f"reward.validation={bank(folder, 'dev', [TEST_ROW])}", 'stages=["base","sft"]']


def leaky_split(folder):
    for name in ("dev", "test"):
        (folder / "evals" / "persona" / name).mkdir(parents=True)
        row = {
            "id": f"{name}-1",
            "topic": "x",
            "kind": "wit",
            "prompt": "Tell me of the old red barn",
            "better": "a",
            "worse": "b",
        }
        write(folder / "evals" / "persona" / name / "x.jsonl", [row])
    return [f"evals.banks={folder / 'evals'}", 'evals.sets=["persona"]']


def leaky_judge(folder):
    train = json.loads(next(iter(sorted((ROOT / "data/truth/train").glob("*.jsonl")))).read_text().splitlines()[0])
    row = {"id": "x", "principle": "facts-over-myths", "prompt": train["question"], "better": "So.", "worse": "Not so."}
    return rows("reward.principle_bank", [row])(folder)


def two_bad_files(folder):
    (folder / "a.jsonl").write_text('{"id": 3}\n')
    (folder / "b.jsonl").write_text("{\n")
    return [f'sft.data=["{folder / "a.jsonl"}"]', f"ppo.prompts={folder / 'b.jsonl'}"]


def preferences(made):
    def change(folder):
        write(folder / "planted.jsonl", made)
        return [f'dpo.preferences=["{folder / "planted.jsonl"}"]']

    return change


SOURCE = "TMP/planted.jsonl"
LONGER = [pair(s, f"{s} And that is all there is to it.", s) for s in SENTENCES]
PLANTED = [
    Planted("leak-exact", "error", "sft.data", "near-duplicates", rows("sft.data", [demonstration(TESTED, "No.")])),
    Planted("leak-near", "error", "sft.data", "near-duplicates", rows("sft.data", [demonstration(TWIN, "No.")])),
    Planted("leak-exact", "error", SOURCE, "memory", rows("ppo.prompts", [{"id": "x", "prompt": TESTED}])),
    Planted("leak-near", "error", SOURCE, "memory", preferences([pair(TWIN, "a", "b")])),
    Planted("leak-exact", "error", SOURCE, FIRST, rows("ppo.prompts", [{"id": "x", "prompt": FIRST}])),
    Planted("leak-near", "error", "sft.data", FIRST, rows("sft.data", [demonstration(f"So, {FIRST.lower()}", "Paris.")])),
    Planted("leak-validation", "error", "reward.validation", "1 of 1", leaky_validation),
    Planted("leak-splits", "warning", "data/truth/test", "tuned", validation_of_the_test),
    Planted("leak-splits", "warning", "TMP/evals/persona/test", "barn", leaky_split),
    Planted("leak-judge", "warning", "reward.principle_bank", "1 of its prompts", leaky_judge),
    Planted("data-unreadable", "error", "TMP/a.jsonl:1", "id", two_bad_files),
    Planted("data-unreadable", "error", "TMP/b.jsonl:1", "JSON", two_bad_files),
    Planted("data-unreadable", "error", "nowhere.jsonl", "no such file", ["evals.first_questions=nowhere.jsonl"]),
    Planted("rows-twice", "warning", SOURCE, "1 of 2", rows("sft.data", [demonstration("Why?", "So.", n) for n in "ab"])),
    Planted("ids-twice", "warning", "sft.data", "x", rows("sft.data", [demonstration(q, "So.") for q in ("Why?", "How?")])),
    Planted("answer-blank", "error", SOURCE, "blank", rows("sft.data", [demonstration("Why?", " \n")])),
    Planted("pair-equal", "error", SOURCE, "same answer", preferences([pair("Why?", "So.", "So. ")])),
    Planted("pair-blank", "error", SOURCE, "without words", preferences([pair("Why?", "So.", " ")])),
    Planted(
        "pair-contradicts", "error", SOURCE, "both orders", preferences([pair("Why?", "a", "b"), pair("Why?", "b", "a")])
    ),
    Planted("pairs-twice", "warning", SOURCE, "1 of 2", preferences([pair("Why?", "a", "b")] * 2)),
    Planted("labels-flat", "warning", SOURCE, "0.55", preferences([pair("Why?", "a", "b", probability=0.5)])),
    Planted("length-bias", "warning", SOURCE, "longer answer is the chosen one in 100%", preferences(LONGER)),
    Planted(
        "text-broken",
        "warning",
        SOURCE,
        "encoding",
        rows("sft.data", [demonstration("Why?", "It’s so.".encode().decode("cp1252"))]),
    ),
]


@pytest.mark.parametrize("planted", PLANTED, ids=ids(PLANTED))
def test_planted_data_are_found(planted, tmp_path):
    assert_found(planted, tmp_path)


def test_all_faults_of_the_data_are_told_at_once(tmp_path):
    subject = facts("laptop", two_bad_files(tmp_path))
    subject.read_all()
    assert {fault.where for fault in subject.faults} >= {f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"}


def test_each_file_is_parsed_once(monkeypatch):
    seen = []
    from truthward.check import facts as module

    def read(path, kind):
        seen.append((str(path), kind))
        return real(path, kind)

    real = module.read_rows
    monkeypatch.setattr(module, "read_rows", read)
    subject = facts("laptop", [])
    subject.read_all()
    subject.read_all()
    _ = subject.texts
    assert len(seen) == len(set(seen)) >= 12


# --------------------------------------------------------------------------------------------------------------- twins


def slow_twins(a, b):
    return {
        (i, k) for i, s in enumerate(map(words, a)) for k, t in enumerate(map(words, b)) if len(s & t) > NEAR * len(s | t)
    }


def test_twins_are_those_of_the_plain_comparison_of_all_with_all():
    draw = random.Random(0)
    vocabulary = [f"w{n}" for n in range(40)]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 12))) for _ in range(300)]
    changed = [" ".join(t.split()[: draw.randint(1, 12)]) for t in texts]
    found = {(t.a, t.b) for t in twins(texts, changed)}
    assert found == slow_twins(texts, changed)
    assert len(found) > 100


def test_ten_thousand_rows_are_compared_with_two_thousand_in_seconds():
    draw = random.Random(0)
    vocabulary = [f"word{n}" for n in range(5000)]
    many = [" ".join(draw.choices(vocabulary, k=12)) for _ in range(10_000)]
    begun = time.monotonic()
    assert [(t.a, t.b, t.exact) for t in twins(many, [*many[:1], "nothing of it"])] == [(0, 0, True)]
    twins(many, many[:2000])
    assert time.monotonic() - begun < 20


def test_texts_in_other_scripts_are_compared_too():
    assert len(twins(["Ist Öl schwerer als Wasser?"], ["ist öl schwerer als wasser"])) == 1
    assert len(twins(["水は油より重いですか"], ["水は油より重いですか"])) == 1


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("room", [64, 100, 512])
def test_packing_makes_as_many_sequences_as_trl_does(room):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    draw = random.Random(room)
    lengths = [draw.randint(1, 90) for _ in range(200)]
    theirs = pack_dataset(Dataset.from_list([{"input_ids": [1] * n} for n in lengths]), room, "bfd")
    assert packed(lengths, room) == len(theirs)
