"""``python -m sft RECIPE``: fine-tune on demonstrations (and revisions), with the loss on the assistant's words alone."""

from __future__ import annotations

from datasets import Dataset

from sft.trainer import IGNORE, LeanSftTrainer, require_labels
from truthward import chat, hardware, interpolation, models, replay
from truthward.console import say
from truthward.ledger import Run
from truthward.records import read_demonstrations
from truthward.stage import main
from truthward.tables import Recipe
from truthward.tracking import tracked
from truthward.trainers import fit, refuse_long, trainer_arguments


def run(recipe: Recipe, this: Run) -> None:
    """Train the SFT model and write its adapter (or weights)."""
    from trl import SFTConfig

    table = recipe.sft
    demonstrations = read_demonstrations(table.data)
    parent = this.parent("model")
    tokenizer = models.load_tokenizer(parent)
    rows = [chat.encode(tokenizer, [m.model_dump() for m in d.messages]) for d in demonstrations]
    dtype, compute = hardware.set_up(recipe.model, this)
    if table.replay:
        rows += replay.demonstrations(replay.replies(recipe, table, this, dtype), tokenizer)
    refuse_long([len(ids) for ids, _ in rows], table.max_length, "demonstrations", "sft.max_length")
    labelled = [
        {"input_ids": ids, "labels": [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]} for ids, mask in rows
    ]
    require_labels(labelled)
    say(f"  {len(rows)} demonstrations, {sum(len(i) for i, _ in rows)} tokens; {compute}")
    counted = table.model_copy(update={"micro_batch_size": 1}) if table.packing else table  # a packed sequence is one row
    arguments = trainer_arguments(counted, recipe.launch, dtype, this, recipe.seed)
    trainer = LeanSftTrainer(
        model=models.load_cut(parent, dtype, recipe.launch),
        args=SFTConfig(**arguments, packing=table.packing, completion_only_loss=False, shuffle_dataset=True),
        train_dataset=Dataset.from_list(labelled),
        processing_class=tokenizer,
        peft_config=models.lora_config(table.lora_rank, table.lora_alpha) if table.tune == "lora" else None,
    )
    with tracked(recipe, this) as tracker:
        steps = fit(trainer, tracker, "sft", recipe.guard)
        models.save(this, trainer.model, change=interpolation.keep_share(this, table.scale))
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        this.finish(metrics={"rows": len(rows), "steps": steps, "first_loss": losses[0], "last_loss": losses[-1]})


if __name__ == "__main__":
    main("sft", run)
