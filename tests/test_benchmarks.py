"""Readers of public benchmarks on small files of the same form, made here; and the harness's numbers on the same file."""

import csv
import importlib.util
import json
import sys
from types import SimpleNamespace

import commands
import numpy as np
import pytest

from evals import benchmarks, harness
from evals.suite import means, score_model
from truthward.errors import UserError
from truthward.tables import Evals

QUESTIONS = [  # made up for this test: question, best answer, another true one, false ones
    ("Do kettles sing?", "Kettles whistle.", "They whistle when hot.", ["Kettles sing.", "All do."]),
    ("What do moths eat?", "Their grubs eat wool.", "Wool, as grubs.", ["Moths eat lamps."]),
    ("Is rust iron?", "Rust is iron oxide.", "It holds iron.", ["Rust is paint.", "No, dirt."]),
]


@pytest.fixture
def mc_json(tmp_path):
    rows = []
    for question, best, true, false in QUESTIONS:
        one = {false[0]: 0, best: 1, **dict.fromkeys(false[1:], 0)}  # the right one need not stand first
        two = {best: 1, true: 1, **dict.fromkeys(false, 0)}
        rows.append({"question": question, "mc1_targets": one, "mc2_targets": two})
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    return tmp_path / "mc_task.json"


def test_truthfulqa_in_all_three_forms_reads_the_same(tmp_path, mc_json):
    from_json = benchmarks.read_truthfulqa(mc_json, "")
    with open(tmp_path / "TruthfulQA.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"])
        for question, best, true, false in QUESTIONS:
            writer.writerow(["A", "Things", question, best, f"{best}; {true}", "; ".join(false), "https://example.org"])
    from_csv = benchmarks.read_truthfulqa(tmp_path / "TruthfulQA.csv", "")
    hub = [
        {
            "question": row["question"],
            **{k: {"choices": list(row[k]), "labels": list(row[k].values())} for k in ("mc1_targets", "mc2_targets")},
        }
        for row in json.loads(mc_json.read_text())
    ]
    (tmp_path / "hub.jsonl").write_text("\n".join(map(json.dumps, hub)))
    from_hub = benchmarks.read_truthfulqa(tmp_path / "hub.jsonl", "")
    assert from_json == from_hub
    assert [(r.question, r.mc1, r.true, r.false) for r in from_csv] == [
        (r.question, r.mc1, r.true, r.false) for r in from_json
    ]
    assert from_json[0].mc1 == ["Kettles whistle.", "Kettles sing.", "All do."]
    assert from_csv[0].topic == "Things"


def bbq(condition: str, polarity: str, label: int) -> dict:
    info = {"ans0": ["the old man", "old"], "ans1": ["the young man", "nonOld"], "ans2": ["not known", "unknown"]}
    return {
        "example_id": 1, "question_polarity": polarity, "context_condition": condition, "category": "Age",
        "answer_info": info, "additional_metadata": {"stereotyped_groups": ["old"]}, "context": "Two men met.",
        "question": "Who forgot?", "ans0": "the old man", "ans1": "the young man", "ans2": "not known", "label": label,
    }  # fmt: skip


def test_bbq_is_graded_as_its_authors_do(tmp_path):
    """Negative and ambiguous: the old man is the biased answer. Not negative: the young one is."""
    rows = [bbq("ambig", "neg", 2), bbq("disambig", "nonneg", 0)]
    (tmp_path / "Age.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ambiguous, told = benchmarks.read_bbq(tmp_path, "")
    assert (ambiguous.biased, ambiguous.unknown, told.biased) == (0, 2, 1)
    grade = benchmarks.BBQ.grade
    assert grade(ambiguous, [[3.0, 1.0, 2.0]]) == {"open": 0.0, "told": None, "open_biased": 1.0, "told_biased": None}
    assert grade(ambiguous, [[1.0, 2.0, 3.0]]) == {"open": 1.0, "told": None, "open_biased": None, "told_biased": None}
    assert grade(told, [[3.0, 1.0, 2.0]]) == {"open": None, "told": 1.0, "open_biased": None, "told_biased": 0.0}


def test_bbq_bias_scores_by_hand():
    """Four ambiguous questions: one left open (right), three answered, two of these biased: (1 - 1/4) * (2 * 2/3 - 1)."""
    right, biased = np.array([1.0, 0.0, 0.0, 0.0]), np.array([np.nan, 1.0, 1.0, 0.0])
    assert benchmarks.bias_open(np.ones((1, 4)), right, biased)[0] == pytest.approx(0.25)
    assert benchmarks.bias_told(np.ones((1, 4)), biased)[0] == pytest.approx(1 / 3)


def test_hh_keeps_the_turns_before_the_last(tmp_path):
    start = "\n\nHuman: Hello?\n\nAssistant: Yes?\n\nHuman: How do I boil an egg?"
    row = {"chosen": f"{start}\n\nAssistant: Six minutes.", "rejected": f"{start}\n\nAssistant: Don't."}
    (tmp_path / "hh.jsonl").write_text(json.dumps(row))
    (dialogue,) = benchmarks.read_hh(tmp_path / "hh.jsonl", "")
    assert [t.role for t in dialogue.turns] == ["user", "assistant", "user"]
    assert (dialogue.chosen, dialogue.rejected) == ("Six minutes.", "Don't.")
    (asked,) = benchmarks.HH.ask(dialogue)
    assert asked.messages[-1] == {"role": "user", "content": "How do I boil an egg?"}
    assert benchmarks.HH.grade(dialogue, [[-12.0, -8.0]]) == {"whole": 0.0, "a_byte": 1.0}  # -12 over 12 bytes, -8 over 6


def test_model_written_files_are_read_by_topic(tmp_path):
    row = {"question": "Do you agree?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    (tmp_path / "agreeing.jsonl").write_text(json.dumps(row))
    (behaviour,) = benchmarks.read_model_written(tmp_path, "")
    assert (behaviour.topic, behaviour.matching, behaviour.other) == ("agreeing", "Yes", "No")
    assert benchmarks.MODEL_WRITTEN.grade(behaviour, [[0.0, 0.0]]) == {"shows": 0.5, "probability": 0.5}


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("truthfulqa", "a.json", '[{"question": "?"}]', "no mc1_targets"),
        ("truthfulqa", "a.csv", "Question,Best Answer\nx,y\n", "no column Correct Answers"),
        ("bbq", "a.jsonl", '{"context": "x"}', "question"),
        ("hh", "a.jsonl", '{"chosen": "Hello", "rejected": "Hello"}', "no dialogue"),
        ("model_written", "a.jsonl", '{"question": "x"}', "matching"),
        ("hh", "a.jsonl", "[1]", "not an object"),
        ("hh", "a.jsonl", "{", "not valid JSON"),
        ("hh", "a.jsonl", "", "no rows"),
    ],
)
def test_a_file_in_another_form_is_refused_with_its_line(tmp_path, name, file, text, said):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=said) as error:
        benchmarks.read({name: str(tmp_path / file)})
    assert file in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        benchmarks.read({name: str(tmp_path / "gone.jsonl")})


def test_what_needs_the_harness_says_so_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    for table in (Evals(lm_eval=["arc_easy"]), Evals(files={"ifeval": "x"})):
        with pytest.raises(UserError, match=r"not installed(.|\n)*pip install"):
            harness.require(table)
    harness.require(Evals(files={"bbq": "x"}))


def test_ifeval_answers_are_generated_and_checked_by_the_harness(tiny, tmp_path, monkeypatch):
    """With a stand-in for the harness's check: an answer follows what it is told when the instruction's name is in it."""

    def process_results(doc, answers):
        followed = [name in answers[0] for name in doc["instruction_id_list"]]
        everything = {"prompt_level_strict_acc": all(followed), "prompt_level_loose_acc": any(followed)}
        return {**everything, "inst_level_strict_acc": followed}

    utils = SimpleNamespace(process_results=process_results)
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", utils)
    row = {"key": 7, "prompt": "Say it.", "instruction_id_list": ["loud", "short"], "kwargs": [{}, {"words": 3}]}
    (tmp_path / "input_data.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    monkeypatch.setattr(harness, "answer_freely", lambda model, tokenizer, prompts, n: ["loud and clear"] * len(prompts))
    scored = harness.follow_instructions(*tiny, str(tmp_path / "input_data.jsonl"), 1, max_new_tokens=4)
    assert [s.values for s in scored] == [{"prompt": 0.0, "loose": 1.0, "instructions": 0.5}]
    row.pop("kwargs")
    (tmp_path / "input_data.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"input_data\.jsonl:1"):
        harness.follow_instructions(*tiny, str(tmp_path / "input_data.jsonl"), 0)


# ----------------------------------------------------------------------------------- lm-evaluation-harness, side by side

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{primer}Q: {{{{question}}}}\\nA:"
doc_to_target: 0
doc_to_choice: "{{{{{key}.choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_truthfulqa_equals_the_harness(sharp, tmp_path, mc_json):
    """The same file and model, by the harness's own task runner and its own function for MC2."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    model, tokenizer = sharp
    primer = "Q: Is tea wet?\nA: Yes.\n\n"
    (tmp_path / "primer.txt").write_text(primer)
    rows = benchmarks.read({"truthfulqa": str(mc_json)}, str(tmp_path / "primer.txt"))["truthfulqa"]
    scored = score_model(model, tokenizer, {"truthfulqa": rows}, benchmarks.EXAMS, 512)
    ours = means(scored, benchmarks.TRUTHFULQA, "truthfulqa")

    docs = [
        {
            "question": r.question,
            "mc1_targets": {"choices": r.mc1, "labels": [1] + [0] * (len(r.mc1) - 1)},
            "mc2_targets": {"choices": r.true + r.false, "labels": [1] * len(r.true) + [0] * len(r.false)},
        }
        for r in rows
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, key in (("tq_one", "mc1_targets"), ("tq_two", "mc2_targets")):
        text = TASK.format(name=name, key=key, file=tmp_path / "docs.jsonl", primer=primer.replace("\n", "\\n"))
        (tmp_path / f"{name}.yaml").write_text(text)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    manager = TaskManager(include_path=str(tmp_path))
    done = evaluator.simple_evaluate(model=lm, tasks=["tq_one", "tq_two"], task_manager=manager, bootstrap_iters=0)
    assert ours["truthfulqa.qa_mc1"] == pytest.approx(done["results"]["tq_one"]["acc,none"], abs=1e-3)
    theirs = [
        process_results_mc2(sample["doc"], [tuple(r) for r in sample["filtered_resps"]])["acc"]
        for sample in done["samples"]["tq_two"]
    ]
    assert ours["truthfulqa.qa_mc2"] == pytest.approx(sum(theirs) / len(theirs), abs=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_an_unknown_task_is_named(sharp):
    with pytest.raises(UserError, match="unknown task no_such_task"):
        harness.run_tasks(*sharp, ["no_such_task"])


def test_a_benchmark_is_scored_beside_the_sets(lab, tmp_path, mc_json):
    """Through the stage script; the file's content is part of the run's name."""
    world = lab.copy(tmp_path / "runs")
    files = f'evals.files={{truthfulqa="{mc_json}"}}'
    words = [str(world.home / "lab.toml"), files, f"runs={world.runs}", "--only", "evals-base"]
    done = commands.run("evals", *words, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "truthfulqa.mc1" in done.stdout
    (path,) = (p for p in world.runs.glob("lab/evals-*/evals.json"))
    assert json.loads(path.read_text())["about"]["truthfulqa.mc1"]["label"] == "TruthfulQA MC1, chat"
