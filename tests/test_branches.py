"""Answers as branches of their prompt score as if each stood alone, and never see one another."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from truthward import score
from truthward.branches import Item, plant
from truthward.score import answer_logprobs, answer_sums

TOKENS = st.lists(st.integers(3, 258), min_size=1, max_size=12)
ITEMS = st.lists(st.builds(Item, TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4)


def draw(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]


def item(prompt: int, *answers: int) -> Item:
    first, *rest = draw(prompt, *answers)
    return Item(first, rest)


@torch.no_grad()
def alone(model, prompt: list[int], answer: list[int]) -> list[float]:
    """The ordinary way: one row, the model's own forward, full logits in float64, shifted by one."""
    ids = torch.tensor([prompt + answer])
    logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]


def assert_equal_to_each_alone(model, items: list[Item], **options) -> None:
    got = answer_logprobs(model, items, **options)
    assert [list(map(len, row)) for row in got] == [list(map(len, i.answers)) for i in items]
    for item, row in zip(items, got, strict=True):
        for answer, logprobs in zip(item.answers, row, strict=True):
            assert logprobs == pytest.approx(alone(model, item.prompt, answer), abs=1e-4)


def test_the_layout_by_hand():
    """Prompt [5, 6] with answers [7] and [8, 9]: positions go on from the prompt, and 8 does not see 7."""
    forest = plant([Item([5, 6], [[7], [8, 9]])])
    assert forest.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert forest.positions.tolist() == [[0, 1, 2, 2, 3]]
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert forest.sees[0, 0].int().tolist() == sees
    assert forest.source.tolist() == [1, 1, 3]  # the prompt's last token predicts both answers' first
    assert forest.target.tolist() == [7, 8, 9]
    assert forest.branch.tolist() == [0, 1, 1]
    assert forest.tip.tolist() == [2, 4]
    assert forest.place.tolist() == [0, 1, 2, 3, 4]


def test_trees_in_one_row_are_kept_apart():
    """Trees [5 | 6, 7] and [8 | 9] make a row of five; attention sees them as two rows of three, the second padded."""
    forest = plant([Item([5], [[6, 7]]), Item([8], [[9]])])
    assert (forest.ids.tolist(), forest.positions.tolist()) == ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]])
    assert forest.place.tolist() == [0, 1, 2, 3, 4]
    assert forest.sees[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert forest.sees[1, 0, :2].int().tolist() == [[1, 0, 0], [1, 1, 0]]
    assert (forest.source.tolist(), forest.target.tolist()) == ([0, 1, 3], [6, 7, 9])
    assert (forest.branch.tolist(), forest.tip.tolist()) == ([0, 0, 1], [2, 4])
    assert plant([Item([8], [[9]]), Item([5], [[6, 7]])]).place.tolist() == [0, 1, 3, 4, 5]


def test_a_token_is_predicted_from_the_one_before():
    """Row 6: a model that is a table of logits, log p(b | a) = log softmax(table[a])[b]."""
    table = torch.tensor([[0.0, 1.0, 2.0], [0.5, -1.0, 0.0], [3.0, 0.0, 1.0]])
    head = nn.Linear(3, 3, bias=False)
    head.weight.data = table.T
    model = nn.Module()
    model.head, model.get_output_embeddings = head, lambda: head
    model.get_decoder = lambda: (
        lambda input_ids, **_: SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, 3).float())
    )
    logp = table.log_softmax(-1)
    (((first, second), (other,)),) = answer_logprobs(model, [Item([2, 0], [[1, 2], [0]])])
    assert (first, second, other) == pytest.approx((logp[0, 1].item(), logp[1, 2].item(), logp[0, 0].item()))


def test_equal_to_each_alone_for_varied_lengths(sharp):
    items = [item(9, 1), item(1, 5, 17, 2), item(40, 3, 30), item(2, 1, 1, 1, 1), item(17, 17)]
    assert_equal_to_each_alone(sharp[0], items)


@pytest.mark.parametrize("tokens_a_batch", [1, 32, 64, 4096])
def test_equal_to_each_alone_over_several_batches(sharp, tokens_a_batch):
    """Longer items go in batches of their own; results keep the order given."""
    items = [item(5, 6, 7), item(30, 9, 2), item(3, 2), item(12, 1, 4), item(2, 8), item(6, 5, 5, 5)]
    assert_equal_to_each_alone(sharp[0], items, tokens_a_batch=tokens_a_batch)


@settings(max_examples=20)
@given(ITEMS)
def test_equal_to_each_alone_for_any_items(sharp, items):
    assert_equal_to_each_alone(sharp[0], items)


def test_equal_to_padded_rows_of_a_plain_batch(sharp):
    """Against transformers with an attention mask and full logits, right-padded."""
    model, _ = sharp
    trees = item(11, 4, 9, 1)
    rows = [trees.prompt + a for a in trees.answers]
    ids = torch.zeros(3, max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in rows])).long()
    logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    picked = logprobs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    expected = [picked[i, 10 : 10 + len(a)].sum().item() for i, a in enumerate(trees.answers)]
    assert answer_sums(model, [trees]) == [pytest.approx(expected, abs=1e-4)]


def test_changing_one_branch_leaves_every_other_number_identical(sharp):
    first, second = item(8, 5, 6, 7), item(4, 3, 9)
    before = answer_logprobs(sharp[0], [first, second])
    changed = Item(first.prompt, [first.answers[0], [t % 200 + 3 for t in first.answers[1]], first.answers[2]])
    after = answer_logprobs(sharp[0], [changed, second])
    assert after[0][0] == before[0][0]
    assert after[0][2] == before[0][2]
    assert after[1] == before[1]
    assert all(a != b for a, b in zip(after[0][1], before[0][1], strict=True))


def test_without_the_tree_mask_the_numbers_are_wrong(sharp):
    """A control: this model notices when branches see one another, so the equalities above mean something."""
    inputs = plant([item(8, 5, 6)]).inputs(torch.float32)
    right, wrong = (sharp[0](**given).logits[0, 13:] for given in (inputs, {**inputs, "attention_mask": None}))
    assert (right - wrong).abs().max() > 0.1


def test_the_gradient_through_a_tree_is_the_sum_of_the_gradients_alone(sharp):
    model, _ = sharp
    tree = item(6, 4, 5)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    try:
        forest = plant([tree])
        outputs = model(**forest.inputs(torch.float32), logits_to_keep=forest.source)
        together = outputs.logits[0].log_softmax(-1).gather(1, forest.target.unsqueeze(1)).sum()
        (got,) = torch.autograd.grad(together, weight)
        expected = torch.zeros_like(weight)
        for answer in tree.answers:
            ids = torch.tensor([tree.prompt + answer])
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:].unsqueeze(1))
            expected += torch.autograd.grad(logprobs[len(tree.prompt) - 1 :].sum(), weight)[0]
    finally:
        weight.requires_grad_(False)
    torch.testing.assert_close(got, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_what_prompts_share_is_computed_once_and_changes_no_number(sharp, monkeypatch):
    """Eight prompts behind one primer, among others: the same log-probabilities, from a fifth of the tokens."""
    model, _ = sharp
    generator = random.Random(0)
    some = lambda n: [generator.randrange(3, 200) for _ in range(n)]  # noqa: E731
    primer = some(60)
    items = [Item(primer + some(n % 3 + 1), [some(3), some(2)]) for n in range(8)]
    items[3:3] = [Item(some(40), [some(2)]), Item(some(5), [some(4)])]
    alone = [score.answer_logprobs(model, [item])[0] for item in items]
    seen = []
    monkeypatch.setattr(score, "plant", lambda part: seen.append(sum(i.length for i in part)) or plant(part))
    together = score.answer_logprobs(model, items)
    assert [len(a) for a in together] == [len(a) for a in alone]
    for one, two in zip(together, alone, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    assert sum(seen) == sum(i.length for i in items) - 8 * 60
    assert score._groups(items)[0] == ([0, 1, 2, 5, 6, 7, 8, 9], 60)


def test_prompts_that_are_the_same_keep_their_last_token():
    """It predicts the answers' first."""
    items = [Item(list(range(50)), [[1]])] * 4
    assert score._groups(items) == [([0, 1, 2, 3], 49)]
    assert score._groups(items[:3]) == [([0, 1, 2], 0)]
