"""``python -m rl.ppo RECIPE``: proximal policy optimisation (or RLOO, GRPO) against rewards, a plain loop over all ranks.

Each iteration: rollout -> score -> advantages -> update. The first ratio must be 1 and the first KL 0; the run asserts
both. Old log-probabilities are recomputed with the training forward; where the sampler's differ, a weight corrects for it.
``docs/ppo.md`` explains every detail and metric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl import state
from rl.actor_critic import ActorCritic
from rl.advantages import (
    Advantages,
    adapted_kl_coef,
    approximate_kl,
    dr_grpo,
    gae,
    grpo,
    rloo,
    token_rewards,
    whiten,
)
from rl.probe import Probe
from rl.rewards import combine, open_sources, spread
from rl.rollout import Batch, Engine, Sampler, draw_seed, joined, my_share, prompt_order
from rl.stepping import stepper
from rl.update import Learner, Scores, Targets
from rl.work import Work
from truthward import chat, hardware, models, ranks
from truthward.branches import Item
from truthward.console import progress, say
from truthward.errors import UserError
from truthward.guard import check_start
from truthward.guard import rules as watched
from truthward.guard.detectors import repeated_share
from truthward.guard.interruptions import Watchdog, stop_on_request
from truthward.guard.ranks import check_ranks
from truthward.guard.watch import Guard
from truthward.ledger import Run
from truthward.records import Prompt, read_demonstrations, read_rows
from truthward.stage import main
from truthward.tables import Ppo, Recipe
from truthward.tensors import masked_mean
from truthward.tracking import Tracker, read_metrics, tracked
from truthward.trainers import refuse_long

ANOTHER = 0.5  # nats a token between sampler and trainer that no rounding explains
COMPARED = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}  # estimators that need no critic


class PpoRun:
    """The state of a PPO run and its four steps."""

    def __init__(self, recipe: Recipe, this: Run) -> None:
        self.recipe, self.run, self.table = recipe, this, recipe.ppo
        self.guard = Guard(recipe.guard, this, watched.PPO)
        table, parents, base = recipe.ppo, this.manifest["parents"], this.parent("model")
        self.tokenizer = models.load_tokenizer(base)
        self.texts = [p.prompt for p in read_rows(table.prompts, Prompt)]
        self.prompts = [chat.prompt_ids(self.tokenizer, chat.user(text)) for text in self.texts]
        refuse_long([len(p) for p in self.prompts], table.max_prompt_tokens, "prompts", "ppo.max_prompt_tokens")
        ptx = _demonstrations(self.tokenizer, table.ptx_data)
        self.dtype, compute = hardware.set_up(recipe.model, this)
        say(f"  {len(self.prompts)} prompts, {table.rollouts} rollouts an iteration; {compute}")
        self.device = hardware.device()
        self.sources = open_sources(table.rewards, self.dtype, self.device)
        torch.manual_seed(draw_seed(recipe.seed, "adapters"))  # new ones are drawn, and again when a run resumes
        full = table.tune == "full"  # it begins with a copy of every weight, whole
        actor_critic = ActorCritic(
            models.load(base, self.dtype) if full else models.load_cut(base, self.dtype, recipe.launch),
            this.parent("reward").model_dir if "reward" in parents else None,
            this.parent("start").model_dir if "start" in parents else None,
            critic=table.advantage == "gae",
            full=full,
            rank=table.lora_rank,
            alpha=table.lora_alpha,
            temperature=table.temperature,
            recompute=recipe.launch.gradient_checkpointing,
        )
        parts = [part for part in (actor_critic.trainable("policy"), actor_critic.trainable("value")) if part]
        self.trainable = {name: parameter for part in parts for name, parameter in part.items()}
        groups = [{"params": list(part.values())} for part in parts]
        optimizer = torch.optim.AdamW(groups, lr=table.learning_rate, eps=1e-5, weight_decay=0.0)
        self.sampler = self._engine(actor_critic)
        critic, scored = table.advantage == "gae", "reward" in parents
        self.work = Work(actor_critic.policy_shell(), self.dtype, full=full, critic=critic, scored=scored)
        module = actor_critic.to(self.device).train()  # there is no dropout: training and sampling are the same function
        self.stepper = stepper(module, optimizer, table.max_grad_norm, recipe.launch, self.dtype, table.micro_batch_size)
        self.actor_critic, self.optimizer = self.stepper.module, self.stepper.optimizer
        self.restore()
        self.learner = Learner(self, ptx)
        self.probe = Probe(recipe, self.actor_critic, self.tokenizer, self.device)

    def _engine(self, actor_critic: ActorCritic) -> Engine:
        """Who samples, as the recipe says."""
        table = self.table
        limits: dict[str, Any] = {"max_new_tokens": table.max_new_tokens, "temperature": table.temperature}
        if table.engine == "local":
            return Sampler(actor_critic, self.tokenizer, precision=table.sampler, **limits)
        from rl.served import Adapters, Served, Weights

        url = table.engine_url
        deliver = Weights(url, self.device) if table.engine == "vllm" else Adapters(url, self.run.path / "served")
        return Served(actor_critic, self.tokenizer, url=url, deliver=deliver, **limits)

    def restore(self) -> None:
        """Go to the newest checkpoint that is whole, or stand at the beginning."""
        fresh = state.Progress(kl_coef=self.table.kl_coef)
        self.progress = state.load(self.run, self.trainable, self.optimizer, fresh)

    def save(self) -> None:
        """Write a checkpoint of ranks that agree, and how long the run took so far."""
        check_ranks(self.progress.iteration, (p for p in self.trainable.values() if not hasattr(p, "ds_id")), self.run)
        state.save(self.run, self.progress, self.trainable, self.optimizer)
        self.run.record()

    def iterate(self, bar: Any) -> dict[str, Any]:
        """One iteration; returns its metrics."""
        self.work.begin()
        batch = self.rollout(bar)
        self.work.lap("rollout", self.work.rollout(batch))
        scores = self.score(batch)
        self.work.lap("score", self.work.score(batch))
        targets, metrics = self.advantages(batch, scores)
        metrics |= self.learner.update(batch, scores, targets, self.progress)
        self.work.lap("update", self.work.update(batch, metrics["steps"] / self.table.minibatches))
        if self.table.kl_target:
            self.progress.kl_coef = adapted_kl_coef(
                self.progress.kl_coef,
                metrics["kl/answer"],
                target=self.table.kl_target,
                horizon=self.table.kl_horizon,
                answers=len(batch.answers),
            )
        self.progress.iteration += 1
        return {**metrics, **self.probe.after(self.progress.iteration), **self.work.metrics}

    def rollout(self, bar: Any) -> Batch:
        """Sample ``group_size`` answers to each of this iteration's prompts, each answer with a seed of its own."""
        table, iteration, seed = self.table, self.progress.iteration, self.recipe.seed
        chosen = prompt_order(len(self.prompts), iteration, table.rollouts // table.group_size, seed)
        rows = [row for row in chosen for _ in range(table.group_size)]
        self.sampler.refresh()
        seeds = [draw_seed(seed, iteration, k, row) for k, row in enumerate(rows)]
        mine = my_share(len(rows))
        batch = self.sampler.sample([self.prompts[r] for r in rows[mine]], seeds[mine], tick=bar)
        self.sampler.release()  # the policy is about to change, and the update needs the memory
        return joined(ranks.gather(batch))  # every rank knows all answers, so that whatever is said of them is global

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores of each reward, policy and reference log-probabilities, and values, by the forward that training uses."""
        mine = torch.arange(len(batch.answers))[my_share(len(batch.answers))]
        old, ref, values, entropy = torch.zeros(4, *batch.mask.shape)
        preference: list[float] = []
        for rows in mine.split(self.table.micro_batch_size):
            forest, where = batch.forest(rows.tolist()).to(self.device), batch.mask[rows]
            policy = self.actor_critic("policy", forest, entropy=True)
            found = {old: policy.logprobs, entropy: policy.entropy, ref: self.actor_critic("reference", forest).logprobs}
            if self.table.advantage == "gae":
                found[values] = self.actor_critic("value", forest)
            for target, flat in found.items():
                target[rows] = target[rows].masked_scatter(where, flat.cpu())
            if "reward" in self.table.rewards:
                preference += self.actor_critic("reward", forest).tolist()
        scores = self._ask(batch, mine.tolist()) | {"reward": preference}
        found_here = [scores[name] for name in self.table.rewards], *(t[mine] for t in (old, ref, values, entropy))
        each, *tensors = zip(*ranks.gather(found_here), strict=True)
        return Scores([sum(parts, []) for parts in zip(*each, strict=True)], *map(torch.cat, tensors))

    def _ask(self, batch: Batch, rows: list[int]) -> dict[str, list[float]]:
        """Scores of the rewards that read text, by name."""
        if not self.sources:
            return {}
        text_of = {tuple(ids): text for ids, text in zip(self.prompts, self.texts, strict=True)}
        texts = [text_of[tuple(batch.prompts[row])] for row in rows]
        ids = [batch.answers[row] for row in rows]
        answers = [chat.decode(self.tokenizer, each) for each in ids]
        return {name: source(texts, answers, ids) for name, source in self.sources.items()}

    def advantages(self, batch: Batch, scores: Scores) -> tuple[Targets, dict[str, float]]:
        """Normalise scores by the first rollout's, take off the KL, and estimate advantages."""
        table, mask, at = self.table, batch.mask, self.progress
        if at.iteration == 0:
            at.score_means, at.score_deviations = spread(scores.scores)
            self._check_first_kl(scores, mask)
        weights = table.reward_weights or [1.0] * len(table.rewards)
        normal = combine(
            scores.scores, at.score_means, at.score_deviations, weights, hard=table.hard_rewards, clip=table.score_clip
        )
        total = truncated(normal, batch.finished, table.truncation, table.truncation_penalty)
        beta = at.kl_coef if table.kl_form == "reward" else 0.0
        rewards = token_rewards(total, scores.old_logprobs, scores.ref_logprobs, mask, kl_coef=beta)
        trained = mask & batch.finished.unsqueeze(1) if table.truncation == "mask" else mask
        if table.advantage == "gae":
            raw = gae(rewards, scores.values, mask, gamma=table.gamma, gae_lambda=table.gae_lambda)
            targets = Targets(whiten(raw.advantages, trained), raw.returns, trained)
        else:
            whole = COMPARED[table.advantage](rewards.sum(1), table.group_size)
            raw = Advantages(whole.unsqueeze(1).expand(mask.shape), rewards)
            targets = Targets(*raw, trained)
        return targets, self._metrics(batch, scores, normal, raw)

    def _check_first_kl(self, scores: Scores, mask: Tensor) -> None:
        largest = torch.where(mask, (scores.old_logprobs - scores.ref_logprobs).abs(), 0).max().item()
        close = 1e-6 if self.table.tune == "lora" else 1e-3  # merged weights against an adapter: rounding
        tolerance = close if self.dtype == torch.float32 else 0.25
        check_start("KL(policy || reference)", largest, 0.0, tolerance, self.run)

    def _check_engine(self, gap: float) -> None:
        """The gap to a server is rounding; where it is more, the server samples from another model."""
        if gap > ANOTHER:
            what = f"its log-probabilities are {gap:.2f} nats a token from the policy's"
            fix = "serve the model that this policy starts from (truthward export), in its compute type"
            raise UserError(what, where=self.table.engine_url, fix=fix)

    def _metrics(self, batch: Batch, scores: Scores, normal: Tensor, raw: Advantages) -> dict[str, float]:
        mask, lengths = batch.mask, batch.mask.sum(1).float()
        log_ratio = scores.old_logprobs - scores.ref_logprobs
        gap = scores.old_logprobs - batch.sampler_logprobs
        if self.table.engine != "local":
            self._check_engine(masked_mean(gap.abs(), mask).item())
        metrics = {f"score/{n}": torch.tensor(s).mean() for n, s in zip(self.table.rewards, scores.scores, strict=True)}
        metrics |= {
            "score/normalised": normal.mean(),
            "score/length_correlation": _correlation(normal, lengths),
            "kl/k1": masked_mean(log_ratio, mask),
            "kl/k3": masked_mean(approximate_kl(log_ratio), mask),
            "kl/answer": torch.where(mask, log_ratio, 0).sum(1).mean(),
            "kl/coef": torch.tensor(self.progress.kl_coef),
            "entropy": masked_mean(scores.entropy, mask),
            "answers/tokens": lengths.mean(),
            "answers/ended": batch.finished.float().mean(),
            "answers/repeated": torch.tensor([repeated_share(ids) for ids in batch.answers]).mean(),
            "sampler_gap": masked_mean(gap.abs(), mask),
        }
        if self.table.advantage == "gae":
            spread_, missed = _variance(raw.returns, mask), _variance(raw.returns - scores.values, mask)
            metrics["value/explained"] = 1 - missed / spread_.clamp(min=1e-8)
        else:
            alike = normal.view(-1, self.table.group_size).std(1) < 1e-6
            metrics["groups/alike"] = alike.float().mean()  # nothing is learned from these
        return {name: value.item() for name, value in metrics.items()}


def truncated(scores: Tensor, finished: Tensor, rule: str, penalty: float) -> Tensor:
    """What an answer that does not end scores (Huang et al. 2024, arXiv 2403.17031, detail 4.1). All ``[B]``."""
    if rule == "replace":
        return torch.where(finished, scores, -penalty)
    return scores - penalty * (~finished).float() if rule == "penalty" else scores


def _demonstrations(tokenizer: Any, paths: list[str]) -> list[Item]:
    """Each demonstration as its last answer to all that came before."""
    rows = [[m.model_dump() for m in d.messages] for d in read_demonstrations(paths)] if paths else []
    ids = chat.answer_ids
    return [Item(chat.prompt_ids(tokenizer, row[:-1]), [ids(tokenizer, row[-1]["content"])]) for row in rows]


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt().clamp(min=1e-8)


def train(ppo: PpoRun, tracker: Tracker, table: Ppo) -> None:
    """All iterations that are left under the guard, with a checkpoint after each at which it is calm.

    Raises:
        TrainingFault: the guard stopped it.
        Interrupted: it was told to stop, and did so behind a checkpoint.
    """
    guard, at = ppo.guard, ppo.progress
    tracker.resume_at(at.iteration)
    guard.rebuild(ranks.lead(lambda: read_metrics(ppo.run)))
    if at.iteration == 0:
        ppo.save()  # so that there is always one to go back to
    with progress() as bars, stop_on_request() as request, Watchdog(guard, ranks.rank()) as dog:
        task = bars.add_task("ppo", total=table.iterations, completed=at.iteration)
        sampling = bars.add_task("  rollout", total=table.rollouts)
        while ppo.progress.iteration < table.iterations:
            bars.reset(sampling)
            metrics = ppo.iterate(lambda n: bars.advance(sampling, n))
            at = ppo.progress
            tracker.log(at.iteration, metrics)  # before the checkpoint: a row too many is dropped on resume
            act = guard.observe({"step": at.iteration, **metrics})
            if guard.calm:
                ppo.save()
            dog.beat(at.iteration)
            request.asked = ranks.any_of(request.asked)
            request.obey(guard, at.iteration)
            if act == "stopped":
                raise guard.fault()
            if act:
                ppo.restore()
                tracker.resume_at(ppo.progress.iteration)
                guard.rebuild(ranks.lead(lambda: read_metrics(ppo.run)))
            bars.update(task, completed=ppo.progress.iteration, description=f"ppo score {metrics['score/normalised']:+.2f}")


def run(recipe: Recipe, this: Run) -> None:
    """Train the policy and write it, and the critic beside it."""
    with tracked(recipe, this) as tracker:
        ppo = PpoRun(recipe, this)
        train(ppo, tracker, recipe.ppo)
        if recipe.ppo.advantage == "gae":
            ppo.actor_critic.save_critic(this.path / "critic")
        ppo.actor_critic.save_policy(this.model_dir)
        rows = ranks.lead(lambda: read_metrics(this))
        scores = [f"score/{name}" for name in recipe.ppo.rewards]
        keep = (*scores, "score/normalised", "kl/k3", "entropy", "answers/tokens", "answers/ended")
        this.finish(metrics={"first": {k: rows[0][k] for k in keep}, "last": {k: rows[-1][k] for k in keep}})


if __name__ == "__main__":
    main("ppo", run)
