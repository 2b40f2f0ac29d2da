"""DPO on TRL's loop: prompts as trees give TRL's own loss and gradient, start at ln 2, and accumulate exactly."""

import copy
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rl.dpo import SoftDpoTrainer, collate, pair_loss
from truthward.branches import Item
from truthward.errors import TrainingFault
from truthward.head import Anchor, TokenDivergence
from truthward.ledger import Run, plan
from truthward.models import lora_config
from truthward.records import Preference
from truthward.replay import Replay, share_out
from truthward.score import answer_sums
from truthward.tables import Dpo, Launch
from truthward.tracking import read_metrics
from truthward.trainers import to_row, trainer_arguments

PROMPTS = [  # lengths of prompt and answers; pairs of answers; how sure each pair is
    ((9, 4, 6), [[0, 1]], [1.0]),
    ((5, 17, 2, 3), [[0, 1], [0, 2], [2, 1]], [0.8, 0.95, 0.6]),
    ((12, 1, 8), [[1, 0]], [0.7]),
    ((3, 7, 7, 2, 5), [[0, 2], [1, 2], [0, 3], [1, 3]], [1.0, 1.0, 0.9, 0.5]),
]


def prompts(model, *, hard: bool = False) -> list[dict]:
    """Rows as the stage makes them, with the reference's log-probabilities by the model itself."""
    generator, rows = torch.Generator().manual_seed(6), []
    for lengths, pairs, labels in PROMPTS:
        prompt, *answers = (torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths)
        (sums,) = answer_sums(model, [Item(prompt, answers)])
        row = {"prompt_ids": prompt, "answer_ids": answers, "pairs": pairs, "ref_logprobs": sums}
        rows.append(row | {"probability": [1.0] * len(labels) if hard else labels})
    return rows


def build(sharp, tmp_path, rows, *, micro=4, moved=True, sft_coef=0.0, replayed=None, **keys) -> SoftDpoTrainer:
    """A trainer as the stage makes it, with SGD; ``moved``: the policy has left the reference."""
    model, tokenizer = sharp
    table = Dpo(batch_size=4, micro_batch_size=micro, beta=0.1, sft_coef=sft_coef, **keys)
    arguments = trainer_arguments(table, Launch(), torch.float32, Run(tmp_path), seed=0)
    arguments |= {"max_grad_norm": 1e9, "learning_rate": 0.01, "warmup_steps": 0, "save_strategy": "no", "optim": "sgd"}
    trainer = SoftDpoTrainer(
        model=copy.deepcopy(model),
        args=DPOConfig(**arguments, beta=table.beta, precompute_ref_log_probs=True),
        data_collator=partial(collate, replayed=replayed),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(4, 8),
    )
    trainer.run, trainer.table, trainer.replay = Run(tmp_path), table, replayed
    trainer.run.record(status="running")
    if moved:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.5 * noise if "lora_B" in name else noise / parameter.shape[1] ** 0.5)
        trainer.state.global_step = 1  # past the first step, at which the loss has to be ln 2
    trainer.model.train()
    return trainer


def losses(trainer: SoftDpoTrainer, rows: list[dict]) -> tuple[torch.Tensor, dict[str, float]]:
    """The trainer's loss of a micro-batch, and the metrics that it leaves."""
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, collate(rows, replayed=trainer.replay))
    return loss, {k: v[0] for k, v in trainer._metrics["train"].items()}


def theirs(trainer: SoftDpoTrainer, row: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's own loss and metrics of one prompt's pairs, as padded rows."""
    flat = []
    for chosen, rejected in row["pairs"]:
        ids = {"chosen_ids": row["answer_ids"][chosen], "rejected_ids": row["answer_ids"][rejected]}
        flat.append({"prompt_ids": row["prompt_ids"], **ids})
    batch = DataCollatorForPreference(0)(flat)
    for k, side in enumerate(("chosen", "rejected")):
        batch[f"ref_{side}_logps"] = torch.tensor([row["ref_logprobs"][pair[k]] for pair in row["pairs"]])
    trainer._metrics["train"].clear()
    loss = DPOTrainer.compute_loss(trainer, trainer.model, batch)
    return loss, {k: v[0] for k, v in trainer._metrics["train"].items() if k.startswith("rewards/")}


def gradients(trainer, loss: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("hard", [True, False])
def test_the_first_loss_is_ln_two(sharp, tmp_path, hard):
    """Policy and reference are one model at the start, whatever the labels."""
    rows = prompts(sharp[0], hard=hard)
    loss, _ = losses(build(sharp, tmp_path, rows, moved=False), rows)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_a_wrong_reference_stops_the_run(sharp, tmp_path):
    """A reference that is off by 5 nats on one answer is put on record and refused."""
    rows = prompts(sharp[0])
    rows[2]["ref_logprobs"][0] += 5
    trainer = build(sharp, tmp_path, rows, moved=False)
    with pytest.raises(TrainingFault, match=r"must be 0\.693147"):
        losses(trainer, rows)
    assert trainer.run.manifest["incidents"][0]["kind"] == "wrong-start"


def test_loss_gradient_and_metrics_are_trls(sharp, tmp_path):
    """One row of trees against TRL's padded rows, for a policy that has moved; every prompt counts alike."""
    rows = prompts(sharp[0], hard=True)
    trainer = build(sharp, tmp_path, rows)
    each = [theirs(trainer, row) for row in rows]
    expected = sum(loss for loss, _ in each) / len(each)
    loss, metrics = losses(trainer, rows)
    assert abs(loss.item() - math.log(2)) > 0.05
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        mean = sum(m[f"rewards/{name}"] for _, m in each) / len(each)
        assert metrics[f"rewards/{name}"] == pytest.approx(mean, abs=1e-4)
    ours, reference = gradients(trainer, loss), gradients(trainer, expected)
    torch.testing.assert_close(ours, reference, atol=1e-5 * reference.abs().max().item(), rtol=0)


def test_soft_labels_are_symmetric_in_the_trainer(sharp, tmp_path):
    """Every pair swapped and every label p turned into 1 - p: the same loss."""
    rows = prompts(sharp[0])
    turned = [{"pairs": [p[::-1] for p in r["pairs"]], "probability": [1 - p for p in r["probability"]]} for r in rows]
    trainer = build(sharp, tmp_path, rows)
    swapped = [r | t for r, t in zip(rows, turned, strict=True)]
    assert losses(trainer, rows)[0].item() == pytest.approx(losses(trainer, swapped)[0].item(), abs=1e-6)


def test_the_chosen_answers_likelihood_is_added_a_token(sharp, tmp_path):
    """sft_coef times -log p(chosen) / tokens: each answer scored alone, pairs averaged over a prompt, then prompts."""
    rows = prompts(sharp[0])
    without, metrics = losses(build(sharp, tmp_path, rows), rows)
    trainer = build(sharp, tmp_path, rows, sft_coef=0.7)
    with_it, _ = losses(trainer, rows)
    expected = 0.0
    for row in rows:
        for chosen, _ in row["pairs"]:
            prompt, answer = row["prompt_ids"], row["answer_ids"][chosen]
            logprobs = trainer.model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            total = sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
            expected -= total / len(answer) / len(row["pairs"]) / len(rows)
    assert (with_it - without).item() == pytest.approx(0.7 * expected, rel=1e-4)
    assert metrics["nll/chosen"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_does_not_depend_on_accumulation(sharp, tmp_path, micro):
    """Row 28: 4 x 1 = 2 x 2 = 1 x 4 prompts, of one to four pairs each."""
    rows, norms = prompts(sharp[0]), {}
    for size in (micro, 4):
        trainer = build(sharp, tmp_path / str(size), rows, micro=size, moved=False)
        trainer.train()
        norms[size] = trainer.state.log_history[0]["grad_norm"]
    assert norms[micro] == pytest.approx(norms[4], rel=1e-4)


def test_an_answer_stands_once_in_a_row_however_many_pairs_it_is_in(tiny):
    made = [("b", "a", 1.0), ("c", "a", 0.8), ("b", "c", 0.6)]
    row = to_row(tiny[1], [Preference(prompt="?", chosen=w, rejected=loser, probability=p) for w, loser, p in made])
    assert [tiny[1].decode(ids[:-1]) for ids in row["answer_ids"]] == ["b", "a", "c"]
    assert row["pairs"] == [[0, 1], [2, 1], [0, 2]]
    assert row["probability"] == [1.0, 0.8, 0.6]


def test_the_stage_starts_at_ln_two(lab):
    """In the pipeline: the first loss on record."""
    run = Run.load(plan(lab.recipe())["dpo"].path)
    assert read_metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.manifest["metrics"]["loss"] < 0.6


def test_the_length_normalised_loss_is_dpo_on_means_over_tokens():
    """beta 2, answers of 2 and 4 tokens that gained 1 and lost 2 nats: D = 1/2 + 2/4 = 1, ln(1 + e^-2) = .126928."""
    sums, ref, tokens = torch.tensor([-3.0, -10.0]), torch.tensor([-4.0, -8.0]), torch.tensor([2, 4])
    pairs, sure = torch.tensor([[0, 1]]), torch.ones(1)
    loss = pair_loss(Dpo(loss="length_normalised", beta=2.0), sums, ref, tokens, pairs, sure).losses
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)
    plain = pair_loss(Dpo(beta=2.0), sums, ref, tokens, pairs, sure).losses
    assert plain.item() == pytest.approx(math.log1p(math.exp(-6)), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- replay


def replayed_by(model, lengths=((4, 6), (7, 3), (5, 9))) -> Replay:
    """Answers of one to another prompt with what a model says at their tokens, by plain forward passes."""
    generator, items, states = torch.Generator().manual_seed(3), [], []
    for prompt_length, answer_length in lengths:
        ids = torch.randint(3, 259, (prompt_length + answer_length,), generator=generator).tolist()
        items.append(Item(ids[:prompt_length], [ids[prompt_length:]]))
        hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
        states.append(hidden[prompt_length - 1 : -1].detach())
    return Replay(items, states, model.get_output_embeddings().weight.detach().clone(), None)


def divergence(model, replayed: Replay, anchor_model, number: int) -> torch.Tensor:
    """Mean KL(anchor || model) a token of one answer, in float64 from whole logits."""
    item = replayed.items[number]
    ids, first = torch.tensor([item.prompt + item.answers[0]]), len(item.prompt) - 1
    p = model(input_ids=ids).logits[0, first:-1].double().log_softmax(-1)
    q = anchor_model(input_ids=ids).logits[0, first:-1].detach().double().log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1).mean()


def test_replay_adds_the_divergence_from_the_base(sharp, tmp_path):
    """Loss and gradient: replay_coef times the mean over answers of the mean KL a token, beside an unchanged DPO loss."""
    rows, replayed = prompts(sharp[0]), replayed_by(sharp[0])
    without, _ = losses(build(sharp, tmp_path, rows), rows)
    given = [row | {"replies": numbers} for row, numbers in zip(rows, [[0], [], [2, 1], []], strict=True)]
    trainer = build(sharp, tmp_path, given, replayed=replayed, replay_coef=2.5, replay_share=0.75)
    with_it, metrics = losses(trainer, given)
    expected = sum(divergence(trainer.model, replayed, sharp[0], n) for n in range(3)) / 3
    assert expected.item() > 0.01
    assert metrics["replay/kl"] == pytest.approx(expected.item(), rel=1e-4)
    assert (with_it - without).item() == pytest.approx(2.5 * expected.item(), rel=1e-3)
    plainly = losses(build(sharp, tmp_path, rows), rows)[0]
    ours = gradients(trainer, with_it)
    reference = gradients(trainer, 2.5 * expected.float()) + gradients(trainer, losses_of(trainer, rows))
    torch.testing.assert_close(ours, reference, atol=1e-4 * reference.abs().max().item(), rtol=0)
    assert plainly.item() == pytest.approx(without.item(), abs=1e-6)


def losses_of(trainer: SoftDpoTrainer, rows: list[dict]) -> torch.Tensor:
    """The loss of the same policy on rows without replies."""
    return losses(trainer, [row | {"replies": []} for row in rows])[0]


def test_replay_of_the_policy_itself_costs_nothing(sharp, tmp_path):
    """Where base and policy are one model the divergence is 0, and the first loss is ln 2."""
    rows = [row | {"replies": [n % 3]} for n, row in enumerate(prompts(sharp[0]))]
    trainer = build(sharp, tmp_path, rows, moved=False, replayed=replayed_by(sharp[0]), replay_share=1.0)
    loss, metrics = losses(trainer, rows)
    assert metrics["replay/kl"] == pytest.approx(0, abs=1e-6)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_replies_are_shared_out_evenly():
    """0.5 a row: every second row has one, each reply in turn; 1.5 a row: one and two."""
    assert share_out(3, 6, 0.5) == [[], [0], [], [1], [], [2]]
    assert share_out(2, 4, 1.5) == [[0], [1, 0], [1], [0, 1]]
    assert share_out(5, 3, 0.0) == [[], [], []]


def test_a_head_that_is_trained_learns_from_replay_as_autograd_says():
    """Worked against plain logits: gradients by states, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    hidden, states = (torch.randn(7, 6, generator=generator) for _ in range(2))
    weight, bias, old = (torch.randn(*shape, generator=generator) for shape in ((11, 6), (11,), (11, 6)))
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    anchor = Anchor(states, old, None)
    share = torch.rand(7, generator=generator)
    (TokenDivergence.apply(*inputs, anchor) * share).sum().backward()
    plain = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    p, q = (plain[0] @ plain[1].T + plain[2]).log_softmax(-1), (states @ old.T).log_softmax(-1)
    ((q.exp() * (q - p)).sum(-1) * share).sum().backward()
    for ours, theirs_ in zip(inputs, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs_.grad, atol=1e-5, rtol=1e-4)
