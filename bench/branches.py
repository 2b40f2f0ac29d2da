"""Questions a second: answers as branches of one prompt, against each answer by itself, side by side.

``python bench/branches.py runs/laptop/base-… [repeats]``. Prints medians over alternating repeats, their ratio, and the
largest difference between the two ways' log-probabilities.
"""

from __future__ import annotations

import statistics
import sys
import time

from truthward import chat, hardware, models
from truthward.branches import Item
from truthward.ledger import Run
from truthward.records import Question, read_rows
from truthward.score import answer_sums


def main(run_dir: str, repeats: int = 5, count: int = 24) -> None:
    """Time both ways on the first ``count`` dev questions."""
    hardware.use_threads(0)
    run = Run.load(run_dir)
    model, tokenizer = models.load(run), models.load_tokenizer(run)
    questions = read_rows("data/truth/dev", Question)[:count]
    together = [
        Item(chat.prompt_ids(tokenizer, chat.user(q.question)), [chat.answer_ids(tokenizer, a) for a in q.true + q.false])
        for q in questions
    ]
    alone = [Item(item.prompt, [answer]) for item in together for answer in item.answers]
    seconds: dict[str, list[float]] = {"together": [], "alone": []}
    sums = {}
    for _ in range(repeats + 1):  # the first pair warms up
        for name, items in (("together", together), ("alone", alone)):
            start = time.perf_counter()
            sums[name] = [v for row in answer_sums(model, items) for v in row]
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    gap = max(abs(a - b) for a, b in zip(sums["together"], sums["alone"], strict=True))
    print(f"GEMM: {hardware.measure_dtypes()} GFLOP/s")
    for name, value in medians.items():
        print(f"{name:9} {count / value:6.2f} questions/s (median of {repeats})")
    print(f"ratio {medians['alone'] / medians['together']:.2f}; largest difference {gap:.1e} nats")


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
