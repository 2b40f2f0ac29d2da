"""One PPO iteration: it starts at ratio 1 and KL 0, and its gradient is that of plain loops, however it is batched."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rl.advantages import Advantages
from rl.ppo import PpoRun, Scores, _Means, prompt_order
from rl.rollout import Batch
from rl.state import Progress
from truthward.errors import TrainingFault
from truthward.models import load_head

TEMPERATURE = 0.7


def quiet(n: int) -> None:
    """A progress bar that isn't there."""


@pytest.fixture(scope="module", params=["dpo", "sft"])
def fresh(request, lab):
    """A run before its first step that starts from a DPO adapter, or from the base that all adapters share."""
    with lab.ppo(f"ppo.parent={request.param}") as ppo:
        yield ppo


@dataclass
class Moved:
    """A rollout, scored before the policy and the critic moved, and the run after they did."""

    ppo: PpoRun
    batch: Batch
    scores: Scores
    targets: Advantages
    metrics: dict[str, float]
    wide: tuple[Batch, Scores, Advantages]


@pytest.fixture(scope="module")
def moved(lab) -> Moved:
    with lab.ppo(f"ppo.temperature={TEMPERATURE}") as ppo:
        batch = ppo.rollout(quiet)
        assert set(batch.finished.tolist()) == {True, False}
        scores = ppo.score(batch)
        targets, metrics = ppo.advantages(batch, scores)
        wide = widen(batch, 3, 4)
        wide_scores = ppo.score(wide)
        wide_targets, _ = ppo.advantages(wide, wide_scores)
        disturb(ppo)
        yield Moved(ppo, batch, scores, targets, metrics, (wide, wide_scores, wide_targets))


def disturb(ppo: PpoRun) -> None:
    """Move everything that is trained, so that ratios leave 1, clips bite and values leave 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in ppo.trainable.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    ppo.progress.step = 1  # past the first step, at which the ratio has to be 1


def widen(batch: Batch, left: int, right: int) -> Batch:
    """The same answers with more padding on either side, filled with a token that means something."""
    answers = (F.pad(t, (0, right)) for t in (batch.answer_mask, batch.sampler_logprobs))
    return Batch(F.pad(batch.ids, (left, right), value=7), F.pad(batch.mask, (left, right)), *answers, batch.finished)


def gradient(ppo: PpoRun, batch, scores, targets, micro: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What one minibatch of all rows leaves in the parameters, and its metrics."""
    ppo.table, totals = ppo.table.model_copy(update={"micro_batch_size": micro}), _Means()
    ppo.optimizer.zero_grad()
    ppo._minibatch(batch, scores, targets, torch.arange(len(batch.ids)), totals)
    found = {n: p.grad.clone() for n, p in ppo.trainable.items()}
    ppo.optimizer.zero_grad()
    return found, totals.means()


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, f"{name} hardly has a gradient: nothing is compared"
        torch.testing.assert_close(got[name], gradient, atol=tolerance * max(1, gradient.abs().max().item()), rtol=0)


# --------------------------------------------------------------------------------------------------------- the start


def test_the_first_kl_is_exactly_zero(fresh):
    """Row 44: not to a tolerance, also where policy and reference are two copies of a DPO adapter."""
    scores = fresh.score(fresh.rollout(quiet))
    assert torch.equal(scores.old_logprobs, scores.ref_logprobs)
    assert scores.old_logprobs.abs().max() > 1


def test_a_dpo_adapter_is_in_use_where_the_run_starts_from_one(fresh):
    """Otherwise a KL of 0 would be no news: with adapters off the numbers are others."""
    batch, actor_critic = fresh.rollout(quiet), fresh.actor_critic
    with torch.no_grad():
        policy = actor_critic("policy", batch.ids, batch.mask, batch.answer).logprobs
        actor_critic.reference, kept = None, actor_critic.reference
        off = actor_critic("reference", batch.ids, batch.mask, batch.answer).logprobs
        actor_critic.reference = kept
    assert ((policy - off).abs().max() > 1) == (kept is not None)


def test_the_first_ratio_is_one(fresh):
    """Row 1: exactly for the rows that were scored together, to 1e-6 for any others; in train() mode, with gradients."""
    batch = fresh.rollout(quiet)
    scores = fresh.score(batch)
    assert fresh.actor_critic.training
    for rows, tolerance in ((torch.arange(2), 0.0), (torch.randperm(8)[:5], 1e-6)):
        new = fresh.actor_critic("policy", batch.ids[rows], batch.mask[rows], batch.answer).logprobs
        assert new.requires_grad
        off = torch.where(batch.answer_mask[rows], (new - scores.old_logprobs[rows]).exp() - 1, 0).abs().max()
        assert off.item() <= tolerance


def test_a_reference_that_is_not_the_start_stops_the_run(lab):
    """Row 44: what the run asserts can fail."""
    with lab.ppo("ppo.kl_coef=0.051") as ppo:
        batch = ppo.rollout(quiet)
        ppo.actor_critic._adapters["reference"][1].data += 0.1
        with pytest.raises(TrainingFault, match=r"KL\(policy"):
            ppo.advantages(batch, ppo.score(batch))


def test_a_first_ratio_that_is_not_one_stops_the_run(lab):
    """Row 1: old log-probabilities off by 1e-4."""
    with lab.ppo("ppo.kl_coef=0.052") as ppo:
        batch = ppo.rollout(quiet)
        scores = ppo.score(batch)
        targets, _ = ppo.advantages(batch, scores)
        with pytest.raises(TrainingFault, match="PPO's ratio must be 1"):
            ppo.update(batch, scores._replace(old_logprobs=scores.old_logprobs - 1e-4), targets)


def test_values_start_at_zero_on_the_preference_models_weights(fresh):
    """Row 26: a head of zeros over a copy of the preference model's adapter."""
    batch = fresh.rollout(quiet)
    assert (fresh.score(batch).values == 0).all()
    adapters = fresh.actor_critic._adapters
    assert all(torch.equal(v, r) for v, r in zip(adapters["value"], adapters["reward"], strict=True))
    assert all(v is not r for v, r in zip(adapters["value"], adapters["reward"], strict=True))
    head = load_head(fresh.run.parent("reward").model_dir)["weight"]
    assert torch.equal(fresh.actor_critic.reward_head.weight, head)


def test_there_is_no_dropout(fresh):
    """Row 30: no layer, no adapter, no attention drops anything, so train() and eval() are one function."""
    modules = list(fresh.actor_critic.modules())
    assert all(m.p == 0 for m in modules if isinstance(m, nn.Dropout))
    assert all(getattr(m, "attention_dropout", 0) == 0 for m in modules)
    assert all(config.lora_dropout == 0 for config in fresh.actor_critic.model.peft_config.values())
    batch = fresh.rollout(quiet)
    with torch.no_grad():
        for task in ("policy", "reference", "value", "reward"):
            one = fresh.actor_critic.train()(task, batch.ids, batch.mask, batch.answer)
            other = fresh.actor_critic.eval()(task, batch.ids, batch.mask, batch.answer)
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(torch.equal(a, b) for a, b in pairs)
    fresh.actor_critic.train()


# ------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_gradient_does_not_depend_on_micro_batches(moved, micro):
    """Row 28: 8 x 1 = 4 x 2 = 2 x 4 = 1 x 8, for policy, critic and value head, and so for the metrics."""
    whole, metrics = gradient(moved.ppo, moved.batch, moved.scores, moved.targets, 8)
    got, same = gradient(moved.ppo, moved.batch, moved.scores, moved.targets, micro)
    assert_same(got, whole, 1e-6)
    assert same == pytest.approx(metrics, rel=1e-4)
    assert 0.1 < metrics["clipped"] < 0.9


def test_the_gradient_does_not_depend_on_padding(moved):
    """Rows 5, 8, 17: three more columns of padding on the left and four on the right, scored anew."""
    batch, scores, targets = moved.wide
    torch.testing.assert_close(targets.advantages[:, : moved.batch.answer], moved.targets.advantages, atol=1e-5, rtol=0)
    assert (targets.advantages[:, moved.batch.answer :] == 0).all()
    assert scores.scores.tolist() == pytest.approx(moved.scores.scores.tolist(), abs=1e-5)
    expected, metrics = gradient(moved.ppo, moved.batch, moved.scores, moved.targets, 2)
    got, same = gradient(moved.ppo, batch, scores, targets, 2)
    assert_same(got, expected, 2e-5)  # the advantages themselves agree to about 1e-6
    assert same == pytest.approx(metrics, rel=1e-4)


def test_what_padding_holds_reaches_no_gradient(moved):
    """Row 17: advantages, returns, values and old log-probabilities of 3 at every padding position."""
    junk = ~moved.batch.answer_mask * 3.0
    scores = moved.scores._replace(old_logprobs=moved.scores.old_logprobs + junk, values=moved.scores.values + junk)
    targets = Advantages(moved.targets.advantages + junk, moved.targets.returns - junk)
    expected, metrics = gradient(moved.ppo, moved.batch, moved.scores, moved.targets, 4)
    got, same = gradient(moved.ppo, moved.batch, scores, targets, 4)
    assert_same(got, expected, 1e-6)
    assert same == pytest.approx(metrics, rel=1e-5)


def plain_losses(m: Moved, adapter: str) -> torch.Tensor:
    """The sum over answer tokens by rows and tokens: each row alone, without padding, through the model as it stands."""
    table, model, total = m.ppo.table, m.ppo.actor_critic.model, torch.zeros((), dtype=torch.float64)
    model.set_adapter(adapter)
    for i in range(len(m.batch.ids)):
        ids = m.batch.ids[i][m.batch.mask[i]].unsqueeze(0)
        length = int(m.batch.answer_mask[i].sum())
        first = ids.shape[1] - length
        out = model(input_ids=ids, output_hidden_states=True)
        for t in range(length):
            if adapter == "policy":
                logits = out.logits[0, first + t - 1].double() / TEMPERATURE
                new = logits[ids[0, first + t]] - logits.logsumexp(0)
                ratio, advantage = (new - m.scores.old_logprobs[i, t]).exp(), m.targets.advantages[i, t].item()
                held = ratio.clamp(1 - table.clip_range, 1 + table.clip_range)
                total = total + torch.maximum(-advantage * ratio, -advantage * held)
            else:
                head = m.ppo.actor_critic.value_head
                value = (head.weight[0] @ out.hidden_states[-1][0, first + t - 1] + head.bias[0]).double()
                old, target = m.scores.values[i, t].item(), m.targets.returns[i, t].item()
                held = value.clamp(old - table.value_clip_range, old + table.value_clip_range)
                total = total + 0.5 * torch.maximum((value - target) ** 2, (held - target) ** 2)
    return total


def test_the_gradient_is_that_of_plain_loops(moved):
    """Rows 3, 6, 22, 24, 25, 28: shift, temperature, both clips, the value's weight and the token count, all at once."""
    got, metrics = gradient(moved.ppo, moved.batch, moved.scores, moved.targets, 2)
    count = moved.batch.answer_mask.sum().item()
    expected = {}
    for adapter, weight in (("policy", 1.0), ("value", moved.ppo.table.value_coef)):
        loss = plain_losses(moved, adapter)
        assert metrics[f"loss/{adapter}"] == pytest.approx(loss.item() / count, rel=1e-4)
        parameters = {n: p for n, p in moved.ppo.trainable.items() if f".{adapter}." in n or n.startswith(f"{adapter}_head")}
        found = torch.autograd.grad(weight * loss / count, list(parameters.values()))
        expected |= dict(zip(parameters, found, strict=True))
    moved.ppo.actor_critic._settle()
    assert_same(got, expected, 1e-5)


def test_what_the_sampler_thought_does_not_matter(moved):
    """Row 2: sampler log-probabilities off by 3, now up, now down, change the reported gap and nothing else."""
    b = moved.batch
    off = 3 * (-1.0) ** torch.arange(b.answer)
    wrong = replace(b, sampler_logprobs=b.sampler_logprobs + off * b.answer_mask)
    targets, metrics = moved.ppo.advantages(wrong, moved.scores)
    assert metrics.pop("sampler_gap") == pytest.approx(3, abs=1e-4)
    assert metrics == {k: v for k, v in moved.metrics.items() if k != "sampler_gap"}
    assert moved.metrics["sampler_gap"] < 1e-5
    assert torch.equal(targets.advantages, moved.targets.advantages)


@torch.no_grad()
def alone(model, m: Moved, i: int) -> torch.Tensor:
    """Log-probabilities over words ``[C, V]`` that predict row i's answer, without padding, in float64."""
    ids = m.batch.ids[i][m.batch.mask[i]]
    length = int(m.batch.answer_mask[i].sum())
    return (model(input_ids=ids.unsqueeze(0)).logits[0].double() / TEMPERATURE).log_softmax(-1)[-length - 1 : -1]


def gaps(m: Moved) -> torch.Tensor:
    """How far the sampler's plain weights are from the adapter's forward, for every answer token."""
    with torch.no_grad():
        expected = m.ppo.actor_critic("policy", m.batch.ids, m.batch.mask, m.batch.answer).logprobs.double()
    found = torch.zeros_like(expected)
    for i, mask in enumerate(m.batch.answer_mask):
        ids = m.batch.ids[i, -m.batch.answer :][mask].unsqueeze(1)
        found[i, mask] = alone(m.ppo.sampler.model, m, i).gather(1, ids).squeeze(1)
    return (found - expected)[m.batch.answer_mask].abs()


def test_the_refreshed_sampler_is_the_adapters_forward(moved):
    """Plain weights base + B A against the LoRA forward; before the refresh they are not the same."""
    assert gaps(moved).max() > 0.1
    moved.ppo.sampler.refresh()
    assert gaps(moved).mean() < 1e-5
    assert gaps(moved).max() < 1e-4


def test_the_entropy_is_that_of_the_sampled_distribution(moved):
    """Rows 3 and 38: of softmax(z/T) at every answer token, row by row."""
    entropy, model = moved.ppo.score(moved.batch).entropy, moved.ppo.actor_critic.model
    model.set_adapter("policy")
    for i, mask in enumerate(moved.batch.answer_mask):
        logprobs = alone(model, moved, i)
        assert entropy[i, mask].tolist() == pytest.approx(-(logprobs.exp() * logprobs).sum(-1), abs=1e-4)
    moved.ppo.actor_critic._settle()


# ---------------------------------------------------------------------------------------------- rewards and advantages


def returns(m: Moved, batch: Batch, **table) -> torch.Tensor:
    """Returns with lambda 0, no KL and values of zero: each token's own reward."""
    kept = m.ppo.table
    m.ppo.table = kept.model_copy(update={"gae_lambda": 0.0, "kl_coef": 0.0, **table})
    targets, _ = m.ppo.advantages(batch, m.scores)
    m.ppo.table = kept
    return targets.returns


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_the_reward_is_the_normalised_score_less_the_penalty_at_the_last_token(moved, penalty):
    """Rows 9, 10, 20: (s - mean) / std of the first rollout, less the penalty where the answer did not end, nothing else."""
    scores, b = moved.scores.scores.double(), moved.batch
    normal = (scores - scores.mean()) / scores.std()
    expected = torch.zeros(b.answer_mask.shape)
    for i, length in enumerate(b.answer_mask.sum(1).tolist()):
        expected[i, length - 1] = normal[i] - (0 if b.finished[i] else penalty)
    torch.testing.assert_close(returns(moved, b, truncation_penalty=penalty), expected, atol=1e-5, rtol=0)


def test_later_rollouts_are_normalised_by_the_first(moved):
    """Row 20: scores that are all 1 higher are 1/std higher, rather than centred again."""
    progress = moved.ppo.progress
    progress.iteration = 1
    better = moved.scores._replace(scores=moved.scores.scores + 1)
    _, metrics = moved.ppo.advantages(moved.batch, better)
    progress.iteration = 0
    gain = metrics["score/normalised"] - moved.metrics["score/normalised"]
    assert gain == pytest.approx(1 / moved.scores.scores.std().item(), rel=1e-4)


def test_advantages_are_whitened_over_the_whole_rollout(moved):
    """Row 18: mean 0 and variance 1 over all answer tokens; 0 at padding."""
    advantages = moved.targets.advantages[moved.batch.answer_mask]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (moved.targets.advantages[~moved.batch.answer_mask] == 0).all()


def test_metrics_count_answer_tokens_alone(moved):
    """Rows 13, 38, 40: k1, k3, entropy and lengths by a loop over the tokens that count; padding holds junk."""
    b, progress = replace(moved.batch, finished=torch.arange(8) < 3), moved.ppo.progress
    junk = ~b.answer_mask * 50.0
    apart = moved.scores._replace(ref_logprobs=moved.scores.ref_logprobs - 0.3 * torch.rand(junk.shape) + junk)
    apart = apart._replace(entropy=moved.scores.entropy + junk, values=moved.scores.values + junk)
    progress.iteration = 1  # past the iteration at which the KL has to be 0
    _, got = moved.ppo.advantages(b, apart)
    progress.iteration = 0
    where = b.answer_mask.nonzero().tolist()
    d = [(apart.old_logprobs[i, t] - apart.ref_logprobs[i, t]).item() for i, t in where]
    assert got["kl/k1"] == pytest.approx(math.fsum(d) / len(d), rel=1e-5)
    assert got["kl/k3"] == pytest.approx(math.fsum(math.exp(-x) + x - 1 for x in d) / len(d), rel=1e-4)
    assert got["entropy"] == pytest.approx(math.fsum(apart.entropy[i, t].item() for i, t in where) / len(d), rel=1e-5)
    assert got["answers/tokens"] == len(d) / 8
    assert got["answers/ended"] == 3 / 8
    lengths = b.answer_mask.sum(1).double()
    correlation = torch.corrcoef(torch.stack([apart.scores.double(), lengths]))[0, 1].item()
    assert got["score/length_correlation"] == pytest.approx(correlation, abs=1e-5)


def test_explained_variance_hand_number(moved):
    """Row 40: R = [1, 2, 3], V = [1, 2, 2], here less 2: 1 - (2/9) / (2/3) = .666667. An offset of V costs nothing."""
    one = torch.ones(3, 1, dtype=torch.bool)
    batch = Batch(torch.ones(3, 1).long(), one, one, torch.zeros(3, 1), one.squeeze(1))
    scores = Scores(
        torch.tensor([1.0, 2.0, 3.0]), *torch.zeros(2, 3, 1), torch.tensor([[-1.0], [0], [0]]), torch.zeros(3, 1)
    )
    kept = moved.ppo.progress
    moved.ppo.progress = Progress(iteration=1, score_mean=2.0, score_std=1.0)
    _, metrics = moved.ppo.advantages(batch, scores)
    moved.ppo.progress = kept
    assert metrics["value/explained"] == pytest.approx(2 / 3, abs=1e-5)


def test_an_iterations_rollout_is_the_same_whenever_it_is_made(fresh):
    """Row 42: seeded by recipe seed, iteration and prompt; the same prompt in a later iteration gets another answer."""
    one, again = fresh.rollout(quiet), fresh.rollout(quiet)
    assert torch.equal(one.ids, again.ids)
    first = prompt_order(len(fresh.prompts), 0, 8, fresh.recipe.seed)
    changed = []
    for iteration in range(1, 6):
        fresh.progress.iteration = iteration
        other = fresh.rollout(quiet)
        rows = prompt_order(len(fresh.prompts), iteration, 8, fresh.recipe.seed)
        for k in (k for k in range(8) if rows[k] == first[k]):
            changed.append(one.ids[k][one.mask[k]].tolist() != other.ids[k][other.mask[k]].tolist())
    fresh.progress.iteration = 0
    assert any(changed)  # a sharp model may well give one of them again
