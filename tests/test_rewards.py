"""Where scores come from: Python functions, classifiers with a tokenizer of their own, several with weights."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppo_lab import quiet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rl import state
from rl.rewards import ClassifierReward, combine, open_sources, python_reward, spread
from truthward.errors import TrainingFault, UserError

PROMPTS, ANSWERS, TOKENS = ["what is tea", "a bee"], ["hot", "it is a bee"], [[5, 2], [6, 7, 2]]

# ------------------------------------------------------------------------------------------------- Python functions

SOURCE = """
import math
def words(completions): return [len(c.split()) for c in completions]
def all_three(prompts, completions, completion_ids): return [len(p) + len(i) for p, i in zip(prompts, completion_ids)]
def anything(prompts, **kwargs): return [10.0 * len(kwargs) for _ in prompts]
def nothing(*, completion_ids, weight=2): return [weight * len(i) for i in completion_ids]
def right(completions): return ["bee" in c for c in completions]
def tensor(completions):
    import torch
    return torch.ones(len(completions))
def short(completions): return [1.0]
def nan(completions): return [1.0, math.nan]
def number(completions): return 3.0
def texts(completions): return completions
def wants_more(completions, labels): return [0, 0]
def wants_more_by_name(completions, *, labels): return [0, 0]
THREE = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("words", [1, 4]),
        ("all_three", [13, 8]),
        ("anything", [20, 20]),
        ("nothing", [4, 6]),
        ("right", [0.0, 1.0]),
        ("tensor", [1, 1]),
    ],
)
def test_a_function_gets_the_arguments_that_it_names(file, function, expected):
    """Some, all, ``**kwargs`` or by keyword only; True counts 1, and a tensor is a list of numbers."""
    got = python_reward(f"{file}:{function}")(PROMPTS, ANSWERS, TOKENS)
    assert got == expected
    assert all(type(score) is float for score in got)


def test_a_function_of_a_module_is_found(file, monkeypatch, tmp_path):
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert python_reward("my_rewards:words")(PROMPTS, ANSWERS, TOKENS) == [1, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:gone", "no reward function can be loaded"),
        ("gone.py:words", "no such file"),
        ("gone_module:words", "No module named"),
        ("{file}:THREE", "not a callable"),
        ("{file}:wants_more", "asks for labels"),
        ("{file}:wants_more_by_name", "asks for labels"),
    ],
)
def test_a_function_that_cannot_score_is_refused_before_anything_runs(file, name, message):
    with pytest.raises(UserError, match=message):
        open_sources([name.format(file=file)], torch.float32)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "1 scores for 2 answers"),
        ("nan", "gave nan to answer 1"),
        ("number", "must return a list of numbers"),
        ("texts", "must return a list of numbers"),
    ],
)
def test_scores_that_are_none_stop_the_run_and_name_the_function(file, function, message):
    with pytest.raises(TrainingFault, match=f"{function}.*{message}"):
        python_reward(f"{file}:{function}")(PROMPTS, ANSWERS, TOKENS)


# -------------------------------------------------------------------------------------------------------- classifiers

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}e"
WORDS = ["p", "e", "[", "]", *"abcdfghijklmnoqrstuvwxyz "]


def letters(*, template: bool, pad: str = "p", **options) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, which has nothing in common with the policy's."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="p"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="$A", pair="$A:0 $B:1")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token="e", unk_token="p", **options)
    tokenizer.chat_template = TEMPLATE if template else None
    return tokenizer


def llama(labels: int, pad: int | None) -> LlamaForSequenceClassification:
    torch.manual_seed(labels)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(WORDS), num_labels=labels, pad_token_id=pad, num_key_value_heads=2, **sizes)
    )
    for parameter in model.parameters():
        parameter.data.mul_(5)
    return model.eval()


def save(folder, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def by_hand(model, text: str) -> torch.Tensor:
    """The head on the decoder's last state of letters that this test looks up itself."""
    ids = torch.tensor([[WORDS.index(c) if c in WORDS else 0 for c in text]])
    return model.score(model.model(input_ids=ids).last_hidden_state[0, -1])


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_keeps_its_own_tokenizer_and_template(tmp_path, labels):
    """One label is the score; of two it is the log-odds of the second. Row by row: another answer changes nothing."""
    model = llama(labels, 0)
    source = open_sources([save(tmp_path, model, letters(template=True))], torch.float32)[str(tmp_path)]
    got = source(PROMPTS, ANSWERS, TOKENS)
    logits = [by_hand(model, f"[user]{p}[assistant]{a}e") for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = [(row[0] if labels == 1 else row[1] - row[0]).item() for row in logits]
    assert got == pytest.approx(expected, abs=1e-5)
    assert source(PROMPTS[1:], ANSWERS[1:], TOKENS[1:]) == got[1:]
    assert abs(got[0] - got[1]) > 0.01


@pytest.mark.parametrize("pad", [0, 1, None])
def test_a_pad_token_that_is_the_end_token_is_harmless(tmp_path, pad):
    """Row 8: classifiers look for the last token that is not padding; an end token that is also padding is still read."""
    model = llama(1, pad)
    source = ClassifierReward(save(tmp_path, model, letters(template=True, pad="e" if pad == 1 else "p")), torch.float32)
    expected = by_hand(model, f"[user]{PROMPTS[0]}[assistant]{ANSWERS[0]}e").item()
    assert source(PROMPTS[:1], ANSWERS[:1], TOKENS[:1]) == pytest.approx([expected], abs=1e-5)
    assert source.model.config.pad_token_id == pad


def test_a_classifier_without_a_template_gets_a_pair_of_texts(tmp_path):
    """And is told which tokens are the answer's, where it has embeddings for that."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), num_labels=1, pad_token_id=0, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(10)
    tokenizer = letters(template=False, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    source = ClassifierReward(save(tmp_path, model, tokenizer), torch.float32)
    ids = torch.tensor([[WORDS.index(c) for c in "a bee" + "hot"]])
    kinds = torch.tensor([[0] * 5 + [1] * 3])
    with torch.no_grad():
        right, wrong = (model(input_ids=ids, token_type_ids=k).logits.item() for k in (kinds, kinds * 0))
    assert source(["a bee"], ["hot"], [[5]]) == pytest.approx([right], abs=1e-5)
    assert abs(right - wrong) > 1e-3


def test_what_is_no_classifier_is_refused(tmp_path):
    """More than two labels, a language model without a head for scores, and a folder that is not there."""
    with pytest.raises(UserError, match="3 labels, so no one score"):
        ClassifierReward(save(tmp_path / "three", llama(3, 0), letters(template=True)), torch.float32)
    language = LlamaForCausalLM(llama(1, 0).config)
    with pytest.raises(UserError, match="score.weight: it is no trained classifier"):
        ClassifierReward(save(tmp_path / "language", language, letters(template=True)), torch.float32)
    with pytest.raises(UserError, match="no sequence classifier can be loaded"):
        open_sources([str(tmp_path / "gone")], torch.float32)


# --------------------------------------------------------------------------------------------------------- one number


def test_normalisation_hand_numbers():
    """Rows 20 and 21: [1, 2, 3] by mean 2 and deviation 1; later scores by the same; equal ones by a deviation of 1."""
    means, deviations = spread([[1.0, 2, 3], [5.0, 5, 5]])
    assert (means, deviations) == ([2.0, 5.0], [1.0, 1.0])
    got = combine([[1.0, 2, 4], [5.0, 6, 5]], means, deviations, [1.0, 1.0], hard=False, clip=0.0)
    assert got.tolist() == [-1.0, 1.0, 2.0]


def test_weights_clip_and_hard_scores_hand_numbers():
    """Row 20: normalised scores [-2, 0, 3] and [1, 1, -1], weighted 1 and .5, held at 1.5, and as 1 or 0."""
    scores, means, deviations, weights = [[-1.0, 1, 4], [3.0, 3, 1]], [1.0, 2.0], [1.0, 1.0], [1.0, 0.5]
    soft = combine(scores, means, deviations, weights, hard=False, clip=0.0)
    held = combine(scores, means, deviations, weights, hard=False, clip=1.5)
    hard = combine(scores, means, deviations, weights, hard=True, clip=1.5)
    assert soft.tolist() == [-1.5, 0.5, 2.5]
    assert held.tolist() == [-1.0, 0.5, 1.0]
    assert hard.tolist() == [0.5, 0.5, 1.0]


@given(st.lists(st.floats(-50, 50), min_size=3, max_size=9).filter(lambda x: max(x) - min(x) > 0.1), st.floats(0.5, 20))
def test_a_reward_in_other_units_is_the_same_reward(scores, scale):
    """Row 20: scale and offset of a reward do not count."""
    one, other = ([scores], [[scale * s - 3 for s in scores]])
    first, second = (combine(s, *spread(s), [1.0], hard=False, clip=0.0) for s in (one, other))
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)
    assert first.std().item() == pytest.approx(1, abs=1e-3)


# -------------------------------------------------------------------------------------------------------- in the run


def test_several_rewards_are_weighed_each_by_its_own_first_rollout(lab, tmp_path, file):
    """The preference model, a function and a classifier in one run; what each gave is in the metrics."""
    folder = save(tmp_path / "classifier", llama(2, 0), letters(template=True))
    names = ["reward", f"{file}:words", folder]
    options = (f"ppo.rewards={json.dumps(names)}", "ppo.reward_weights=[1.0, 0.5, -2.0]")
    with lab.copy(tmp_path / "runs").ppo(*options) as ppo:
        batch = ppo.rollout(quiet)
        scores = ppo.score(batch)
        _, metrics = ppo.advantages(batch, scores)
        total = torch.zeros(8, dtype=torch.float64)
        for weight, column in zip((1.0, 0.5, -2.0), scores.scores, strict=True):
            column = torch.tensor(column, dtype=torch.float64)
            deviation = column.std().item() if column.std() > 1e-6 else 1.0
            total += weight * (column - column.mean()) / deviation
        assert metrics["score/normalised"] == pytest.approx(total.mean().item(), abs=1e-6)
        answers = [ppo.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in batch.answers]
        assert scores.scores[1] == [len(a.split()) for a in answers]
        asked = [ppo.texts[ppo.prompts.index(p)] for p in batch.prompts]
        assert scores.scores[2] == ClassifierReward(folder, torch.float32)(asked, answers, batch.answers)
        for name, column in zip(names, scores.scores, strict=True):
            assert metrics[f"score/{name}"] == pytest.approx(math.fsum(column) / 8, abs=1e-5)
        state.save(ppo.run, ppo.progress, ppo.trainable, ppo.optimizer)
        saved = json.loads((ppo.run.path / "checkpoints/iteration-00000/progress.json").read_text())
        assert (saved["score_means"], saved["score_deviations"]) == spread(scores.scores)
        assert state.load(ppo.run, ppo.trainable, ppo.optimizer, state.Progress()) == ppo.progress


def test_later_rollouts_are_normalised_by_the_first(lab, tmp_path):
    """Row 20: scores that are all 1 higher are 1/deviation higher, rather than centred again."""
    with lab.copy(tmp_path / "runs").ppo("ppo.kl_coef=0.06") as ppo:
        batch = ppo.rollout(quiet)
        scores = ppo.score(batch)
        _, before = ppo.advantages(batch, scores)
        ppo.progress.iteration = 1
        _, after = ppo.advantages(batch, scores._replace(scores=[[s + 1 for s in scores.scores[0]]]))
    gain = after["score/normalised"] - before["score/normalised"]
    assert gain == pytest.approx(1 / torch.tensor(scores.scores[0]).std().item(), rel=1e-4)
