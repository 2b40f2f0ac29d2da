"""``python -m rl.ppo RECIPE``: proximal policy optimisation against the preference model, a plain loop on Accelerate.

Each iteration: rollout -> score -> advantages -> update. The first ratio must be 1 and the first KL 0; the run asserts
both. Old log-probabilities are recomputed with the training forward, so what the sampler thought does not matter.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rl import state
from rl.actor_critic import ActorCritic
from rl.advantages import Advantages, approximate_kl, gae, token_rewards, whiten
from rl.losses import ppo_loss, value_loss
from rl.rollout import Batch, Sampler, draw_seed
from truthward import chat, hardware, models
from truthward.console import progress, say
from truthward.errors import UserError
from truthward.guard import check_finite, check_start
from truthward.ledger import Run, whole_directory
from truthward.recipe import Ppo, Recipe
from truthward.records import Prompt, read_rows
from truthward.stage import main
from truthward.tensors import masked_mean, masked_sum
from truthward.tracking import Tracker, read_metrics, tracked
from truthward.trainers import refuse_long


class Scores(NamedTuple):
    """What the models say of a rollout. ``[B]`` scores, ``[B, C]`` the rest; no gradients."""

    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor


class PpoRun:
    """The state of a PPO run and its four steps."""

    def __init__(self, recipe: Recipe, this: Run) -> None:
        self.recipe, self.run, self.table = recipe, this, recipe.ppo
        base, reward = this.parent("model"), this.parent("reward")
        start = this.parent("start") if "start" in this.manifest["parents"] else None
        self.tokenizer = models.load_tokenizer(base)
        self.prompts = [chat.prompt_ids(self.tokenizer, chat.user(p.prompt)) for p in read_rows(self.table.prompts, Prompt)]
        refuse_long([len(p) for p in self.prompts], self.table.max_prompt_tokens, "prompts", "ppo.max_prompt_tokens")
        self.dtype, compute = hardware.set_up(recipe.model, this)
        say(f"  {len(self.prompts)} prompts, {self.table.rollouts} rollouts an iteration; {compute}")
        actor_critic = ActorCritic(
            models.load(base, self.dtype),
            reward.model_dir,
            start.model_dir if start else None,
            rank=self.table.lora_rank,
            alpha=self.table.lora_alpha,
            temperature=self.table.temperature,
        )
        self.trainable = actor_critic.trainable()
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=self.table.learning_rate, eps=1e-5, weight_decay=0.0)
        self.progress = state.load(this, self.trainable, self.optimizer)
        self.sampler = Sampler(
            actor_critic.model,
            self.tokenizer,
            max_new_tokens=self.table.max_new_tokens,
            temperature=self.table.temperature,
        )
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.actor_critic, self.optimizer = self.accelerator.prepare(actor_critic, self.optimizer)
        self.actor_critic.train()  # there is no dropout: training and sampling are the same function

    def iterate(self, bar: Any) -> dict[str, Any]:
        """One iteration; returns its metrics."""
        times, clock = {}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            times[f"seconds/{name}"], clock = time.perf_counter() - clock, time.perf_counter()

        batch = self.rollout(bar)
        lap("rollout")
        scores = self.score(batch)
        lap("score")
        targets, metrics = self.advantages(batch, scores)
        metrics |= self.update(batch, scores, targets)
        lap("update")
        self.progress.iteration += 1
        return {**metrics, **times}

    def rollout(self, bar: Any) -> Batch:
        """Sample answers to this iteration's prompts, each with a seed of its own."""
        iteration = self.progress.iteration
        rows = prompt_order(len(self.prompts), iteration, self.table.rollouts, self.recipe.seed)
        self.sampler.refresh()
        seeds = [draw_seed(self.recipe.seed, iteration, k, row) for k, row in enumerate(rows)]
        return self.sampler.sample([self.prompts[r] for r in rows], seeds, tick=bar)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Preference scores, policy and reference log-probabilities, and values, by the forward that training uses."""
        pieces = []
        for rows in torch.arange(len(batch.ids)).split(self.table.micro_batch_size):
            ids, mask = self._rows(batch, rows)
            policy = self.actor_critic("policy", ids, mask, batch.answer)
            reference = self.actor_critic("reference", ids, mask, batch.answer)
            value = self.actor_critic("value", ids, mask, batch.answer)
            score = self.actor_critic("reward", ids, mask, batch.answer)
            pieces.append(Scores(score, policy.logprobs, reference.logprobs, value, policy.entropy))
        return Scores(*(torch.cat(parts).cpu() for parts in zip(*pieces, strict=True)))

    def advantages(self, batch: Batch, scores: Scores) -> tuple[Advantages, dict[str, float]]:
        """Normalise scores by the first rollout's, take off the KL, and estimate whitened advantages."""
        table, mask = self.table, batch.answer_mask
        if self.progress.iteration == 0:
            self.progress.score_mean, self.progress.score_std = scores.scores.mean().item(), scores.scores.std().item()
        normal = (scores.scores - self.progress.score_mean) / max(self.progress.score_std, 1e-6)
        normal = normal - table.truncation_penalty * (~batch.finished).float()
        rewards = token_rewards(normal, scores.old_logprobs, scores.ref_logprobs, mask, kl_coef=table.kl_coef)
        raw = gae(rewards, scores.values, mask, gamma=table.gamma, gae_lambda=table.gae_lambda)
        lengths = mask.sum(1).float()
        log_ratio = scores.old_logprobs - scores.ref_logprobs
        spread, missed = _variance(raw.returns, mask), _variance(raw.returns - scores.values, mask)
        metrics = {
            "score/raw": scores.scores.mean(),
            "score/normalised": normal.mean(),
            "kl/k1": masked_mean(log_ratio, mask),
            "kl/k3": masked_mean(approximate_kl(log_ratio), mask),
            "entropy": masked_mean(scores.entropy, mask),
            "answers/tokens": lengths.mean(),
            "answers/ended": batch.finished.float().mean(),
            "sampler_gap": masked_mean((scores.old_logprobs - batch.sampler_logprobs).abs(), mask),
            "value/explained": 1 - missed / spread.clamp(min=1e-8),
            "score/length_correlation": _correlation(scores.scores, lengths),
        }
        if self.progress.iteration == 0:
            largest = torch.where(mask, log_ratio.abs(), 0).max().item()
            check_start("KL(policy || reference)", largest, 0.0, 1e-6 if self.dtype == torch.float32 else 0.25, self.run)
        return Advantages(whiten(raw.advantages, mask), raw.returns), {k: v.item() for k, v in metrics.items()}

    def update(self, batch: Batch, scores: Scores, targets: Advantages) -> dict[str, float]:
        """Passes of minibatches; stops early when the policy has moved ``target_kl`` from where it sampled."""
        table, totals, steps = self.table, _Means(), 0
        size = len(batch.ids) // table.minibatches
        for epoch in range(table.epochs):
            generator = torch.Generator().manual_seed(draw_seed(self.recipe.seed, "pass", self.progress.iteration, epoch))
            for rows in torch.randperm(len(batch.ids), generator=generator).split(size):
                self._set_rate()
                moved = self._minibatch(batch, scores, targets, rows, totals)
                norm = self.accelerator.clip_grad_norm_(self.trainable.values(), table.max_grad_norm)
                check_finite("gradient norm", float(norm), self.progress.step, self.run)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.progress.step += 1
                steps += 1
                totals.add("grad_norm", float(norm), 1)
                if moved > table.target_kl:
                    return {**totals.means(), "steps": steps, "stopped_early": 1.0}
        return {**totals.means(), "steps": steps, "stopped_early": 0.0}

    def _minibatch(self, batch: Batch, scores: Scores, targets: Advantages, rows: Tensor, totals: _Means) -> float:
        """Gradients of one optimizer step; both losses are sums over tokens divided by the minibatch's token count."""
        table, count = self.table, batch.answer_mask[rows].sum()
        moved = 0.0
        for micro in rows.split(table.micro_batch_size):
            ids, full_mask = self._rows(batch, micro)
            mask = batch.answer_mask[micro].to(ids.device)
            old, advantages, returns, values = (
                t[micro].to(ids.device) for t in (scores.old_logprobs, targets.advantages, targets.returns, scores.values)
            )
            policy = self.actor_critic("policy", ids, full_mask, batch.answer)
            loss = ppo_loss(policy.logprobs, old, advantages, clip_range=table.clip_range)
            policy_total = masked_sum(loss.losses, mask)
            self.accelerator.backward(policy_total / count)
            value = self.actor_critic("value", ids, full_mask, batch.answer)
            critic = value_loss(value, values, returns, clip_range=table.value_clip_range)
            value_total = masked_sum(critic.losses, mask)
            self.accelerator.backward(table.value_coef * value_total / count)
            if self.progress.step == 0:
                off = torch.where(mask, (loss.ratio - 1).abs(), 0).max().item()
                check_start("PPO's ratio", 1 + off, 1.0, 1e-5 if self.dtype == torch.float32 else 0.25, self.run)
            kl = masked_sum(approximate_kl(old - policy.logprobs.detach()), mask).item()
            moved += kl / count.item()
            tokens = mask.sum().item()
            totals.add("loss/policy", policy_total.item(), tokens)
            totals.add("loss/value", value_total.item(), tokens)
            totals.add("clipped", masked_sum(loss.clipped.float(), mask).item(), tokens)
            totals.add("kl/old_new", kl, tokens)
        return moved

    def _rows(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        return batch.ids[rows].to(self.accelerator.device), batch.mask[rows].to(self.accelerator.device)

    def _set_rate(self) -> None:
        total = self.table.iterations * self.table.epochs * self.table.minibatches
        for group in self.optimizer.param_groups:
            group["lr"] = self.table.learning_rate * max(0.0, 1 - self.progress.step / total)


class _Means:
    """Token-weighted means over micro-batches: sums and counts, divided once."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        return {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}


def prompt_order(prompts: int, iteration: int, rollouts: int, seed: int) -> list[int]:
    """Which prompts an iteration takes: a seeded shuffle of all, then the next shuffle; nothing is skipped."""
    rows: list[int] = []
    for position in range(iteration * rollouts, (iteration + 1) * rollouts):
        epoch, offset = divmod(position, prompts)
        generator = torch.Generator().manual_seed(draw_seed(seed, "prompts", epoch))
        rows.append(int(torch.randperm(prompts, generator=generator)[offset]))
    return rows


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt().clamp(min=1e-8)


def train(ppo: PpoRun, tracker: Tracker, table: Ppo) -> None:
    """All iterations that are left, with a checkpoint after each."""
    tracker.resume_at(ppo.progress.iteration)
    with progress() as bars:
        task = bars.add_task("ppo", total=table.iterations, completed=ppo.progress.iteration)
        sampling = bars.add_task("  rollout", total=table.rollouts)
        while ppo.progress.iteration < table.iterations:
            bars.reset(sampling)
            metrics = ppo.iterate(lambda n: bars.advance(sampling, n))
            tracker.log(ppo.progress.iteration, metrics)  # before the checkpoint: a row too many is dropped on resume
            state.save(ppo.run, ppo.progress, ppo.trainable, ppo.optimizer)
            bars.update(task, completed=ppo.progress.iteration, description=f"ppo score {metrics['score/normalised']:+.2f}")


def run(recipe: Recipe, this: Run) -> None:
    """Train the policy and write it, and the critic beside it."""
    if recipe.launch.ranks > 1:
        raise UserError("PPO runs on one process for now", where="launch.ranks", fix="set launch.ranks = 1 for this stage")
    with tracked(recipe, this) as tracker:
        ppo = PpoRun(recipe, this)
        train(ppo, tracker, recipe.ppo)
        actor_critic = ppo.accelerator.unwrap_model(ppo.actor_critic)
        for name, folder in (("value", this.path / "critic"), ("policy", this.model_dir)):
            with whole_directory(folder) as target:
                actor_critic.save_adapter(name, target)
                if name == "value":
                    models.save_head(target, weight=actor_critic.value_head.weight, bias=actor_critic.value_head.bias)
    rows = read_metrics(this)
    keep = ("score/raw", "score/normalised", "kl/k3", "entropy", "answers/tokens", "answers/ended")
    this.finish(metrics={"first": {k: rows[0][k] for k in keep}, "last": {k: rows[-1][k] for k in keep}})


if __name__ == "__main__":
    main("ppo", run)
