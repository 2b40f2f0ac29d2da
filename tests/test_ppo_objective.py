"""What PPO's update minimises beside the clipped ratio: truncation, estimators, KL, entropy, demonstrations; early stop."""

import math
from dataclasses import replace

import pytest
import torch
from ppo_lab import assert_same, disturb, gradient, quiet, sampled

from rl.ppo import truncated
from rl.rollout import Batch
from rl.state import Progress
from rl.update import Scores
from truthward.tables import Ppo


@pytest.fixture(scope="module")
def start(lab):
    """A rollout with answers that end and others that don't, scored, before the first step."""
    with lab.ppo("ppo.group_size=2", "ppo.kl_coef=0.07") as ppo:
        batch, scores, _ = sampled(ppo)
        assert set(batch.finished.tolist()) == {True, False}
        yield ppo, batch, scores


@pytest.fixture(scope="module")
def moved(lab):
    """A run with demonstrations for ptx whose policy has moved."""
    demonstrations = f'ppo.ptx_data=["{lab.home}/demonstrations.jsonl"]'
    with lab.ppo("ppo.ptx_coef=0.5", demonstrations, "ppo.kl_coef=0.08", "ppo.temperature=0.8") as ppo:
        batch, scores, targets = sampled(ppo)
        disturb(ppo)
        yield ppo, batch, scores, targets


def advantages(start, batch=None, scores=None, **table):
    """Targets and metrics under another table, past the iteration that fixes the normalisation."""
    ppo, own, given = start
    kept, at = ppo.table, ppo.progress
    ppo.table = kept.model_copy(update=table)
    ppo.progress = replace(at, iteration=1, kl_coef=ppo.table.kl_coef)
    found = ppo.advantages(batch or own, scores or given)
    ppo.table, ppo.progress = kept, at
    return found


def normal(start) -> torch.Tensor:
    scores = torch.tensor(start[2].scores[0], dtype=torch.float64)
    return (scores - scores.mean()) / scores.std()


# --------------------------------------------------------------------------------------------- scores and their place


def test_truncation_hand_numbers():
    """Row 9: scores 2 and 2, the second cut off: a penalty of 1 gives 2 and 1, in its place 2 and -1, masked 2 and 2."""
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    got = {rule: truncated(scores, finished, rule, 1.0).tolist() for rule in ("penalty", "replace", "mask")}
    assert got == {"penalty": [2, 1], "replace": [2, -1], "mask": [2, 2]}


@pytest.mark.parametrize(("rule", "penalty"), [("penalty", 0.0), ("penalty", 2.5), ("replace", 1.5), ("mask", 1.0)])
def test_the_reward_is_the_score_at_the_last_token_by_the_rule_for_cut_off_answers(start, rule, penalty):
    """Rows 9, 10 and 20: without KL, lambda 0 and values of 0 each token's return is its own reward."""
    _, batch, _ = start
    table = {"truncation": rule, "truncation_penalty": penalty, "gae_lambda": 0.0, "kl_coef": 0.0}
    targets, _ = advantages(start, **table)
    expected = torch.zeros(batch.mask.shape)
    for i, (score, length, ended) in enumerate(zip(normal(start), batch.mask.sum(1), batch.finished, strict=True)):
        cut = {"penalty": score - penalty, "replace": -penalty, "mask": score}[rule]
        expected[i, length - 1] = score if ended else cut
    torch.testing.assert_close(targets.returns, expected, atol=1e-5, rtol=0)
    trained = batch.mask & batch.finished.unsqueeze(1) if rule == "mask" else batch.mask
    assert torch.equal(targets.mask, trained)


def test_an_answer_that_is_left_out_moves_nothing(start):
    """Row 9: with truncation = "mask" the gradient is that of the answers that ended, whatever the others' advantages."""
    ppo, batch, scores = start
    targets, _ = advantages(start, truncation="mask")
    ended = batch.finished.nonzero().flatten().tolist()
    ppo.progress.step = 1
    got, _ = gradient(ppo, batch, scores, targets._replace(advantages=targets.advantages + ~targets.mask * 5.0))
    expected, _ = gradient(ppo, batch, scores, targets, rows=ended)
    ppo.progress.step = 0
    for name, each in expected.items():
        torch.testing.assert_close(got[name], each, atol=1e-5 * max(1, each.abs().max().item()), rtol=0)


def test_advantages_are_whitened_over_the_whole_rollout(start):
    """Row 18: mean 0 and variance 1 over all tokens that are trained on; 0 at padding."""
    targets, _ = advantages(start)
    kept = targets.advantages[targets.mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (targets.advantages[~targets.mask] == 0).all()


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo"])
def test_answers_are_compared_by_score_less_their_whole_kl(start, estimator):
    """The return is score - beta * sum of the KL; every token of an answer has its answer's advantage."""
    _, batch, scores = start
    apart = scores._replace(ref_logprobs=scores.ref_logprobs - 0.3 * torch.rand(batch.mask.shape))
    targets, _ = advantages(start, scores=apart, advantage=estimator, kl_coef=0.5, truncation_penalty=0.0)
    kl = torch.where(batch.mask, apart.old_logprobs - apart.ref_logprobs, 0).sum(1)
    pairs = (normal(start) - 0.5 * kl.double()).view(-1, 2)
    half = (pairs - pairs.flip(1)) / 2
    expected = {"rloo": 2 * half, "dr_grpo": half, "grpo": half / (half.abs() * math.sqrt(2) + 1e-4)}[estimator]
    assert torch.equal(targets.advantages, targets.advantages[:, :1].expand(batch.mask.shape))
    torch.testing.assert_close(targets.advantages[:, 0].double(), expected.flatten(), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_count_answer_tokens_alone(start):
    """Rows 13, 38, 40 and 41: k1, k3, entropy, lengths and correlation by a loop over what counts; padding holds junk."""
    _, batch, scores = start
    junk = ~batch.mask * 50.0
    apart = scores._replace(ref_logprobs=scores.ref_logprobs - 0.3 * torch.rand(junk.shape) + junk)
    apart = apart._replace(entropy=scores.entropy + junk, values=scores.values + junk)
    _, got = advantages(start, scores=apart)
    where = batch.mask.nonzero().tolist()
    d = [(apart.old_logprobs[i, t] - apart.ref_logprobs[i, t]).item() for i, t in where]
    assert got["kl/k1"] == pytest.approx(math.fsum(d) / len(d), rel=1e-5)
    assert got["kl/k3"] == pytest.approx(math.fsum(math.exp(-x) + x - 1 for x in d) / len(d), rel=1e-4)
    assert got["kl/answer"] == pytest.approx(math.fsum(d) / 8, rel=1e-5)
    assert got["entropy"] == pytest.approx(math.fsum(apart.entropy[i, t].item() for i, t in where) / len(d), rel=1e-5)
    assert got["answers/tokens"] == len(d) / 8
    assert got["answers/ended"] == batch.finished.sum().item() / 8
    correlation = torch.corrcoef(torch.stack([normal(start), batch.mask.sum(1).double()]))[0, 1].item()
    assert got["score/length_correlation"] == pytest.approx(correlation, abs=1e-5)


def test_explained_variance_hand_number(start):
    """Row 40: R = [1, 2, 3], V = [1, 2, 2], here less 2: 1 - (2/9) / (2/3) = .666667. An offset of V costs nothing."""
    ppo, *_ = start
    zero = torch.zeros(3, 1)
    batch = Batch([[5]] * 3, [[2]] * 3, zero == 0, zero, torch.ones(3, dtype=torch.bool))
    scores = Scores([[1.0, 2.0, 3.0]], zero, zero, torch.tensor([[-1.0], [0], [0]]), zero)
    kept = ppo.progress
    ppo.progress = Progress(iteration=1, score_means=[2.0], score_deviations=[1.0])
    _, metrics = ppo.advantages(batch, scores)
    ppo.progress = kept
    assert metrics["value/explained"] == pytest.approx(2 / 3, abs=1e-5)


def test_groups_whose_answers_score_alike_are_counted(start):
    """Of four pairs, one of equal scores: a quarter; nothing is learned from it."""
    _, _, scores = start
    alike = scores._replace(scores=[[1.0, 1.0, *scores.scores[0][2:]]])
    _, metrics = advantages(start, scores=alike, advantage="grpo")
    assert metrics["groups/alike"] == 0.25


# ------------------------------------------------------------------------------------- terms that are added to the loss


def difference(moved, term: dict, without: dict) -> tuple[dict, dict]:
    """What a term adds to the policy's gradient."""
    ppo, batch, scores, targets = moved
    got, metrics = gradient(ppo, batch, scores, targets, **term)
    base, _ = gradient(ppo, batch, scores, targets, **without)
    return {n: got[n] - base[n] for n in ppo.actor_critic.trainable("policy")}, metrics


def expected(moved, total: torch.Tensor) -> dict:
    parameters = moved[0].actor_critic.trainable("policy")
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def rows_alone(ppo, pairs, temperature: float):
    """Log-probabilities over words ``[C, V]`` at each answer's tokens: row by row, through the adapter, with gradients."""
    model = ppo.actor_critic.model
    model.set_adapter("policy")
    for prompt, answer in pairs:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        yield (logits / temperature).log_softmax(-1), answer


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(moved):
    """Row 38: -coef * mean over tokens of -sum p log p of the distribution that is sampled from."""
    ppo, batch, *_ = moved
    got, _ = difference(moved, {"entropy_coef": 0.7}, {})
    entropy = sum(-(p.exp() * p).sum() for p, _ in rows_alone(ppo, zip(batch.prompts, batch.answers, strict=True), 0.8))
    assert_same(got, expected(moved, -0.7 * entropy / batch.mask.sum()), 2e-5)


def test_demonstrations_add_their_likelihood_and_nothing_else(moved, monkeypatch):
    """Row 37: gradient = sum; as many demonstrations as answers, at a temperature of 1, every token alike."""
    ppo, *_ = moved
    drawn: list = []
    import rl.update

    plant = rl.update.plant
    monkeypatch.setattr(rl.update, "plant", lambda items: (drawn.extend(items), plant(items))[1])
    monkeypatch.setattr(ppo.learner, "ptx", ppo.learner.ptx[:4])
    with_ptx, metrics = gradient(*moved, micro_batch_size=3)
    pairs = [(item.prompt, item.answers[0]) for item in drawn]
    monkeypatch.setattr(ppo.learner, "ptx", [])
    without, _ = gradient(*moved)
    assert len(pairs) == 8
    count = sum(len(answer) for _, answer in pairs)
    nll = sum(-p[torch.arange(len(a)), a].sum() for p, a in rows_alone(ppo, pairs, 1.0)) / count
    assert metrics["loss/ptx"] == pytest.approx(nll.item(), rel=1e-5)
    got = {n: with_ptx[n] - without[n] for n in ppo.actor_critic.trainable("policy")}
    assert_same(got, expected(moved, 0.5 * nll), 2e-5)


def test_demonstrations_do_not_depend_on_micro_batches(moved):
    """Row 28: the whole gradient, demonstrations included."""
    one, metrics = gradient(*moved, micro_batch_size=8)
    other, same = gradient(*moved, micro_batch_size=2)
    assert_same(other, one, 1e-5)
    assert same == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("form", ["k2", "k3"])
def test_the_kl_in_the_loss_is_added_with_its_coefficient(moved, form):
    """Row 12: beta * mean over tokens of the estimator, its ratio and all, by plain arithmetic."""
    ppo, batch, scores, _ = moved
    ppo.progress.kl_coef = 0.9
    got, _ = difference(moved, {"kl_form": form}, {})
    total = torch.zeros(())
    for i, (p, answer) in enumerate(rows_alone(ppo, zip(batch.prompts, batch.answers, strict=True), 0.8)):
        new = p[torch.arange(len(answer)), answer]
        ratio = (new - scores.old_logprobs[i, : len(answer)]).exp()
        d = new - scores.ref_logprobs[i, : len(answer)]
        each = ratio.detach() * d**2 / 2 if form == "k2" else ratio * ((-d).exp() - 1 + d)
        total = total + each.sum()
    assert_same(got, expected(moved, 0.9 * total / batch.mask.sum()), 5e-5)


def test_the_kl_stands_in_the_reward_or_in_the_loss_and_never_in_both(start):
    """Row 11: with an estimator in the loss the reward has no KL."""
    _, batch, scores = start
    apart = scores._replace(ref_logprobs=scores.ref_logprobs - 1.0)
    table = {"kl_coef": 0.5, "gae_lambda": 0.0, "truncation_penalty": 0.0}
    (inside, _), (outside, _) = (advantages(start, scores=apart, kl_form=form, **table) for form in ("reward", "k3"))
    torch.testing.assert_close(outside.returns - inside.returns, 0.5 * batch.mask.float(), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------- what iterations control


@pytest.mark.parametrize(("target", "moves"), [(0.0, 0), (1e-4, 1), (1e4, -1)])
def test_an_adaptive_kl_coefficient_follows_the_measured_kl(lab, tmp_path, target, moves):
    """Row 14: by a fifth of n / horizon either way: 8 answers of 80 are 2 %; a target of 0 leaves it fixed."""
    options = (
        f"ppo.kl_target={target}",
        "ppo.kl_horizon=80",
        "ppo.kl_coef=0.2",
        "ppo.learning_rate=1e-2",
        "ppo.target_kl=1e9",
    )
    with lab.copy(tmp_path / "runs").ppo(*options) as ppo:
        first = ppo.iterate(quiet)
        second = ppo.iterate(quiet)
    assert first["kl/coef"] == pytest.approx(0.2)
    start = 0.2 * (1 - 0.02 * (target > 0))  # the first KL is 0, below any target
    assert second["kl/coef"] == pytest.approx(start)
    assert second["kl/answer"] > 1e-3
    assert ppo.progress.kl_coef == pytest.approx(start * (1 + 0.02 * moves))


def test_a_policy_that_has_moved_too_far_ends_the_iteration(lab, tmp_path):
    """Row 35: before the first step KL(old || new) is 0, after it more than 1e-9, so the second of four is the last."""
    with lab.copy(tmp_path / "runs").ppo("ppo.target_kl=1e-9") as ppo:
        metrics = ppo.iterate(quiet)
    assert (metrics["steps"], metrics["stopped_early"]) == (2, 1.0)


def test_nothing_is_stopped_where_only_the_last_planned_step_went_too_far(lab, tmp_path):
    """Row 35: two steps, the second of which passes the target."""
    with lab.copy(tmp_path / "runs").ppo("ppo.target_kl=1e-9", "ppo.epochs=1") as ppo:
        metrics = ppo.iterate(quiet)
    assert (metrics["steps"], metrics["stopped_early"]) == (2, 0.0)


def test_the_defaults_are_those_of_the_field():
    """Rows 15, 22, 24 and 25: lambda .95, gamma 1, both clips .2, the value's weight .1; correction on, bonuses off."""
    table = Ppo()
    assert (table.gae_lambda, table.gamma, table.clip_range, table.value_clip_range) == (0.95, 1.0, 0.2, 0.2)
    assert (table.value_coef, table.tis_cap, table.entropy_coef, table.dual_clip) == (0.1, 2.0, 0.0, 0.0)
