"""Replay in the stages: the parent answers once, its answers are learned on or held to, and are on record."""

import json

import pytest
import torch

from truthward import chat, replay
from truthward.branches import Item, plant
from truthward.ledger import plan
from truthward.records import Prompt, read_rows
from truthward.score import answer_sums
from truthward.tracking import read_metrics


def words(lab, stage: str, **more) -> list[str]:
    table = {"replay": str(lab.home / "prompts.jsonl"), "replay_prompts": 4, "replay_tokens": 6, **more}
    return [f"{stage}.{key}={json.dumps(value)}" for key, value in table.items()]


def test_the_parent_answers_once_and_is_on_record(copy):
    """DPO replays what SFT says; a run that goes on reads what it wrote before."""
    bank = 'dpo.preferences=["' + str(copy.home / "bank") + '"]'
    dpo = copy.run("dpo", *words(copy, "dpo"), bank)
    rows = read_rows(dpo.path / "replay.jsonl", replay.Reply)
    assert len(rows) == 4
    assert {row.prompt for row in rows} <= {p.prompt for p in read_rows(copy.home / "prompts.jsonl", Prompt)}
    assert all(1 <= len(row.answer_ids) <= 6 for row in rows)
    assert {row.model for row in rows} == {dpo.parent("model").manifest["fingerprint"]}
    first, last = (read_metrics(dpo)[k]["replay/kl"] for k in (0, -1))
    assert first == pytest.approx(0, abs=1e-5)
    assert last > 1e-4
    written = (dpo.path / "replay.jsonl").stat().st_mtime_ns
    recipe = copy.recipe(*words(copy, "dpo"), bank)
    assert replay.replies(recipe, recipe.dpo, dpo, torch.float32) == rows
    assert (dpo.path / "replay.jsonl").stat().st_mtime_ns == written
    assert "replay/kl" not in read_metrics(copy.run("dpo", bank))[0]


def test_replay_holds_the_policy_to_its_parent(copy):
    """The same run with a heavy weight ends nearer to its parent, on the replayed answers, than with a light one."""
    bank = 'dpo.preferences=["' + str(copy.home / "bank") + '"]'
    ends = [read_metrics(copy.run("dpo", *words(copy, "dpo", replay_coef=c), bank))[-1]["replay/kl"] for c in (0.01, 30.0)]
    assert ends[1] < 0.8 * ends[0]


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


@pytest.mark.parametrize("trained", [False, True])
def test_anchors_are_what_the_parent_says(sharp, trained):
    """Distributions from the kept states are those of plain forward passes; a head that will be trained is copied."""
    model, tokenizer = sharp
    texts = ["Hm.", "So it is, I think.", "No"]
    rows = [
        replay.Reply(prompt_id=str(n), prompt="Why?", answer=t, answer_ids=chat.answer_ids(tokenizer, t), seed=0, model="")
        for n, t in enumerate(texts)
    ]
    found = replay.anchored(rows, model, tokenizer, head_is_trained=trained)
    anchor = found.anchor([2, 0])
    shares = (anchor.states_MH @ anchor.weight_VH.T).log_softmax(-1)
    targets = torch.tensor([*rows[2].answer_ids, *rows[0].answer_ids])
    sums = shares.gather(1, targets.unsqueeze(1)).squeeze(1).split([len(rows[2].answer_ids), len(rows[0].answer_ids)])
    expected = [values[0] for values in answer_sums(model, [found.items[2], found.items[0]])]
    assert [part.sum().item() for part in sums] == pytest.approx(expected, abs=1e-3)
    assert (anchor.weight_VH.data_ptr() == model.get_output_embeddings().weight.data_ptr()) is not trained


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
