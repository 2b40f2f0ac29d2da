"""Sampling: answers do not depend on their batch, follow the distribution, and end at the end token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthward.generate import Completion, PlainModel, _invert, engine_for, generate, sample

LENGTHS = (3, 21, 1, 8, 8, 34, 13)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in LENGTHS]


def speak(sharp, prompts: list[list[int]], seeds: list[int], **options) -> list[Completion]:
    model, tokenizer = sharp
    options = {"max_new_tokens": 16, "temperature": 1.0, "eos": tokenizer.eos_token_id, "pad_id": 0} | options
    return generate(model, prompts, seeds, **options)


@pytest.fixture(scope="module")
def answers(sharp, prompts) -> list[Completion]:
    return speak(sharp, prompts, list(range(len(prompts))))


def test_the_samples_hold_answers_that_ended_and_some_that_did_not(answers):
    """What the tests below need in order to mean something."""
    assert {c.finished for c in answers} == {True, False}
    assert len({len(c.ids) for c in answers}) > 2


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_answer_does_not_depend_on_its_batch(sharp, prompts, answers, batch_size):
    """Row 5: left padding, batch size and rows that leave the batch change no token."""
    got = speak(sharp, prompts, list(range(len(prompts))), batch_size=batch_size)
    assert [c.ids for c in got] == [c.ids for c in answers]
    for one, other in zip(got, answers, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_an_answer_is_the_same_alone_and_among_others_in_any_order(sharp, prompts, answers):
    """Row 42: the seed goes with the prompt."""
    for i, prompt in enumerate(prompts):
        assert speak(sharp, [prompt], [i])[0].ids == answers[i].ids
    backwards = speak(sharp, prompts[::-1], list(range(len(prompts)))[::-1])
    assert [c.ids for c in backwards[::-1]] == [c.ids for c in answers]


def test_another_seed_gives_another_answer(sharp, prompts, answers):
    other = speak(sharp, prompts, [s + 100 for s in range(len(prompts))])
    assert all(a.ids != b.ids for a, b in zip(other, answers, strict=True))


def test_a_pad_that_equals_the_end_token_is_harmless(sharp, prompts, answers):
    """Row 8: what stands in the padding is never seen."""
    got = speak(sharp, prompts, list(range(len(prompts))), pad_id=sharp[1].eos_token_id)
    assert [c.ids for c in got] == [c.ids for c in answers]


def test_greedy_equals_transformers_generate(sharp, prompts):
    model, tokenizer = sharp
    got = speak(sharp, prompts, [0] * len(prompts), temperature=0)
    for prompt, completion in zip(prompts, got, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert completion.ids == out[0, len(prompt) :].tolist()
    assert {c.finished for c in got} == {True, False}


def test_a_low_temperature_is_greedy(sharp, prompts):
    seeds = list(range(len(prompts)))
    cold, greedy = (speak(sharp, prompts, seeds, temperature=t) for t in (1e-3, 0))
    assert [c.ids for c in cold] == [c.ids for c in greedy]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_fresh_forward(sharp, prompts, temperature):
    """Rows 2 and 3: log softmax(z/T) of each token, by one uncached forward over prompt and answer."""
    model, _ = sharp
    got = speak(sharp, prompts, list(range(len(prompts))), temperature=temperature)
    for prompt, completion in zip(prompts, got, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0].double() / temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1).tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_an_answer_ends_at_the_end_token_or_at_the_limit(sharp, prompts, answers):
    """Row 7: the end token is the last token and is kept; only then is the answer finished."""
    eos = sharp[1].eos_token_id
    for completion in answers:
        assert len(completion.ids) == len(completion.logprobs) <= 16
        assert eos not in completion.ids[:-1]
        assert completion.finished == (completion.ids[-1] == eos)
        assert completion.finished or len(completion.ids) == 16


def test_an_end_token_at_the_limit_counts_as_finished(sharp, prompts, answers):
    index, short = min(((i, c) for i, c in enumerate(answers) if c.finished), key=lambda pair: len(pair[1].ids))
    (again,) = speak(sharp, [prompts[index]], [index], max_new_tokens=len(short.ids))
    assert again.ids == short.ids
    assert again.finished


def test_an_end_token_in_the_prompt_ends_nothing(sharp):
    """Row 9: chat prompts are full of end tokens; only the answer's own counts."""
    eos = sharp[1].eos_token_id
    (got,) = speak(sharp, [[eos, 7, eos, eos]], [4], max_new_tokens=2)
    assert len(got.ids) == 2
    assert not got.finished


def test_progress_counts_every_answer(sharp, prompts):
    ticks: list[int] = []
    speak(sharp, prompts, [0] * len(prompts), batch_size=3, tick=ticks.append)
    assert sum(ticks) == len(prompts)


# ------------------------------------------------------------------------------------- greedy and sampled in one call


def engines(sharp) -> list:
    """The lean decoder, and the model's own forward pass."""
    return [sharp, (PlainModel(sharp[0], 0), sharp[1])]


@pytest.mark.parametrize("batch_size", [1, 8, 32])
@pytest.mark.parametrize("engine", [0, 1])
def test_one_call_at_two_temperatures_equals_two_calls(sharp, prompts, engine, batch_size):
    """Every prompt once greedy and once sampled, each with a limit of its own: what separate calls give."""
    speaker, n = engines(sharp)[engine], len(prompts)
    limits = [3 + 5 * (i % 3) for i in range(n)]
    heats = [0.0] * n + [0.7] * n
    seeds = list(range(2 * n))
    got = speak(speaker, prompts * 2, seeds, temperature=heats, max_new_tokens=limits * 2, batch_size=batch_size)
    for i, answer in enumerate(got):
        (alone,) = speak(speaker, [prompts[i % n]], [i], temperature=heats[i], max_new_tokens=limits[i % n])
        assert answer.ids == alone.ids
        assert answer.finished == alone.finished
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert [c.ids for c in got[:n]] != [c.ids for c in got[n:]]


@pytest.mark.parametrize("engine", [0, 1])
def test_equal_prompts_are_computed_once_and_answered_as_alone(sharp, prompts, engine, monkeypatch):
    speaker = engine_for(engines(sharp)[engine][0], 0)
    forward, seen = speaker._forward, []
    monkeypatch.setattr(
        speaker,
        "_forward",
        lambda *given: seen.append(max(g.numel() for g in given if torch.is_tensor(g))) or forward(*given),
    )
    with torch.inference_mode():
        rows, logits = speaker.prefill([prompts[1]] * 5, 4)
    assert (len(rows), len(logits), seen) == (5, 5, [len(prompts[1])])
    got = speak((speaker, sharp[1]), [prompts[1]] * 5, list(range(5)))
    alone = [speak(sharp, [prompts[1]], [seed])[0].ids for seed in range(5)]
    assert [c.ids for c in got] == alone


def test_as_many_temperatures_and_limits_as_prompts_are_wanted(sharp, prompts):
    for options in ({"temperature": [0.7]}, {"max_new_tokens": [4] * 99}):
        with pytest.raises(ValueError, match="7 prompts"):
            speak(sharp, prompts, [0] * len(prompts), **options)


def test_rows_of_different_temperature_draw_as_alone():
    logits, uniform = torch.randn(6, 700), torch.rand(6)
    heats = [0.0, 0.7, 1.0, 0.0, 1.3, 0.7]
    token, logprob = sample(logits, uniform, torch.tensor(heats))
    for i, heat in enumerate(heats):
        alone = sample(logits[i : i + 1], uniform[i : i + 1], heat)
        assert (token[i], logprob[i]) == (alone[0][0], pytest.approx(alone[1][0].item(), abs=1e-6))


# ----------------------------------------------------------------------------------------------------------- sample


@pytest.mark.parametrize(("uniform", "word"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.999, 2)])
def test_a_uniform_number_picks_the_word_by_hand(uniform, word):
    """p = (.2, .3, .5): the cumulative distribution is (.2, .5, 1)."""
    token, logprob = sample(torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([uniform]), 1.0)
    assert token.item() == word
    assert logprob.item() == pytest.approx(math.log((0.2, 0.3, 0.5)[word]))


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=8), st.floats(0.3, 3))
def test_an_even_grid_of_uniform_numbers_gives_the_distribution(logits, temperature):
    """Each word's share is its probability to within one step of the grid at either end."""
    n = 2000
    uniform = (torch.arange(n) + 0.5) / n
    token, _ = sample(torch.tensor([logits]).expand(n, -1), uniform, temperature)
    share = torch.bincount(token, minlength=len(logits)) / n
    expected = (torch.tensor(logits).double() / temperature).softmax(0)
    assert (share - expected).abs().max() <= 2 / n


def test_frequencies_pass_a_chi_square_test():
    """20,000 draws over 6 words; 5 degrees of freedom exceed 20.5 once in 1,000 times."""
    n, logits = 20_000, torch.tensor([0.3, -1.2, 0.8, 2.0, -0.5, 0.1])
    token, _ = sample(logits.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(1)), 0.8)
    expected = n * (logits.double() / 0.8).softmax(0)
    assert ((torch.bincount(token, minlength=6) - expected) ** 2 / expected).sum() < 20.5


def test_a_word_without_probability_is_never_drawn():
    """Also at both ends of the unit interval, and as first or last word."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf]]).expand(4, -1)
    token, _ = sample(logits, torch.tensor([0.0, 0.2, 0.9, 1 - 2**-24]), 1.0)
    assert set(token.tolist()) <= {1, 3}


def test_the_search_in_two_levels_is_the_search_in_one():
    """1,000 words make four spans; the whole cumulative distribution in float64 gives the same words."""
    logits = 2 * torch.randn(1000, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(4))
    cumulative = logits.double().softmax(0).cumsum(0)
    expected = torch.searchsorted(cumulative, uniform.double(), right=True)
    clear = (uniform.double().unsqueeze(1) - cumulative).abs().min(1).values > 1e-6  # rounding may settle the others
    token, logprob = sample(logits.expand(len(uniform), -1), uniform, 1.0)
    assert torch.equal(token[clear], expected[clear])
    assert clear.float().mean() > 0.99
    assert set((token // 256).tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(logprob, logits.log_softmax(0)[token])


@pytest.mark.parametrize(("point", "index"), [(-1e-8, 2), (0.0, 2), (0.49, 2), (0.5, 3), (1.0, 3), (1.1, 3)])
def test_rounding_past_either_end_draws_no_impossible_word(point, index):
    """p = (0, 0, .5, .5, 0): of the words with probability the first and the last are the ends."""
    found, _ = _invert(torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]), torch.tensor([[point]]))
    assert found.item() == index


def test_logits_that_are_not_numbers_show_in_the_log_probability():
    """For the caller's guard to find, rather than an index error."""
    token, logprob = sample(torch.full((2, 300), math.nan), torch.tensor([0.1, 0.9]), 1.0)
    assert logprob.isnan().all()
    assert (token < 300).all()


def test_temperature_zero_takes_the_most_likely_word():
    token, logprob = sample(torch.tensor([[0.0, 3.0, 1.0], [9.0, 3.0, 1.0]]), torch.tensor([0.99, 0.99]), 0)
    assert token.tolist() == [1, 0]
    assert logprob.tolist() == [0.0, 0.0]
