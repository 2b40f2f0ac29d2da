"""PPO iterations on TRL's trainer, timed: ``python bench/trl_ppo.py WORK TUNE ITERATIONS OUT``, in TRL's own environment.

WORK is what ``bench/ppo.py export`` wrote: models, token ids and settings. Nothing of truthward is imported here.

TUNE is ``lora``, the cheapest that TRL allows: the policy under ``peft_config`` with ``ref_model=None``, so that the
reference is the policy with its adapter off, and LoRA of the same rank injected into the value model, which
``peft_config`` leaves alone. ``critic`` is what TRL's example script does with ``--use_peft``: the same, but every weight of
the value model is trained. ``full`` is TRL's default: every weight of policy and value, and a copy as reference.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Seconds of each iteration and of its parts, and the length of its answers.

    The rollout ends when ``batch_generation`` returns, scoring ends when the first micro-batch begins, the update ends
    with the callback that closes the iteration.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id, self.marks, self.rows = pad_id, {}, []

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.perf_counter())

    def watch(self, trainer: PPOTrainer) -> None:
        generate, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

        def timed_generate(model: Any, queries: Any, *rest: Any) -> Any:
            answers = generate(model, queries, *rest)
            self.mark("rollout")
            self.tokens = (answers[0][:, queries.shape[1] :] != self.pad_id).sum(1).float().mean().item()
            return answers

        def timed_accumulate(*models: Any) -> Any:
            self.mark("score")
            return accumulate(*models)

        ppo_trainer.batch_generation, trainer.accelerator.accumulate = timed_generate, timed_accumulate

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.mark("start")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.mark("update")
        start, rollout, score, update = (self.marks[k] for k in ("start", "rollout", "score", "update"))
        parts = {"rollout": rollout - start, "score": score - rollout, "update": update - score}
        self.rows.append({"seconds": update - start, **parts, "tokens": self.tokens})
        print(self.rows[-1], file=sys.stderr, flush=True)
        self.marks = {"start": update}


def lora(settings: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], lora_dropout=0.0, target_modules=settings["lora_modules"]
    )


def scorer(work: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(work / "reward", num_labels=1, dtype=torch.float32)


def critic(work: Path, settings: dict[str, Any], tune: str) -> Any:
    """The value model: a copy of the reward model, as in TRL's example."""
    model = scorer(work)
    if tune == "lora":
        model = inject_adapter_in_model(lora(settings), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("score"))
    return model


def trainer(work: Path, settings: dict[str, Any], tune: str, iterations: int) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(work / "policy", padding_side="left")
    micro, rollouts = settings["micro_batch_size"], settings["rollouts"]
    args = PPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rollouts // micro,
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=rollouts * iterations,
        local_rollout_forward_batch_size=settings["trl_forward_batch"],
        response_length=settings["max_new_tokens"],
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        kl_coef=settings["kl_coef"],
        missing_eos_penalty=settings["truncation_penalty"],
        stop_token="eos",
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"input_ids": settings["prompts"] * (iterations + 1)})
    clock = Clock(tokenizer.pad_token_id)
    made = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(work / "policy", dtype=torch.float32),
        ref_model=None,  # the policy with its adapter off; without an adapter, TRL makes a copy
        reward_model=scorer(work),
        value_model=critic(work, settings, tune),
        train_dataset=prompts,
        peft_config=None if tune == "full" else lora(settings),
        callbacks=[clock],
    )
    # in order, every batch holds each prompt once; and none that is used is the last of an epoch, after which accelerate
    # would stop accumulating and step at every micro-batch
    made.dataloader = made.accelerator.prepare(DataLoader(prompts, batch_size=rollouts, collate_fn=made.data_collator))
    clock.watch(made)
    made.clock = clock
    return made


def main(work: Path, tune: str, iterations: int, out: Path) -> None:
    settings = json.loads((work / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    made = trainer(work, settings, tune, iterations)
    made.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    out.write_text(json.dumps({"iterations": made.clock.rows, "peak_gb": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
