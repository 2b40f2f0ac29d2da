"""Questions a second: ours against lm-evaluation-harness on the same multiple-choice task, model and machine.

``python bench/harness.py RUN [questions] [rounds]`` on a model's run directory, in fp32, on questions of the dev bank as
plain text behind a primer of six other questions, the form in which TruthfulQA is asked: the same contexts and
continuations on both sides. The harness scores every (question, answer) on its own, in padded batches of 16; it is given
the plain layers of transformers, as it would load them. The sides take turns; printed are medians, and the largest
difference of any answer's log-probability. The same without a primer follows.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from typing import Any

from evals.asking import Asked
from evals.truth import FORMS
from truthward import hardware, models
from truthward.ledger import Run
from truthward.records import Question, read_rows
from truthward.score import answer_sums

BATCH = 16  # rows a forward pass of the harness
SHOTS = 6


def theirs(model: Any, tokenizer: Any, asked: list[Asked]) -> list[list[float]]:
    """log p of every answer by the harness's Hugging Face model, through its request interface."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device="cpu")
    pairs = [(ask.messages, answer) for ask in asked for answer in ask.answers]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = iter(value for value, _ in lm.loglikelihood(requests, disable_tqdm=True))
    return [[next(found) for _ in ask.answers] for ask in asked]


def ours(model: Any, tokenizer: Any, asked: list[Asked]) -> list[list[float]]:
    return answer_sums(model, [ask.item(tokenizer) for ask in asked])


def measure(what: str, run: Run, asked: list[Asked], rounds: int) -> None:
    """Time both sides in turns and print the table."""
    tokenizer = models.load_tokenizer(run)
    sides = {"lm-evaluation-harness": (models.compose(run), theirs), "truthward": (models.load(run), ours)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    scores: dict[str, list[list[float]]] = {}
    for _ in range(rounds):
        for name, (model, work) in sides.items():
            begun = time.perf_counter()
            scores[name] = work(model, tokenizer, asked)
            times[name].append(time.perf_counter() - begun)
    pairs = zip(*([v for row in rows for v in row] for rows in scores.values()), strict=True)
    speeds = {name: len(asked) / statistics.median(spent) for name, spent in times.items()}
    print(f"{what}: {len(asked)} questions, {sum(len(a.answers) for a in asked)} answers, medians of {rounds}")
    for name, speed in speeds.items():
        print(f"  {name:24} {speed:6.2f} questions/s")
    ratio = speeds["truthward"] / speeds["lm-evaluation-harness"]
    print(f"  {ratio:.2f}x; largest difference of log-probabilities {max(abs(a - b) for a, b in pairs):.1e}")


def main(path: str, count: int = 24, rounds: int = 5) -> None:
    logging.disable(logging.WARNING)
    hardware.use_threads(0)
    print(f"GEMM: {hardware.measure_dtypes()} GFLOP/s; fp32")
    questions = read_rows("data/truth/dev", Question)
    primer = "".join(f"Q: {q.question}\nA: {q.true[0]}\n\n" for q in questions[-SHOTS:])
    plain = [FORMS.ask(q)[0] for q in questions[:count]]
    behind = [Asked(f"{primer}{ask.messages}", ask.answers) for ask in plain]
    for what, asked in ((f"behind {SHOTS} questions", behind), ("without a primer", plain)):
        measure(what, Run.load(path), asked, rounds)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
