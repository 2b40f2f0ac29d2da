"""Replay in the stages: the base answers once for all of them, its answers are learned on and are on record."""

import json

import pytest
import torch

from truthward import chat, models, replay
from truthward.branches import Item, plant
from truthward.ledger import KEPT, Run, plan
from truthward.records import Prompt, read_rows
from truthward.score import answer_sums
from truthward.tracking import read_metrics


def words(lab, stage: str, **more) -> list[str]:
    table = {"replay": str(lab.home / "prompts.jsonl"), "replay_prompts": 4, "replay_tokens": 6, **more}
    return [f"{stage}.{key}={json.dumps(value)}" for key, value in table.items()]


def test_the_base_answers_once_for_all_stages(copy):
    """Both stages learn on the same rows, which the base drew and the first stage kept; each run has a copy."""
    sft = copy.run("sft", *words(copy, "sft"))
    kept = list((copy.runs / "lab" / KEPT / "replies").glob("*.jsonl"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    dpo = copy.run("dpo", *words(copy, "dpo"), *words(copy, "sft"), 'dpo.preferences=["' + str(copy.home / "bank") + '"]')
    assert list((copy.runs / "lab" / KEPT / "replies").glob("*.jsonl")) == kept
    assert kept[0].stat().st_mtime_ns == before
    rows = [read_rows(run.path / "replay.jsonl", replay.Reply) for run in (sft, dpo)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    asked = {p.prompt for p in read_rows(copy.home / "prompts.jsonl", Prompt)}
    assert {row.prompt for row in rows[0]} <= asked
    assert all(1 <= len(row.answer_ids) <= 6 for row in rows[0])
    assert read_metrics(dpo)[0]["replay/kl"] >= 0
    assert "replay/kl" not in read_metrics(copy.run("dpo"))[0]


def test_sft_learns_on_the_replayed_answers(copy):
    plain, replayed = copy.run("sft"), copy.run("sft", *words(copy, "sft"))
    assert replayed.manifest["metrics"]["rows"] == plain.manifest["metrics"]["rows"] + 4
    assert replayed.path != plain.path


def test_other_prompts_are_another_run(copy):
    recipe = copy.recipe(*words(copy, "sft"))
    paths = {plan(recipe)["sft"].path}
    (copy.home / "more.jsonl").write_text('{"id": "x", "prompt": "What else?"}\n')
    paths.add(plan(copy.recipe(*words(copy, "sft", replay=str(copy.home / "more.jsonl"))))["sft"].path)
    paths.add(plan(copy.recipe())["sft"].path)
    assert len(paths) == 3


def test_anchors_are_what_the_base_says(copy):
    """Distributions from the kept states are those of plain forward passes; DPO's anchor is the base, not its parent."""
    sft = copy.run("sft")
    run = Run.load(plan(copy.recipe())["dpo"].path)
    base = Run.load(plan(copy.recipe())["base"].path)
    tokenizer = models.load_tokenizer(base)
    texts = ["Hm.", "So it is, I think.", "No"]
    rows = [
        replay.Reply(prompt_id=str(n), prompt="Why?", answer=t, answer_ids=chat.answer_ids(tokenizer, t), seed=0, model="")
        for n, t in enumerate(texts)
    ]
    found = replay.anchored(rows, run, torch.float32)
    anchor = found.anchor([2, 0])
    log_q = (anchor.states_MH @ anchor.weight_VH.T).log_softmax(-1)
    targets = torch.tensor([*rows[2].answer_ids, *rows[0].answer_ids])
    sums = log_q.gather(1, targets.unsqueeze(1)).squeeze(1).split([len(rows[2].answer_ids), len(rows[0].answer_ids)])
    for of, differs in ((base, False), (sft, True)):
        model = models.load(of)
        expected = answer_sums(model, [found.items[2], found.items[0]])
        same = [s.sum().item() == pytest.approx(e[0], abs=1e-3) for s, e in zip(sums, expected, strict=True)]
        assert all(same) is not differs


def test_states_do_not_depend_on_what_they_were_computed_with(sharp, monkeypatch):
    """One item a batch, or all in one."""
    items = [Item([5, 6, 7 + n], [[20 + n] * (n + 1)]) for n in range(5)]
    forest = plant(items)
    together = sharp[0].get_decoder()(**forest.inputs(torch.float32)).last_hidden_state[0, forest.source]
    monkeypatch.setattr(replay, "TOKENS", 1)
    assert [len(b) for b in replay._batches(items)] == [1] * 5
    alone = []
    for some in replay._batches(items):
        one = plant(some)
        alone.append(sharp[0].get_decoder()(**one.inputs(torch.float32)).last_hidden_state[0, one.source])
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=1e-4)
