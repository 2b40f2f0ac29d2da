"""Rows a second of the constitution's job: ours against ``generate`` of transformers in a plain loop, side by side.

``python bench/revisions.py runs/laptop [rounds] [prompts]`` on a finished demo, in fp32, with the prompts, lengths and
temperature of its constitution. A row is what one prompt brings: an answer, a critique by a principle, a revision, and the
scores of answer and revision, which are log p a token under the prompt that keeps the principle less that under the one
that breaks it.

The peer has the plain layers of transformers, samples by ``generate`` and scores by one forward pass over each answer after
its prompt, with the head on the answers alone. It is given one prompt at a time, and then up to 32 in padded batches. Each
side samples its own texts; tokens a row show whether they were about as long. The sides take turns; printed are medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from constitution.critique import critique_request, revision_request
from truthward import chat, hardware, models
from truthward.branches import Item
from truthward.generate import generate
from truthward.ledger import Run
from truthward.principles import Principle, read_principles
from truthward.records import Prompt, draw, read_rows
from truthward.score import answer_sums
from truthward.tensors import pad

GROUP = 32  # prompts at once: the stage's own number
LOOP = "transformers, prompt by prompt"


@dataclass
class Task:
    """What is to be done, the same for all sides."""

    tokenizer: Any
    prompts: list[Prompt]
    principles: list[Principle]
    limit: int
    temperature: float


class Side(Protocol):
    """One way to do it."""

    batch: int

    def say(self, prompts: list[list[int]], task: Task, seed: int) -> list[list[int]]:
        """A sampled answer to each prompt, as tokens with their end."""

    def judge(self, items: list[Item]) -> list[list[float]]:
        """log p(answer | prompt) for each item and answer, nats."""


class Ours:
    """The project's generation, and answers as branches of one prompt."""

    batch = GROUP

    def __init__(self, model: Any) -> None:
        self.model = model

    def say(self, prompts: list[list[int]], task: Task, seed: int) -> list[list[int]]:
        seeds = [seed * len(prompts) + i for i in range(len(prompts))]
        ends = {"eos": task.tokenizer.eos_token_id, "pad_id": task.tokenizer.pad_token_id}
        options: dict[str, Any] = {"max_new_tokens": task.limit, "temperature": task.temperature, "batch_size": self.batch}
        return [c.ids for c in generate(self.model, prompts, seeds, **ends, **options)]

    def judge(self, items: list[Item]) -> list[list[float]]:
        return answer_sums(self.model, items)


class Transformers:
    """``model.generate`` and plain forward passes over padded batches; with ``batch`` 1 there is nothing to pad."""

    def __init__(self, model: Any, pad_id: int, batch: int) -> None:
        self.model, self.pad_id, self.batch = model, pad_id, batch

    @torch.inference_mode()
    def say(self, prompts: list[list[int]], task: Task, seed: int) -> list[list[int]]:
        ids, mask = pad(prompts, self.pad_id, side="left")
        torch.manual_seed(seed)
        eos = task.tokenizer.eos_token_id
        options: dict[str, Any] = {"do_sample": True, "temperature": task.temperature, "top_k": 0, "top_p": 1.0}
        options |= {"max_new_tokens": task.limit, "eos_token_id": eos, "pad_token_id": self.pad_id}
        said = self.model.generate(ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :].tolist()
        return [a[: a.index(eos) + 1] if eos in a else a for a in said]

    @torch.inference_mode()
    def judge(self, items: list[Item]) -> list[list[float]]:
        flat = [(item.prompt, answer) for item in items for answer in item.answers]
        sums = iter([total for part in parts(flat, self.batch) for total in self._score(part)])
        return [[next(sums) for _ in item.answers] for item in items]

    def _score(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        ids, mask = pad([prompt + answer for prompt, answer in rows], self.pad_id, side="left")
        longest = max(len(answer) for _, answer in rows)
        # an index copies; a number of positions would send the head down a slow strided product
        before = torch.arange(-longest - 1, -1)
        logits = self.model(ids, attention_mask=mask.long(), logits_to_keep=before, use_cache=False).logits
        logprobs = logits.log_softmax(-1).gather(2, ids[:, -longest:, None]).squeeze(2)
        return [row[-len(answer) :].sum().item() for row, (_, answer) in zip(logprobs, rows, strict=True)]


@dataclass
class Round:
    """What a side needed, in seconds, and what it made."""

    writing: float
    judging: float
    tokens: int
    items: list[Item]


def parts(values: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive pieces of at most ``size``."""
    return (values[i : i + size] for i in range(0, len(values), size))


def work(side: Side, task: Task, seed: int) -> Round:
    """All rows of the task by one side."""
    done = Round(0.0, 0.0, 0, [])
    for part in parts(list(zip(task.prompts, task.principles, strict=True)), side.batch):
        start = time.perf_counter()
        items, tokens = write(side, task, part, seed)
        written = time.perf_counter()
        scores = side.judge(items)
        margins(items, scores)
        done.writing += written - start
        done.judging += time.perf_counter() - written
        done.tokens += tokens
        done.items += items
    return done


def write(side: Side, task: Task, rows: list[tuple[Prompt, Principle]], seed: int) -> tuple[list[Item], int]:
    """Answer, critique and revision of each prompt, as what is to be judged; and how many tokens that took to write."""
    written = []

    def say(requests: list[list[dict[str, str]]], purpose: int) -> list[str]:
        said = side.say([chat.prompt_ids(task.tokenizer, r) for r in requests], task, 3 * seed + purpose)
        written.append(sum(map(len, said)))
        return [chat.decode(task.tokenizer, ids) or "…" for ids in said]

    answers = say([chat.user(p.prompt) for p, _ in rows], 0)
    critiques = say([critique_request(p.prompt, a, c) for (p, c), a in zip(rows, answers, strict=True)], 1)
    triples = zip(rows, answers, critiques, strict=True)
    revisions = say([revision_request(p.prompt, a, k, c) for (p, c), a, k in triples], 2)
    items = []
    for (p, c), *texts in zip(rows, answers, revisions, strict=True):
        branches = [chat.answer_ids(task.tokenizer, text) for text in texts]
        items += [Item(chat.prompt_ids(task.tokenizer, chat.user(p.prompt, s)), branches) for s in (c.follow, c.violate)]
    return items, sum(written)


def margins(items: list[Item], sums: list[list[float]]) -> list[list[float]]:
    """Score of each answer: mean log p a token under follow less that under violate; items come as such pairs."""
    means = [[s / len(a) for s, a in zip(row, item.answers, strict=True)] for item, row in zip(items, sums, strict=True)]
    return [[f - v for f, v in zip(*pair, strict=True)] for pair in zip(means[::2], means[1::2], strict=True)]


def table(rounds: dict[str, list[Round]], prompts: int) -> str:
    """Medians of each side, and how many times as many rows as the plain loop it makes."""
    rates = {name: prompts / statistics.median(r.writing + r.judging for r in rs) for name, rs in rounds.items()}
    lines = [f"{'':32} {'rows/s':>7} {'ratio':>6} {'s writing':>10} {'s judging':>10} {'tokens a row':>13}"]
    for name, rs in rounds.items():
        writing, judging = (statistics.median(getattr(r, part) for r in rs) for part in ("writing", "judging"))
        tokens = statistics.median(r.tokens for r in rs) / prompts
        ratio = rates[name] / rates[LOOP]
        lines.append(f"{name:32} {rates[name]:7.2f} {ratio:6.2f} {writing:10.2f} {judging:10.2f} {tokens:13.1f}")
    return "\n".join(lines)


def newest(runs: Path) -> Run:
    """The latest complete run of the constitution."""
    found = [run for run in map(Run.load, runs.glob("constitution-*")) if run.done]
    if not found:
        sys.exit(f"error: {runs} holds no complete run of constitution; make demo first")
    return max(found, key=lambda run: run.manifest["finished"])


def set_up(runs: Path, count: int) -> tuple[Task, Run]:
    """The demo's own settings, with principles in turn; and the run whose model does the work."""
    made = newest(runs)
    parent, recipe = made.parent("model"), made.manifest["recipe"]
    settings = recipe["constitution"]
    prompts = draw([p for path in settings["prompts"] for p in read_rows(path, Prompt)], count, recipe["seed"])
    principles = read_principles("constitution/principles.toml")
    chosen = [principles[i % len(principles)] for i in range(len(prompts))]
    tokenizer = models.load_tokenizer(parent)
    return Task(tokenizer, prompts, chosen, settings["max_new_tokens"], settings["temperature"]), parent


def main(runs: str, rounds: int = 3, count: int = GROUP) -> None:
    """Time all sides and print the table."""
    hardware.use_threads(0)
    task, parent = set_up(Path(runs), count)
    plain, pad_id = models.compose(parent), task.tokenizer.pad_token_id
    sides: dict[str, Side] = {
        LOOP: Transformers(plain, pad_id, 1),
        f"transformers, padded {GROUP}s": Transformers(plain, pad_id, GROUP),
        "ours": Ours(models.load(parent)),
    }
    made: dict[str, list[Round]] = {name: [] for name in sides}
    few = Task(task.tokenizer, task.prompts[:2], task.principles[:2], task.limit, task.temperature)
    items = [work(side, few, 0) for side in sides.values()][-1].items  # warms up
    scores = [margins(items, side.judge(items)) for side in sides.values()]
    gap = max(
        abs(a - b) for other in scores for x, y in zip(other, scores[-1], strict=True) for a, b in zip(x, y, strict=True)
    )
    for i in range(rounds):
        for name, side in sides.items():
            made[name].append(work(side, task, i + 1))
            print(f"{name}: {made[name][-1].writing + made[name][-1].judging:.1f} s", file=sys.stderr, flush=True)
    print(f"GEMM: {hardware.measure_dtypes()} GFLOP/s; {torch.get_num_threads()} threads; fp32")
    print(f"{len(task.prompts)} prompts, up to {task.limit} tokens, temperature {task.temperature}, medians of {rounds}")
    print(table(made, len(task.prompts)))
    print(f"largest difference between the sides' scores of the same four texts: {gap:.1e} nats a token")


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
