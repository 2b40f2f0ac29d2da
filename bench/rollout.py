"""Useful tokens a second of sampling: ours against ``generate`` of transformers, side by side.

``python bench/rollout.py runs/laptop/sft-… [repeats]``. Answers end where the model ends them; tokens after the end are
not counted. Every contender runs once in each repeat, in turn; the table gives medians. "allowed" is the rate at which the
same answers would come if only the matrix products took time, each at the number of rows that were running: once with
the products that the contender uses and once with ``F.linear`` in fp32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from truthward import chat, hardware, models
from truthward.decoder import Decoder
from truthward.generate import Completion, PlainModel, generate
from truthward.ledger import Run
from truthward.products import PRECISIONS
from truthward.records import Prompt, read_rows

COUNT, LIMIT = 64, 128
GRID = (1, 2, 4, 8, 16, 24, 32, 48, COUNT, 512)
Timing = dict[int, float]


def main(run_dir: str, repeats: int = 5) -> None:
    """Time all contenders and print the table."""
    hardware.use_threads(0)
    run = Run.load(run_dir)
    model, tokenizer = models.compose(run), models.load_tokenizer(run)
    rows = read_rows("data/prompts.jsonl", Prompt)[:COUNT]
    prompts = [chat.prompt_ids(tokenizer, chat.user(row.prompt)) for row in rows]
    eos, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    packed = {name: Decoder.pack(model, linears(model), name) for name in PRECISIONS}

    def ours(engine: Any, batch_size: int = COUNT) -> Callable[[int], list[Completion]]:
        seeds = [range(i * COUNT, (i + 1) * COUNT) for i in range(repeats + 1)]
        options: dict[str, Any] = {"eos": eos, "pad_id": pad_id, "max_new_tokens": LIMIT, "temperature": 1.0}
        return lambda i: generate(engine, prompts, list(seeds[i]), batch_size=batch_size, **options)

    contenders = {
        "transformers generate": lambda i: theirs(model, prompts, eos, pad_id, i),
        "own loop, its forward": ours(PlainModel(model, pad_id), 32),
        "exact, weights shared": ours(model),
        **{name: ours(engine) for name, engine in packed.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, list[Completion]] = {}
    for i in range(repeats + 1):  # the first warms up
        for name, contender in contenders.items():
            start = time.perf_counter()
            answers[name] = contender(i)
            rates[name].append(sum(len(a.ids) for a in answers[name]) / (time.perf_counter() - start))
            print(f"{name}: {rates[name][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    plain = product_seconds(packed["exact"], linear=True)
    print(f"GEMM (oneDNN, 256 rows): {hardware.measure_dtypes()} GFLOP/s; {torch.get_num_threads()} threads")
    print(f"{COUNT} prompts, up to {LIMIT} tokens, medians of {repeats}")
    print(f"{'':22} {'tokens/s':>8} {'ratio':>6} {'tokens':>7} {'of allowed':>10} {'by F.linear':>11} {'gap':>8}")
    for name, rate in medians.items():
        print(f"{name:22} {rate:8.0f} {rate / medians['transformers generate']:6.2f}", end="")
        print(f" {sum(len(a.ids) for a in answers[name]):7}", end="")
        if name in packed:
            own = product_seconds(packed[name])
            print(f" {rate / allowed(prompts, answers[name], own):10.0%}", end="")
            print(f" {rate / allowed(prompts, answers[name], plain):11.0%}", end="")
            print(f" {gap(model, prompts, answers[name]):8.1e}", end="")
        print()


def linears(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Name and weight of every linear layer but the head, as a policy gives them."""
    return [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


@torch.inference_mode()
def theirs(model: Any, prompts: list[list[int]], eos: int, pad_id: int, seed: int) -> list[Completion]:
    """The same by transformers: left padding, pure temperature sampling."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": LIMIT}
    out = model.generate(ids, attention_mask=mask, eos_token_id=eos, pad_token_id=pad_id, **options)
    answers = out[:, longest:].tolist()
    return [Completion(a[: a.index(eos) + 1] if eos in a else a) for a in answers]


@torch.inference_mode()
def product_seconds(decoder: Decoder, linear: bool = False) -> tuple[Timing, Timing]:
    """Seconds of the products of all layers, and of the head, by the number of rows in ``GRID``.

    Args:
        linear: time ``F.linear`` on fp32 weights of the same shapes instead.
    """
    inside = [p for layer in decoder.layers for p in (layer.query_key_value, layer.attention_out, layer.gate_up, layer.down)]
    hidden = decoder.embeddings.shape[1]
    inner = decoder.layers[0].gate_up(torch.zeros(1, hidden, dtype=decoder.dtype)).shape[1] // 2
    widths = [hidden, decoder.heads * decoder.width, hidden, inner] * len(decoder.layers)
    if linear:
        outs = [p(torch.zeros(1, w, dtype=decoder.dtype)).shape[1] for p, w in zip(inside, widths, strict=True)]
        inside = [partial(F.linear, weight=torch.randn(out, w)) for out, w in zip(outs, widths, strict=True)]
    head = partial(F.linear, weight=decoder.embeddings.float()) if linear else decoder.head
    dtype = torch.float32 if linear else decoder.dtype
    layers, last = {}, {}
    for rows in GRID:
        inputs = {w: torch.randn(rows, w, dtype=dtype) for w in set(widths)}
        layers[rows] = clock(lambda: [p(inputs[w]) for p, w in zip(inside, widths, strict=True)])  # noqa: B023
        if rows <= COUNT:
            last[rows] = clock(lambda: head(inputs[hidden]))  # noqa: B023
    return layers, last


def clock(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def allowed(prompts: list[list[int]], answers: list[Completion], seconds: tuple[Timing, Timing]) -> float:
    """Tokens a second if only products took time: one pass over the prompts, then a pass a step over rows still running."""
    layers, head = seconds
    total = sum(map(len, prompts)) / GRID[-1] * layers[GRID[-1]] + at(head, len(prompts))
    for step in range(1, LIMIT):
        rows = sum(len(answer.ids) > step for answer in answers)
        total += at(layers, rows) + at(head, rows) if rows else 0.0
    return sum(len(answer.ids) for answer in answers) / total


def at(timing: Timing, rows: int) -> float:
    """Seconds at a number of rows, on the straight line between its neighbours of the grid."""
    low, high = max(r for r in timing if r <= rows), min(r for r in timing if r >= rows)
    share = (rows - low) / (high - low) if high > low else 0.0
    return timing[low] + share * (timing[high] - timing[low])


@torch.inference_mode()
def gap(model: Any, prompts: list[list[int]], answers: list[Completion]) -> float:
    """Largest difference between the sampler's log-probabilities and those of a plain forward pass."""
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.ids])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        worst = max(worst, (expected - torch.tensor(answer.logprobs)).abs().max().item())
    return worst


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
