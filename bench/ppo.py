"""Whole PPO iterations (rollout, score, update), ours against the last PPO trainer that TRL had, side by side.

``python bench/ppo.py runs/laptop [--trl .venv-trl/bin/python]`` on a finished demo. TRL 1.12 lives in an environment of its
own (``make bench-ppo`` makes it). Both sides start from the demo's SFT model in fp32 and score by its preference model.
Both have the same 16 prompts in every iteration, token by token, the same longest answer, sampling temperature, epochs,
minibatches, rows a forward pass in training, LoRA rank, rates, coefficients and threads, and stop an answer at its end.

Left as each has it: TRL generates and scores ``TRL_FORWARD_BATCH`` rows at once by one setting, while we generate all and
score by micro-batches; TRL takes one optimizer step an epoch, since its accumulation runs across minibatches, while we
take two; TRL doesn't clip gradients. Early stopping, which TRL lacks, is off.

The sides take turns, each time in a fresh process whose first iteration warms up and is not counted. Printed are medians
over all the others, the peak resident memory of a whole process (the largest of a side's), and ratios to the first side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {
    "rollouts": 16,
    "epochs": 2,
    "minibatches": 2,
    "micro_batch_size": 4,
    "max_new_tokens": 48,
    "temperature": 0.7,
    "learning_rate": 1e-5,
    "kl_coef": 0.05,
    "truncation_penalty": 1.0,
    "lora_rank": 16,
    "lora_alpha": 32,
}
TRL_FORWARD_BATCH = 16
PARTS = ("rollout", "score", "update")
WIDTHS = (12, 7, 9, 7, 8, 9, 7, 15, 4)
SIDES = ("truthward-lora", "truthward-full", "trl-lora", "trl-critic", "trl-full")


# ------------------------------------------------------------------------------------------- the children, one job each


def export(runs: Path, work: Path, threads: int) -> None:
    """Write what TRL's side needs: policy, tokenizer and reward model as plain folders, prompts as token ids, settings."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from truthward import chat, hardware, models
    from truthward.records import Prompt, read_rows

    hardware.use_threads(threads)
    rows = read_rows(ROOT / "data" / "prompts.jsonl", Prompt)[: SETTINGS["rollouts"]]
    (work / "prompts.jsonl").write_text("".join(json.dumps({"id": p.id, "prompt": p.prompt}) + "\n" for p in rows))
    parents = newest(runs)
    sft, reward = parents["sft"], parents["reward"]
    tokenizer = models.load_tokenizer(sft)
    models.load(sft).save_pretrained(work / "policy")
    tokenizer.save_pretrained(work / "policy")
    scorer = AutoModelForSequenceClassification.from_pretrained(
        work / "policy", num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    scorer = models.merge(scorer, reward.model_dir)
    with torch.no_grad():
        scorer.score.weight.copy_(models.load_head(reward.model_dir)["weight"])
    scorer.save_pretrained(work / "reward")
    settings = {
        **SETTINGS,
        "threads": threads,
        "trl_forward_batch": TRL_FORWARD_BATCH,
        "lora_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "prompts": [chat.prompt_ids(tokenizer, chat.user(p.prompt)) for p in rows],
    }
    (work / "settings.json").write_text(json.dumps(settings))
    print(f"GEMM on {threads} threads: {hardware.measure_dtypes()} GFLOP/s")


def ours(runs: Path, work: Path, threads: int, tune: str, iterations: int) -> dict[str, Any]:
    """Iterations of a PPO run that is begun afresh among links to the demo's runs."""
    import resource

    from rl.ppo import PpoRun
    from truthward.ledger import open_run
    from truthward.recipe import load_recipe

    table = {**SETTINGS, "parent": "sft", "prompts": str(work / "prompts.jsonl"), "iterations": iterations, "target_kl": 1e9}
    if tune != "lora":
        table["tune"] = tune
    overrides = [f"ppo.{key}={json.dumps(value)}" for key, value in table.items()]
    overrides += [f'runs="{work / "runs"}"', f"model.threads={threads}", 'model.dtype="float32"']
    recipe = load_recipe(ROOT / "recipes" / "laptop.toml", overrides)
    link_parents(recipe, runs)
    rows = []
    with open_run(recipe, "ppo") as this:
        ppo = PpoRun(recipe, this)
        for _ in range(iterations):
            metrics = ppo.iterate(lambda n: None)
            parts = {part: metrics[f"seconds/{part}"] for part in PARTS}
            rows.append({"seconds": sum(parts.values()), **parts, "tokens": metrics["answers/tokens"]})
            print(rows[-1], file=sys.stderr, flush=True)
    return {"iterations": rows, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def link_parents(recipe: Any, runs: Path) -> None:
    """Put the demo's runs where this recipe looks for them: code that changed since the demo doesn't change a timing."""
    from truthward.ledger import plan

    planned = plan(recipe)
    folder = planned["ppo"].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for stage, run in newest(runs).items():
        for name in {planned[stage].path.name, run.path.name}:
            if not (folder / name).exists():
                (folder / name).symlink_to(run.path.resolve(), target_is_directory=True)


def newest(runs: Path) -> dict[str, Any]:
    """The latest complete preference model and the runs that it was made from, by stage."""
    from truthward.ledger import Run

    found = [run for run in map(Run.load, runs.glob("reward-*")) if run.done]
    if not found:
        sys.exit(f"error: {runs} holds no complete run of reward; make demo first")
    reward = max(found, key=lambda run: run.manifest["finished"])
    sft = reward.parent("model")
    return {"base": sft.parent("model"), "sft": sft, "constitution": reward.parent("preferences"), "reward": reward}


# ------------------------------------------------------------------------------------------------- the parent and its table


def child(command: list[str], threads: int, quiet: bool = False) -> None:
    """Run to its end. The parent stays small, as a process inherits the peak memory of the one that started it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL if quiet else None)


def measure(side: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One process of one side; its warm-up iteration is dropped."""
    package, _, tune = side.partition("-")
    iterations, out = 1 + options.iterations, work / "out.json"
    if package == "trl":
        command = [options.trl, str(ROOT / "bench" / "trl_ppo.py"), str(work), tune, str(iterations), str(out)]
    else:
        command = [sys.executable, __file__, str(options.runs), "--work", str(work), "--threads", str(options.threads)]
        command += ["--child", tune, "--iterations", str(iterations)]
    child(command, options.threads, quiet=True)  # its rows come by file; TRL prints more than them
    result = json.loads(out.read_text())
    return {"iterations": result["iterations"][1:], "peak_gb": result["peak_gb"]}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians and ratios to the first side, one line a side.

    Args:
        results: of each side, for each of its processes ``iterations`` (seconds, by part too, and tokens an answer) and
            ``peak_gb``.
    """
    names = ("s/iteration", "ratio", *PARTS, "peak GB", "ratio", "tokens/answer", "n")
    lines = [" " * 14 + "".join(f"{name:>{width}}" for name, width in zip(names, WIDTHS, strict=True))]
    first: tuple[float, float] | None = None
    for side, processes in results.items():
        rows = [row for process in processes for row in process["iterations"]]
        middle = {key: statistics.median(row[key] for row in rows) for key in ("seconds", *PARTS, "tokens")}
        peak = max(process["peak_gb"] for process in processes)
        first = first or (middle["seconds"], peak)
        cells = [f"{middle['seconds']:.1f}", f"{middle['seconds'] / first[0]:.2f}", *(f"{middle[p]:.1f}" for p in PARTS)]
        cells += [f"{peak:.2f}", f"{peak / first[1]:.2f}", f"{middle['tokens']:.1f}", str(len(rows))]
        lines.append(f"{side:14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    return "\n".join(lines)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="PPO iterations, ours against TRL's")
    parser.add_argument("runs", type=Path, help="run directories of a finished demo, e.g. runs/laptop")
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="interpreter of TRL's environment")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["truthward-lora", "trl-lora"])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, which take turns")
    parser.add_argument("--iterations", type=int, default=2, help="counted iterations of each process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["export", "lora", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if any(side.startswith("trl") for side in options.sides) and not options.child and not Path(options.trl).exists():
        parser.error(f"{options.trl} is not there: make bench-ppo sets it up, or name another by --trl")
    return options


def main() -> None:
    options = parse()
    options.runs = options.runs.resolve()
    if options.child == "export":
        export(options.runs, options.work, options.threads)
    elif options.child:
        result = ours(options.runs, options.work, options.threads, options.child, options.iterations)
        (options.work / "out.json").write_text(json.dumps(result))
    else:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
            start = [sys.executable, __file__, str(options.runs), "--work", folder, "--threads", str(options.threads)]
            child([*start, "--child", "export"], options.threads)
            for _ in range(options.rounds):
                for side in options.sides:
                    results[side].append(measure(side, options, work))
            print(table(results))


if __name__ == "__main__":
    main()
