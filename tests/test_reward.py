"""The preference model: one score at the end token, however a row is padded and whoever computes it; TRL's loss at p = 1."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import RewardConfig, RewardTrainer

from reward.__main__ import head_of, score_pairs, sequence_classifier, to_ids
from reward.trainer import PairCollator, SoftRewardTrainer
from rl.actor_critic import ActorCritic
from truthward import models
from truthward.errors import UserError
from truthward.ledger import Run, plan
from truthward.models import lora_config
from truthward.recipe import Launch, Reward
from truthward.records import Preference, Question, read_rows, truth_preferences
from truthward.tensors import pad
from truthward.trainers import trainer_arguments

LENGTHS = [(9, 4), (5, 17), (12, 12), (3, 30)]
LABELS = [1.0, 0.8, 0.6, 0.95]


def pairs() -> list[dict]:
    generator = torch.Generator().manual_seed(9)

    def draw(n: int) -> list[int]:
        return [*torch.randint(3, 259, (n - 1,), generator=generator).tolist(), 2]

    rows = zip(LENGTHS, LABELS, strict=True)
    return [{"chosen_ids": draw(a), "rejected_ids": draw(b), "probability": p} for (a, b), p in rows]


@pytest.fixture(scope="module")
def classifier(sharp):
    """A fresh sequence classifier with a head large enough for margins that matter."""
    model = sequence_classifier(copy.deepcopy(sharp[0]), seed=0)
    model.config.pad_token_id = 0
    model.score.weight.data.mul_(3)
    return model.eval().requires_grad_(False)


def scores_alone(classifier, rows: list[list[int]]) -> list[float]:
    """The head on the decoder's state at the last token, row by row, without padding."""
    states = [classifier.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
    return [(state.double() @ classifier.score.weight[0].double()).item() for state in states]


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_score_is_read_at_the_end_token_whatever_the_padding(classifier, batch):
    """Row 43: rows of 3 to 30 tokens in batches of any size, given back in order."""
    rows = pairs()
    got = score_pairs(classifier, rows, pad_id=0, batch=batch)
    for side, column in zip(("chosen_ids", "rejected_ids"), zip(*got, strict=True), strict=True):
        assert column == pytest.approx(scores_alone(classifier, [r[side] for r in rows]), abs=1e-4)


def test_more_padding_changes_no_score(classifier):
    rows = [r["chosen_ids"] for r in pairs()]
    for length in (0, 40):
        ids, mask = pad(rows, 0, length=length)
        got = classifier(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        assert got.tolist() == pytest.approx(scores_alone(classifier, rows), abs=1e-4)


def test_the_fresh_head_is_seeded_and_of_the_right_size(sharp):
    """Row 27: N(0, 1/(d+1)): 48 weights with standard deviation 1/7."""
    heads = [sequence_classifier(copy.deepcopy(sharp[0]), seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / 7, rel=0.3)


def test_the_collator_stacks_chosen_over_rejected():
    rows = [
        {"chosen_ids": [5, 6, 7], "rejected_ids": [8], "probability": 0.7},
        {"chosen_ids": [9], "rejected_ids": [4, 4], "probability": 1.0},
    ]
    batch = PairCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0], [8, 0, 0], [4, 4, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]]
    torch.testing.assert_close(batch["probability"], torch.tensor([0.7, 1.0]))


def test_a_pad_token_in_the_text_is_refused(tiny):
    """It would move the place where Hugging Face's classifier reads the score."""
    with pytest.raises(UserError, match="endoftext"):
        to_ids(tiny[1], Preference(prompt="?", chosen="a <|endoftext|>", rejected="b"))


# ------------------------------------------------------------------------------------------------- the loss on TRL


def build(classifier, tokenizer, tmp_path, rows, *, micro=4, lora=False, **options) -> SoftRewardTrainer:
    table = Reward(batch_size=4, micro_batch_size=micro, center_coef=0.05)
    arguments = trainer_arguments(table, Launch(), Run(tmp_path), seed=0)
    arguments |= {"max_grad_norm": 1e9, "learning_rate": 0.1, "warmup_steps": 0, "save_strategy": "no", "optim": "sgd"}
    torch.manual_seed(0)
    trainer = SoftRewardTrainer(
        model=copy.deepcopy(classifier).requires_grad_(True),
        args=RewardConfig(**arguments | options, center_rewards_coefficient=table.center_coef),
        data_collator=PairCollator(0),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(4, 8, "SEQ_CLS") if lora else None,
    )
    trainer.model.train()
    return trainer


def test_at_a_label_of_one_the_loss_is_trls(classifier, sharp, tmp_path):
    """Our compute_loss against RewardTrainer's own on the same batch, centring included."""
    rows = [{**r, "probability": 1.0} for r in pairs()]
    trainer = build(classifier, sharp[1], tmp_path, rows)
    batch = PairCollator(0)(rows)
    theirs = RewardTrainer.compute_loss(trainer, trainer.model, {k: v for k, v in batch.items() if k != "probability"})
    ours = trainer.compute_loss(trainer.model, batch)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_with_soft_labels_the_loss_is_the_formula(classifier, sharp, tmp_path):
    """mean of -(p ln s(d) + (1-p) ln s(-d)) + c (r_w + r_l)^2, by a loop over scores computed row by row."""
    rows = pairs()
    chosen, rejected = (scores_alone(classifier, [r[side] for r in rows]) for side in ("chosen_ids", "rejected_ids"))
    expected = 0.0
    for w, loser, p in zip(chosen, rejected, LABELS, strict=True):
        d = w - loser
        expected += p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)) + 0.05 * (w + loser) ** 2
    trainer = build(classifier, sharp[1], tmp_path, rows)
    assert trainer.compute_loss(trainer.model, PairCollator(0)(rows)).item() == pytest.approx(expected / 4, abs=1e-5)
    accuracy = sum(w > loser for w, loser in zip(chosen, rejected, strict=True)) / 4
    assert 0 < accuracy < 1
    assert trainer._metrics["train"]["accuracy"] == [pytest.approx(accuracy)]


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_does_not_depend_on_accumulation(classifier, sharp, tmp_path, micro):
    """Row 28: 4 x 1 = 2 x 2 = 1 x 4 pairs."""
    logs = {}
    for size in (micro, 4):
        trainer = build(classifier, sharp[1], tmp_path / str(size), pairs(), micro=size)
        trainer.train()
        logs[size] = trainer.state.log_history[0]["grad_norm"]
    assert logs[micro] == pytest.approx(logs[4], rel=1e-4)


def test_a_pair_in_a_smaller_last_micro_batch_does_not_count_for_more(classifier, sharp, tmp_path):
    """Of three pairs in micro-batches of two, the step is the mean over some two; a third alone would count double."""
    trainer = build(classifier, sharp[1], tmp_path, pairs()[:3], micro=2)
    trainer.train()
    batches = [[pairs()[i] for i in range(3) if i != left_out] for left_out in range(3)]
    norms = []
    for batch in batches:
        fresh = build(classifier, sharp[1], tmp_path, batch, micro=2)
        fresh.compute_loss(fresh.model, PairCollator(0)(batch)).backward()
        norms.append(torch.cat([p.grad.flatten() for p in fresh.model.parameters() if p.grad is not None]).norm().item())
    assert any(trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4) for norm in norms)


def test_under_lora_the_head_is_trained_and_found(classifier, sharp, tmp_path):
    """The head belongs to the modules that are saved whole; a frozen random head would learn nothing."""
    trainer = build(classifier, sharp[1], tmp_path, pairs(), lora=True)
    before = head_of(trainer.model).clone()
    torch.testing.assert_close(before, classifier.score.weight)
    trainer.train()
    assert not torch.equal(head_of(trainer.model), before)


# ---------------------------------------------------------------------------------------------------- in the pipeline


@pytest.fixture(scope="module")
def reward_run(lab):
    return Run.load(plan(lab.recipe())["reward"].path)


@pytest.fixture(scope="module")
def saved(reward_run):
    """The trained preference model as Hugging Face and peft load it."""
    plain = sequence_classifier(models.load(reward_run.parent("model")), seed=9)
    model = PeftModel.from_pretrained(plain, str(reward_run.model_dir)).eval()
    torch.testing.assert_close(head_of(model), models.load_head(reward_run.model_dir)["weight"])
    return model


@pytest.mark.parametrize("side", ["right", "left", "prompt | answer"])
def test_ppo_scores_as_the_classifier_does(reward_run, saved, side):
    """Row 43: ActorCritic("reward"), by mask and positions, equals the classifier on the row alone, for any padding."""
    base = models.load(reward_run.parent("model"))
    actor_critic = ActorCritic(base, reward_run.model_dir, None, rank=2, alpha=4, temperature=1.0)
    rows = [r["chosen_ids"] for r in pairs()] + [r["rejected_ids"] for r in pairs()]
    if side == "prompt | answer":
        parts = pad([r[:2] for r in rows], 0, "left", length=5), pad([r[2:] for r in rows], 0, length=33)
        ids, mask = (torch.cat(both, 1) for both in zip(*parts, strict=True))
    else:
        ids, mask = pad(rows, 0, side, length=35)
    with torch.no_grad():
        got = actor_critic("reward", ids, mask, 1).tolist()
        expected = [saved(input_ids=torch.tensor([r])).logits.item() for r in rows]
    assert got == pytest.approx(expected, abs=1e-4)
    assert max(got) - min(got) > 0.1


def test_the_stage_records_the_accuracy_of_its_own_scores(lab, reward_run, saved):
    tokenizer = models.load_tokenizer(reward_run.parent("model"))
    bank = lab.recipe().reward.validation
    rows = [to_ids(tokenizer, p) for p in truth_preferences(read_rows(bank, Question), bank)]
    right = [chosen > rejected for chosen, rejected in score_pairs(saved, rows, tokenizer.pad_token_id)]
    accuracy = reward_run.manifest["metrics"]["validation_accuracy"]
    assert accuracy["mean"] == pytest.approx(sum(right) / len(right))
    assert accuracy["n"] == 6
