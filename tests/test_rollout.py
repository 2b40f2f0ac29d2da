"""Which prompts a rollout takes, how its answers are stacked, and what its seeds depend on."""

from hypothesis import given
from hypothesis import strategies as st

from rl.rollout import collate, draw_seed, prompt_order
from truthward.generate import Completion


def test_masks_go_by_length():
    """Rows 7 and 8: an answer [9, 2] that ended counts two tokens, its end token included; pad ids in the text count."""
    batch = collate([[5, 0, 6], [7]], [Completion([9, 2], [-1.0, -2.0], True), Completion([0, 0, 8], [-3.0] * 3)])
    assert (batch.prompts, batch.answers) == ([[5, 0, 6], [7]], [[9, 2], [0, 0, 8]])
    assert batch.mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.sampler_logprobs.tolist() == [[-1, -2, 0], [-3, -3, -3]]
    assert batch.finished.tolist() == [True, False]
    assert batch.forest([0, 1]).target.tolist() == [9, 2, 0, 0, 8]


def test_tokens_of_a_shared_prompt_are_counted_once():
    """Prompts [5], [5], [6, 7], [5] with answers of one token: 4 and 1 + 2 + 1."""
    batch = collate([[5], [5], [6, 7], [5]], [Completion([2], [-1.0], True)] * 4)
    assert (batch.answer_tokens, batch.tokens) == (4, 8)
    assert batch.forest([0, 1, 2]).ids.tolist() == [[5, 2, 2, 6, 7, 2]]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10))
def test_every_prompt_comes_before_any_comes_again(prompts, rollouts, seed):
    """Laid end to end, iterations are whole shuffles of all prompts."""
    drawn = [p for i in range(8) for p in prompt_order(prompts, i, rollouts, seed)]
    for start in range(0, len(drawn) - prompts + 1, prompts):
        assert sorted(drawn[start : start + prompts]) == list(range(prompts))


def test_the_order_of_prompts_is_seeded_and_reshuffled():
    first, second = prompt_order(40, 0, 80, 3)[:40], prompt_order(40, 0, 80, 3)[40:]
    assert first != second
    assert first == prompt_order(40, 0, 40, 3) != prompt_order(40, 0, 40, 4)


def test_seeds_depend_on_every_part():
    """("1", "23") and ("12", "3") are not the same draw."""
    parts = [(1, 2, 3), (1, 3, 2), (12, 3), (1, 23), ("1", 2, 3)]
    assert len({draw_seed(*p) for p in parts}) == 4
