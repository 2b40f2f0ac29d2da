"""The SFT loss is the plain cross-entropy over labelled tokens: packed or not, in one batch or accumulated."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from sft.trainer import IGNORE, LeanSftTrainer, require_labels
from truthward import head
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.models import lora_config
from truthward.tables import Launch, Sft
from truthward.trainers import trainer_arguments

LENGTHS = [(5, 3), (12, 1), (2, 9), (7, 6)]  # of prompt and answer
TOKENS = sum(answer for _, answer in LENGTHS)


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    drawn = [(p, torch.randint(3, 259, (p + a,), generator=generator).tolist()) for p, a in LENGTHS]
    return [{"input_ids": ids, "labels": [IGNORE] * p + ids[p:]} for p, ids in drawn]


def build(sharp, tmp_path, rows, *, packing=False, micro=4, batch=4, lora=True, launch=None, **options) -> LeanSftTrainer:
    """A trainer as the stage makes it, with SGD at rate 1: weights after a step are weights before less the gradient."""
    model, tokenizer = sharp
    table = Sft(batch_size=batch, micro_batch_size=micro, max_length=max(options.pop("max_length", 32), 8), packing=packing)
    arguments = trainer_arguments(table, launch or Launch(), torch.float32, Run(tmp_path), seed=0)
    arguments |= {"max_grad_norm": 1e9, "learning_rate": 1.0, "warmup_steps": 0, "save_strategy": "no", "optim": "sgd"}
    torch.manual_seed(0)
    return LeanSftTrainer(
        model=copy.deepcopy(model).requires_grad_(True),
        args=SFTConfig(**arguments | options, packing=packing, completion_only_loss=False, shuffle_dataset=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(4, 8) if lora else None,
    )


def plain_loss(model, rows) -> float:
    """-log p over every labelled token, by row and token, in float64."""
    total = []
    for row in rows:
        logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        total += [-logprobs[t - 1, label].item() for t, label in enumerate(row["labels"]) if label != IGNORE]
    assert len(total) == TOKENS
    return math.fsum(total) / len(total)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_mean_over_labelled_tokens(sharp, tmp_path, rows, packing):
    """Row 28: rows of 1, 3, 6 and 9 labels weigh by their tokens; packed rows do not see one another."""
    trainer = build(sharp, tmp_path, rows, packing=packing)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert ("position_ids" in batch) is packing
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(plain_loss(sharp[0], rows), abs=1e-5)


def test_the_loss_of_a_part_is_divided_by_the_count_of_the_whole_step(sharp, tmp_path, rows):
    """Row 28: the micro-batches' losses add up to the loss of the step."""
    trainer = build(sharp, tmp_path, rows)
    parts = [
        trainer.compute_loss(trainer.model, trainer.data_collator([row]), num_items_in_batch=torch.tensor(TOKENS))
        for row in trainer.train_dataset
    ]
    assert sum(p.item() for p in parts) == pytest.approx(plain_loss(sharp[0], rows), abs=1e-5)


def trained(trainer: LeanSftTrainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights after one step, and what was logged."""
    for callback in ("PrinterCallback", "ProgressCallback"):
        for held in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == callback]:
            trainer.remove_callback(held)
    trainer.train()
    assert trainer.state.global_step == 1
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}, trainer.state.log_history[0]


@pytest.fixture
def whole(sharp, tmp_path, rows):
    return trained(build(sharp, tmp_path / "whole", rows))


@pytest.mark.parametrize(
    ("shape", "sequences"),
    [
        ({"micro": 1}, 4),
        ({"micro": 2}, 4),
        ({"micro": 1, "batch": 1, "packing": True, "max_length": 45}, 1),
        ({"micro": 1, "batch": 2, "packing": True, "max_length": 24}, 2),
    ],
)
def test_a_step_does_not_depend_on_accumulation_or_packing(sharp, tmp_path, rows, whole, shape, sequences):
    """Row 28: the same loss, gradient norm and weights from 4 x 1, 2 x 2 and 1 x 4 rows and from packed sequences."""
    trainer = build(sharp, tmp_path, rows, **shape)
    assert len(trainer.train_dataset) == sequences
    weights, logged = trained(trainer)
    for name in ("loss", "grad_norm"):
        assert logged[name] == pytest.approx(whole[1][name], rel=1e-5)
    for name, expected in whole[0].items():
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=1e-5)


def test_layers_that_are_computed_again_give_the_same_step(sharp, tmp_path, rows, whole):
    """Gradient checkpointing: each layer runs in the forward and again in the backward pass, to the same weights."""
    trainer, calls = build(sharp, tmp_path, rows, launch=Launch(gradient_checkpointing=True)), []
    for layer in trainer.model.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    weights, logged = trained(trainer)
    assert len(calls) == 2 * len(trainer.model.get_base_model().model.layers)
    assert logged["grad_norm"] == pytest.approx(whole[1]["grad_norm"], rel=1e-6)
    for name, expected in whole[0].items():
        torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=1e-6)


def test_the_step_is_the_gradient_of_the_plain_loss(sharp, tmp_path, rows, whole):
    """The norm that is logged is that of the mean cross-entropy over the same tokens by an ordinary backward."""
    trainer = build(sharp, tmp_path, rows)
    total = torch.zeros(())
    for row in rows:
        logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (total / TOKENS).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert whole[1]["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2])
def test_token_accuracy_is_a_share_of_the_steps_labelled_tokens(sharp, tmp_path, rows, micro):
    """A row whose three labels are the model's own greedy words, and one of nine labels: not (1 + r/9) / 2 where apart."""
    model, _ = sharp
    first, third = rows[0], rows[2]
    for t in range(5, 8):
        logits = model(input_ids=torch.tensor([first["input_ids"][:t]])).logits[0, -1]
        first["input_ids"][t] = first["labels"][t] = logits.argmax().item()
    guessed = model(input_ids=torch.tensor([third["input_ids"]])).logits[0, :-1].argmax(-1)
    right = (guessed == torch.tensor(third["labels"])[1:]).sum().item()
    _, logged = trained(build(sharp, tmp_path, [first, third], batch=2, micro=micro))
    assert logged["token_accuracy"] == pytest.approx((3 + right) / 12)


# ------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_the_head_by_chunks_is_the_plain_head(monkeypatch, trained, chunk):
    """log softmax, and the gradients of a weighted sum by states, weight and bias, against torch's own."""
    monkeypatch.setattr(head, "HEAD_TOKENS", chunk)
    hidden, weight, bias, by = torch.randn(7, 5) * 2, torch.randn(11, 5), torch.randn(11), torch.randn(7)
    target = torch.randint(0, 11, (7,))
    sides = []
    for _ in range(2):
        sides.append([hidden.clone().requires_grad_(), *(x.clone().requires_grad_(trained) for x in (weight, bias))])
    logits = torch.nn.functional.linear(*sides[0])
    target[2] = logits[2].argmax()
    plain = logits.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    logprobs, likeliest, entropy = head.TokenLogprobs.apply(*sides[1], target, 1.0, True)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(logprobs, plain)
    assert likeliest.bool().tolist() == (logits.argmax(1) == target).tolist()
    (plain * by).sum().backward()
    (logprobs * by).sum().backward()
    for expected, got in zip(*sides, strict=True):
        assert (expected.grad is None) is (got.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_the_head_is_itself_again_after(sharp):
    """Inside, log p of the targets; after, also after an error, logits as ever."""
    model, ids = sharp[0], torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), head.scoring_head(model, ids[0, 1:], torch.tensor([[True, True, False]])):
        logprobs, _ = model(input_ids=ids).logits
        raise ZeroDivisionError
    expected = before.log_softmax(-1)[0, [0, 1], ids[0, 1:]]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_fully_masked_rows_are_refused(rows):
    masked = {"input_ids": list(range(10, 23)), "labels": [IGNORE] * 13}
    require_labels(rows)
    with pytest.raises(UserError, match=f"1 rows have no labelled token .the first is row {len(rows) + 1}"):
        require_labels([*rows, masked])
