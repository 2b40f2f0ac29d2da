"""``truthward export``: any point of a chain as plain Hugging Face weights, tokenizer and model card."""

from __future__ import annotations

from pathlib import Path

from truthward.card import model_card
from truthward.errors import UserError
from truthward.ledger import Run, whole_directory, write_json
from truthward.models import chain, load, load_tokenizer


def export(run: Run, target: Path) -> None:
    """Write the composed model so that ``AutoModelForCausalLM.from_pretrained(target)`` loads it.

    Raises:
        UserError: the target already exists.
    """
    if target.exists():
        raise UserError("it already exists", where=str(target), fix="name a new folder; nothing is overwritten")
    model, tokenizer = load(run), load_tokenizer(run)
    with whole_directory(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(run), encoding="utf-8")
        write_json(folder / "truthward.json", [r.manifest for r in chain(run)])
