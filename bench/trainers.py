"""A step of SFT, reward and DPO: TRL's trainer as it comes, and ours, on the same rows with the same loss.

``python bench/trainers.py runs/laptop/sft-… [stage …] [--steps 5] [--threads 2]``, in fp32. Each side trains in a process of
its own by ``trainer.train()``, its data loading, optimizer and logging included; the processes take turns, one step each.
Shown are medians, the peak resident memory (and what it was before the first step), and how far the losses differ at most.

TRL keeps its defaults but these: ``bf16=False`` and ``use_cpu=True`` (as on a CPU without bf16), no saving, each step
logged, and the same LoRA and learning rate as ours. "without checkpointing" also turns its ``gradient_checkpointing`` off,
which it comes with on: less memory for a second forward pass. Both are given the same tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from truthward import chat, hardware, models
from truthward.branches import Item
from truthward.ledger import Run
from truthward.records import Question, by_prompt, read_demonstrations, read_rows, truth_preferences
from truthward.score import answer_sums
from truthward.tables import Launch, Training
from truthward.trainers import to_row, trainer_arguments

STAGES = {
    "sft": "8 demonstrations",
    "reward": "8 pairs on 8 prompts",
    "reward-all": "18 pairs on 2 prompts",
    "dpo": "8 pairs on 8 prompts",
    "dpo-all": "18 pairs on 2 prompts",
}
SIDES = ("TRL", "TRL without checkpointing", "ours")
RATE = 2e-5


# ------------------------------------------------------------------------------------------------------------------ rows


def demonstrations(tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Tokens of 8 demonstrations, and which of them are the answer's."""
    rows = read_demonstrations(["data/demonstrations.jsonl"])[:8]
    return [chat.encode(tokenizer, [m.model_dump() for m in row.messages]) for row in rows]


def prompts(tokenizer: Any, stage: str) -> list[dict[str, Any]]:
    """Prompts with their pairs: one pair each, or, for ``-all``, every true answer with every false one."""
    every = stage.endswith("-all")
    questions = read_rows("data/truth/train", Question)[:: 200 if every else 56]
    groups = by_prompt(truth_preferences(questions, "bench", cross=every))
    alike = [group for group in groups if len(group) == len(groups[0])]  # so that the mean over pairs is that over prompts
    return [to_row(tokenizer, group if every else group[:1]) for group in alike[: 2 if every else 8]]


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as TRL takes DPO's pairs: a row each."""
    names = ("chosen_ids", "rejected_ids")
    return [
        {"prompt_ids": row["prompt_ids"]} | {n: row["answer_ids"][a] for n, a in zip(names, pair, strict=True)}
        for row in rows
        for pair in row["pairs"]
    ]


def as_text(tokenizer: Any, row: dict[str, Any]) -> dict[str, str]:
    """A pair in words, that become the same tokens again."""
    text = {name.removesuffix("_ids"): tokenizer.decode(ids) for name, ids in row.items()}
    assert all(tokenizer(text[name.removesuffix("_ids")])["input_ids"] == ids for name, ids in row.items())
    return text


# -------------------------------------------------------------------------------------------------------------- trainers


def theirs(stage: str, run: Run, options: dict[str, Any]) -> Any:
    """TRL's trainer as it comes."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from reward.__main__ import position_scorer, sequence_classifier

    model, tokenizer, kind = models.compose(run), models.load_tokenizer(run), stage.removesuffix("-all")
    lora = models.lora_config(16, 32, "SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    make: Any
    config: Any
    rows: list[dict[str, Any]]
    if kind == "sft":
        rows = [{"input_ids": ids, "completion_mask": [int(m) for m in mask]} for ids, mask in demonstrations(tokenizer)]
    else:
        rows = pairs(prompts(tokenizer, stage))
    options |= {"per_device_train_batch_size": 6 if stage.endswith("-all") else 8}
    options |= {"gradient_accumulation_steps": len(rows) // options["per_device_train_batch_size"]}
    if kind == "sft":
        make, config = SFTTrainer, SFTConfig
        options |= {"completion_only_loss": True}  # what it does by itself with columns "prompt" and "completion"
    elif kind == "reward":
        make, config, model = RewardTrainer, RewardConfig, sequence_classifier(position_scorer(model, 0))
        sides = ("chosen_ids", "rejected_ids")
        rows = [{side: row["prompt_ids"] + row[side] for side in sides} for row in rows]
    else:
        make, config = DPOTrainer, DPOConfig
        options |= {"precompute_ref_log_probs": True}
        rows = [as_text(tokenizer, row) for row in rows]  # the one trainer that takes no tokens; it adds the end token
    data = Dataset.from_list(rows)
    return make(model=model, args=config(**options), train_dataset=data, processing_class=tokenizer, peft_config=lora)


def ours(stage: str, run: Run, options: dict[str, Any]) -> Any:
    """The trainer of our stage, as its script makes it."""
    from trl import DPOConfig, RewardConfig, SFTConfig, pack_dataset

    from reward.__main__ import position_scorer
    from reward.trainer import SoftRewardTrainer
    from reward.trainer import collate as collate_reward
    from rl.dpo import SoftDpoTrainer
    from rl.dpo import collate as collate_dpo
    from sft.trainer import IGNORE, LeanSftTrainer

    model, tokenizer, kind = models.load(run), models.load_tokenizer(run), stage.removesuffix("-all")
    micro = 1 if kind == "sft" else 2 if stage.endswith("-all") else 8
    table = Training(batch_size=micro, micro_batch_size=micro, learning_rate=RATE)
    options = trainer_arguments(table, Launch(), model.dtype, run, 0) | options
    lora = models.lora_config(16, 32, "SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    given = {"processing_class": tokenizer, "peft_config": lora}
    rows: list[dict[str, Any]]
    if kind == "sft":
        rows = [
            {"input_ids": ids, "labels": [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]}
            for ids, mask in demonstrations(tokenizer)
        ]
        data = Dataset.from_list(rows)
        options |= {"gradient_accumulation_steps": len(pack_dataset(data, table.max_length))}
        arguments = SFTConfig(**options, packing=True, completion_only_loss=False)
        return LeanSftTrainer(model=model, args=arguments, train_dataset=data, **given)
    rows = prompts(tokenizer, stage)
    options |= {"gradient_accumulation_steps": len(rows) // micro}
    if kind == "reward":
        given |= {"model": position_scorer(model, 0), "args": RewardConfig(**options), "data_collator": collate_reward}
        return SoftRewardTrainer(train_dataset=Dataset.from_list(rows), **given)
    for row, sums in zip(rows, answer_sums(model, [Item(r["prompt_ids"], r["answer_ids"]) for r in rows]), strict=True):
        row["ref_logprobs"] = sums
    given |= {"model": model, "args": DPOConfig(**options, precompute_ref_log_probs=True), "data_collator": collate_dpo}
    trainer = SoftDpoTrainer(train_dataset=Dataset.from_list(rows), **given)
    trainer.run = run
    return trainer


# ------------------------------------------------------------------------------------------------------- the two processes


class _Turns(TrainerCallback):
    """Waits for a line before each step and reports its seconds and loss after."""

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit("the comparison stopped")
        self.start = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            tell(seconds=time.perf_counter() - self.start, loss=logs["loss"])
            if state.global_step < state.max_steps:
                self._wait()


def tell(**values: float) -> None:
    """Report to the process that compares, with the peak resident memory so far (GB)."""
    values["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("@" + json.dumps(values), flush=True)


def work(run_dir: str, stage: str, side: str, steps: int, threads: int) -> None:
    """One side's process."""
    hardware.use_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "max_steps": steps,
            "learning_rate": RATE,
            "warmup_steps": 0,
            "seed": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        if side == SIDES[1]:
            options |= {"gradient_checkpointing": False}
        trainer = (ours if side == "ours" else theirs)(stage, Run.load(run_dir), options)
        trainer.add_callback(_Turns())
        tell()
        trainer.train()


def compare(stage: str, run_dir: str, steps: int, threads: int) -> None:
    """Train all sides in turns, the first step to warm up, and print a table."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        run_dir,
        stage,
        "--steps",
        str(steps + 1),
        "--threads",
        str(threads),
    ]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {side: subprocess.Popen([*command, "--side", side], **pipes) for side in SIDES}
    built = {side: answer(process)["peak"] for side, process in processes.items()}
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(steps + 1):
        for side, process in processes.items():
            print(file=process.stdin, flush=True)
            seen[side].append(answer(process))
    for process in processes.values():
        process.communicate()
    seconds = {side: statistics.median(s["seconds"] for s in seen[side][1:]) for side in SIDES}
    peaks = {side: seen[side][-1]["peak"] for side in SIDES}
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(seen["TRL"], seen["ours"], strict=True))
    for side in SIDES:
        speed, memory = seconds[side] / seconds["ours"], peaks[side] / peaks["ours"]
        loss = f"{seen[side][0]['loss']:.6f}"
        gigabytes = f"{peaks[side]:.2f} | {built[side]:.2f}"
        print(f"| {stage} | {side} | {seconds[side]:.2f} | {speed:.2f} | {gigabytes} | {memory:.2f} | {loss} |")
    print(f"  {stage}: {STAGES[stage]} a step; the losses of {steps + 1} steps differ by at most {gap:.1e}", flush=True)


def answer(process: Any) -> dict[str, float]:
    """The next report of a side.

    Raises:
        RuntimeError: it ended without one.
    """
    for line in process.stdout:
        if line.startswith("@"):
            return json.loads(line[1:])
    raise RuntimeError("a side stopped; its error is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a finished sft run")
    parser.add_argument("stages", nargs="*", help=", ".join(STAGES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return work(options.run, options.stages[0], options.side, options.steps, options.threads)
    print(f"torch {torch.__version__}, fp32, {options.threads} threads, {hardware.measure_dtypes()} GFLOP/s")
    print("| stage | side | s a step | to ours | peak GB | as built | to ours | first loss |\n" + "|---" * 8 + "|")
    for stage in options.stages or STAGES:
        compare(stage, options.run, options.steps, options.threads)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
