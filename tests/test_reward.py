"""The preference model: prompts as trees give TRL's loss and gradient, and what is written is an ordinary classifier."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward import __main__ as reward
from reward.__main__ import head_of, longest, position_scorer, refuse_pad, score_answers, sequence_classifier
from reward.trainer import SoftRewardTrainer, collate
from rl.actor_critic import ActorCritic
from truthward import models
from truthward.branches import Item, plant
from truthward.errors import UserError
from truthward.ledger import Run, plan
from truthward.models import lora_config
from truthward.records import Pair, Preference, Question, by_prompt, read_rows, truth_preferences
from truthward.tables import Launch, Reward
from truthward.tensors import pad
from truthward.trainers import to_row, trainer_arguments

PROMPTS = [  # lengths of prompt and answers; pairs of answers; how sure each pair is
    ((9, 4, 6), [[0, 1]], [1.0]),
    ((5, 17, 2, 3), [[0, 1], [0, 2], [2, 1]], [0.8, 0.95, 0.6]),
    ((12, 1, 8), [[1, 0]], [0.7]),
    ((3, 30, 7, 2, 5), [[0, 2], [1, 2], [0, 3], [1, 3]], [1.0, 1.0, 0.9, 0.5]),
]


def prompts(*, hard: bool = False) -> list[dict]:
    generator, rows = torch.Generator().manual_seed(9), []
    for lengths, pairs, labels in PROMPTS:
        prompt, *answers = (torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths)
        row = {"prompt_ids": prompt, "answer_ids": answers, "pairs": pairs}
        rows.append(row | {"probability": [1.0] * len(labels) if hard else labels})
    return rows


def flat(rows: list[dict]) -> list[list[int]]:
    """Every prompt with each of its answers as a row of its own."""
    return [row["prompt_ids"] + answer for row in rows for answer in row["answer_ids"]]


@pytest.fixture(scope="module")
def scorer(sharp):
    """A fresh scorer with a head large enough for margins that matter."""
    model = position_scorer(copy.deepcopy(sharp[0]), seed=0)
    model.config.pad_token_id = 0
    model.score.weight.data.mul_(3)
    return model.eval().requires_grad_(False)


def scores_alone(scorer, rows: list[list[int]]) -> list[float]:
    """The head on the decoder's state at the last token, row by row, without padding."""
    states = [scorer.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
    return [(state.double() @ scorer.score.weight[0].double()).item() for state in states]


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_score_is_that_of_the_answer_alone(scorer, batch):
    """Row 43: trees of two to four answers, any number in a row, given back in order."""
    got = score_answers(scorer, prompts(), batch=batch)
    assert [len(row) for row in got] == [2, 3, 2, 4]
    assert sum(got, []) == pytest.approx(scores_alone(scorer, flat(prompts())), abs=1e-4)


@pytest.mark.parametrize("length", [0, 60])
def test_the_sequence_classifier_gives_the_same_scores(scorer, length):
    """Row 43: padded rows, the score read at the last token that is not padding, as users will call it."""
    ids, mask = pad(flat(prompts()), 0, length=length)
    classifier = sequence_classifier(scorer)
    assert isinstance(classifier, LlamaForSequenceClassification)
    got = classifier(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
    assert got.tolist() == pytest.approx(sum(score_answers(scorer, prompts()), []), abs=1e-4)


def test_the_fresh_head_is_seeded_and_of_the_right_size(sharp):
    """Row 27: N(0, 1/(d+1)): 48 weights with standard deviation 1/7."""
    heads = [position_scorer(copy.deepcopy(sharp[0]), seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / 7, rel=0.3)


def test_the_collator_weighs_prompts_alike():
    """Two prompts, of one pair and of two: 1/2, and 1/4 each; scores are read at the ends 2, 3 and 5, 7, 8."""
    rows = [
        {"prompt_ids": [5, 6], "answer_ids": [[7], [8]], "pairs": [[0, 1]], "probability": [0.7]},
        {"prompt_ids": [9], "answer_ids": [[4], [3, 4], [6]], "pairs": [[0, 1], [2, 1]], "probability": [1.0, 0.9]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 4, 6]]
    assert batch["tip"].tolist() == [2, 3, 5, 7, 8]
    assert batch["pairs"].tolist() == [[0, 1], [2, 3], [4, 3]]
    torch.testing.assert_close(batch["probability"], torch.tensor([0.7, 1.0, 0.9]))
    torch.testing.assert_close(batch["weight"], torch.tensor([0.5, 0.25, 0.25]))


def test_a_row_is_as_long_as_the_prompt_with_its_longest_answer():
    assert longest({"prompt_ids": [1, 2, 3], "answer_ids": [[4], [5, 6], [7]]}) == 5


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_a_pad_token_in_the_text_is_refused(tiny, where):
    """It would move the place where Hugging Face's classifier reads the score."""
    texts = {"prompt": "?", "chosen": "a", "rejected": "b"}
    refuse_pad(tiny[1], [[Preference(**texts)]])
    with pytest.raises(UserError, match="endoftext"):
        refuse_pad(tiny[1], [[Preference(**texts), Preference(**texts | {where: "a <|endoftext|>"})]])


# ------------------------------------------------------------------------------------------------- the loss on TRL


def build(scorer, tokenizer, tmp_path, rows, *, micro=4, lora=False) -> SoftRewardTrainer:
    table = Reward(batch_size=4, micro_batch_size=micro, center_coef=0.05)
    arguments = trainer_arguments(table, Launch(), torch.float32, Run(tmp_path), seed=0)
    arguments |= {"max_grad_norm": 1e9, "learning_rate": 0.1, "warmup_steps": 0, "save_strategy": "no", "optim": "sgd"}
    torch.manual_seed(0)
    trainer = SoftRewardTrainer(
        model=copy.deepcopy(scorer).requires_grad_(True),
        args=RewardConfig(**arguments, center_rewards_coefficient=table.center_coef),
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(4, 8, "SEQ_CLS") if lora else None,
    )
    trainer.model.train()
    return trainer


def theirs(trainer: SoftRewardTrainer, row: dict) -> torch.Tensor:
    """TRL's own loss of one prompt's pairs, as padded rows through the sequence classifier."""
    sides = [[row["prompt_ids"] + row["answer_ids"][answer] for answer in pair] for pair in row["pairs"]]
    batch = DataCollatorForPreference(0)([{"chosen_ids": w, "rejected_ids": loser} for w, loser in sides])
    return RewardTrainer.compute_loss(trainer, sequence_classifier(trainer.model), batch)


def test_at_labels_of_one_loss_and_gradient_are_trls(scorer, sharp, tmp_path):
    """One row of trees against RewardTrainer on padded pairs, a prompt at a time, centring included."""
    rows = prompts(hard=True)
    trainer = build(scorer, sharp[1], tmp_path, rows)
    expected = sum(theirs(trainer, row) for row in rows) / len(rows)
    loss = trainer.compute_loss(trainer.model, collate(rows))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    parameters = list(trainer.model.parameters())
    ours, reference = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for got, wanted in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


def test_with_soft_labels_the_loss_is_the_formula(scorer, sharp, tmp_path):
    """Mean over prompts of the mean over pairs of -(p ln s(d) + (1-p) ln s(-d)) + c (r_w + r_l)^2, by a loop."""
    rows, expected, accuracy = prompts(), 0.0, 0.0
    for row in rows:
        scores = scores_alone(scorer, flat([row]))
        for (chosen, rejected), p in zip(row["pairs"], row["probability"], strict=True):
            w, loser = scores[chosen], scores[rejected]
            d, weight = w - loser, 1 / len(rows) / len(row["pairs"])
            cross_entropy = p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d))
            expected += weight * (cross_entropy + 0.05 * (w + loser) ** 2)
            accuracy += weight * (d > 0)
    trainer = build(scorer, sharp[1], tmp_path, rows)
    assert trainer.compute_loss(trainer.model, collate(rows)).item() == pytest.approx(expected, abs=1e-5)
    assert 0 < accuracy < 1
    assert trainer._metrics["train"]["accuracy"] == [pytest.approx(accuracy)]


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_does_not_depend_on_accumulation(scorer, sharp, tmp_path, micro):
    """Row 28: 4 x 1 = 2 x 2 = 1 x 4 prompts, of one to four pairs each."""
    logs = {}
    for size in (micro, 4):
        trainer = build(scorer, sharp[1], tmp_path / str(size), prompts(), micro=size)
        trainer.train()
        logs[size] = trainer.state.log_history[0]["grad_norm"]
    assert logs[micro] == pytest.approx(logs[4], rel=1e-4)


def test_a_prompt_in_a_smaller_last_micro_batch_does_not_count_for_more(scorer, sharp, tmp_path):
    """Of three prompts in micro-batches of two, the step is the mean over some two; a third alone would count double."""
    rows = prompts()[:3]
    trainer = build(scorer, sharp[1], tmp_path, rows, micro=2)
    trainer.train()
    norms = []
    for left_out in range(3):
        batch = [row for i, row in enumerate(rows) if i != left_out]
        fresh = build(scorer, sharp[1], tmp_path, batch, micro=2)
        fresh.compute_loss(fresh.model, collate(batch)).backward()
        norms.append(torch.cat([p.grad.flatten() for p in fresh.model.parameters() if p.grad is not None]).norm().item())
    assert any(trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4) for norm in norms)


def test_under_lora_the_head_is_trained_and_found(scorer, sharp, tmp_path):
    """The head belongs to the modules that are saved whole; a frozen random head would learn nothing."""
    trainer = build(scorer, sharp[1], tmp_path, prompts(), lora=True)
    before = head_of(trainer.model).clone()
    torch.testing.assert_close(before, scorer.score.weight)
    trainer.train()
    assert not torch.equal(head_of(trainer.model), before)


def test_what_is_written_is_an_ordinary_sequence_classifier(scorer, sharp, tmp_path):
    """Adapter or full weights, loaded as transformers and peft do for users: the trainer's own scores."""
    ids, mask = pad(flat(prompts()), 0)
    for lora in (True, False):
        trainer = build(scorer, sharp[1], tmp_path, prompts(), lora=lora)
        trainer.train()
        folder = tmp_path / f"lora {lora}"
        if lora:
            trainer.model.save_pretrained(folder)
            assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
            plain = sequence_classifier(copy.deepcopy(scorer))
            loaded = PeftModel.from_pretrained(plain, str(folder))
        else:
            sequence_classifier(trainer.model).save_pretrained(folder)
            loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        got = loaded.eval()(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        assert got.tolist() == pytest.approx(sum(score_answers(trainer.model, prompts()), []), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- in the pipeline


@pytest.fixture(scope="module")
def reward_run(lab):
    return Run.load(plan(lab.recipe())["reward"].path)


@pytest.fixture(scope="module")
def saved(reward_run):
    """The trained preference model as Hugging Face and peft load it."""
    plain = sequence_classifier(position_scorer(models.load(reward_run.parent("model")), seed=9))
    model = PeftModel.from_pretrained(plain, str(reward_run.model_dir)).eval()
    torch.testing.assert_close(head_of(model), models.load_head(reward_run.model_dir)["weight"])
    return model


def test_ppo_scores_as_the_classifier_does(reward_run, saved):
    """Row 43: ActorCritic("reward"), on rows of one to three trees, equals the classifier on each answer alone."""
    base = models.load(reward_run.parent("model"))
    settings = {"critic": False, "full": False, "rank": 2, "alpha": 4, "temperature": 1.0}
    actor_critic = ActorCritic(base, reward_run.model_dir, None, **settings)
    first, *others = [Item(row["prompt_ids"], row["answer_ids"]) for row in prompts()]
    with torch.no_grad():
        got = actor_critic("reward", plant([first, *others])).tolist()
        expected = [saved(input_ids=torch.tensor([ids])).logits.item() for ids in flat(prompts())]
    assert got == pytest.approx(expected, abs=1e-4)
    assert max(got) - min(got) > 0.1


def test_accuracy_by_principle_by_hand(sharp, monkeypatch):
    """Margins 2, -1 by a and 1, 0 by b: a half, three quarters, and 0.625 over both; two of three take the longer one."""
    pair = {"prompt": "q", "better": "long enough", "worse": "short"}
    labelled = {n: [Pair(id=f"{n}{i}", principle=n, **pair) for i in range(2)] for n in "ab"}
    scores = iter([[3.0, 1.0], [0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(reward, "score_answers", lambda model, rows, batch: [next(scores) for _ in rows])
    margins = reward.measure(None, sharp[1], labelled)
    assert [(m.id, m.margin) for m in margins] == [("a0", 2.0), ("a1", -1.0), ("b0", 1.0), ("b1", 0.0)]
    found = reward.by_principle(margins, [*labelled["a"], *labelled["b"]], 200, 0)
    assert {n: (f["mean"], f["n"]) for n, f in found["principles"].items()} == {"a": (0.5, 2), "b": (0.75, 2)}
    assert found["principle_accuracy"]["mean"] == 0.625
    assert found["longer"]["mean"] == pytest.approx(2 / 3)
    p = [1 / (1 + math.exp(-m)) for m in (2, -1, 1, 0)]
    assert found["calibration"]["brier"] == pytest.approx(sum((1 - v) ** 2 for v in p) / 4)


@torch.no_grad()
def test_the_stage_records_the_accuracy_of_its_own_scores(lab, reward_run, saved):
    tokenizer = models.load_tokenizer(reward_run.parent("model"))
    bank = lab.recipe().reward.validation
    rows = [to_row(tokenizer, group) for group in by_prompt(truth_preferences(read_rows(bank, Question), bank))]
    right = []
    for row in rows:
        scores = [saved(input_ids=torch.tensor([ids])).logits.item() for ids in flat([row])]
        right += [scores[chosen] > scores[rejected] for chosen, rejected in row["pairs"]]
    accuracy = reward_run.manifest["metrics"]["validation_accuracy"]
    assert accuracy["mean"] == pytest.approx(sum(right) / len(right))
    assert accuracy["n"] == 6
