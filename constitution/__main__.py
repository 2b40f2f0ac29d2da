"""``python -m constitution RECIPE``: the model answers, criticises, revises and judges by the written principles.

Before anything is made, the judge is measured on labelled pairs; what does not clear chance is left out. Work then goes
group by group of prompts; each group's rows are appended to ``groups.jsonl`` in one write, so a run killed at any moment
goes on with the next group and ends with the same rows.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from constitution.endpoint import Endpoint
from constitution.judge import Judge, LocalJudge, RemoteJudge, Request, choice_requests
from constitution.qualify import Panel, qualify, require_qualified, to_cases
from constitution.workshop import Rows, Workshop
from truthward import hardware, models, stats
from truthward.console import progress, say
from truthward.examples import read_examples
from truthward.ledger import Run, write_text
from truthward.principles import Principle, keep_copies, read_principles
from truthward.records import Preference, Prompt, Revision, draw, read_pairs, read_rows, write_rows
from truthward.redaction import clean
from truthward.stage import main
from truthward.tables import Recipe
from truthward.tracking import tracked

GROUP = 32  # prompts between two writes


def run(recipe: Recipe, this: Run) -> None:
    """Make all rows, group by group, and write ``revisions.jsonl`` and ``preferences.jsonl``."""
    table = recipe.constitution
    prompts = draw([p for path in table.prompts for p in read_rows(path, Prompt)], table.max_prompts, recipe.seed)
    groups = [prompts[i : i + GROUP] for i in range(0, len(prompts), GROUP)]
    path = this.path / "groups.jsonl"
    done = whole_lines(path)
    workshop = open_workshop(recipe, this)
    before, begun = len(done), time.monotonic()
    with progress() as bar:
        task = bar.add_task("constitution", total=len(groups), completed=len(done))
        for group in groups[len(done) :]:
            done.append(clean(workshop.group(group), homes=True))
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            bar.advance(task)
    seconds = time.monotonic() - begun
    revisions = [Revision.model_validate(r) for group in done for r in group["revisions"]]
    preferences = [Preference.model_validate(r) for group in done for r in group["preferences"]]
    write_rows(this.path / "revisions.jsonl", revisions)
    write_rows(this.path / "preferences.jsonl", preferences)
    helped = sum(r.helped for r in revisions)
    rate = sum(len(g["revisions"]) + len(g["preferences"]) for g in done[before:]) / max(seconds, 1e-9)
    say(f"  {helped} of {len(revisions)} revisions helped; {len(preferences)} preferences; {rate:.1f} rows/s")
    counts = {"prompts": len(prompts), "revisions": len(revisions), "helped": helped, "preferences": len(preferences)}
    with tracked(recipe, this):
        this.finish(metrics=counts)


def open_workshop(recipe: Recipe, this: Run) -> Workshop:
    """Load the models and qualify the judge, unless an earlier start of this run has.

    Raises:
        UserError: no method of the judge clears chance by any principle, and the gate blocks.
    """
    table, parent = recipe.constitution, this.parent("model")
    principles, examples = read_principles(*table.principles), read_examples(table.examples)
    keep_copies(table.principles, this.path)
    dtype, _ = hardware.set_up(recipe.model, this)
    model, tokenizer = models.load(parent, dtype), models.load_tokenizer(parent)
    judge = open_judge(recipe, this, LocalJudge(model, tokenizer))
    if "judge" not in this.manifest:
        pairs = read_pairs(recipe.judge.bank, recipe.judge.pairs)
        if isinstance(judge, RemoteJudge) and isinstance(judge.chooser, Endpoint):
            announce(judge.chooser, recipe, [one for c in to_cases(pairs, principles) for one in choice_requests(c)])
        this.record(judge=qualify(judge, pairs, principles, recipe.judge.methods, recipe.evals.resamples, recipe.seed))
    record = this.manifest["judge"]
    tell(record, principles)
    require_qualified(record, recipe.judge.gate)
    panel = Panel(judge, principles, record)
    return Workshop(model, tokenizer, parent.manifest["fingerprint"], panel, examples, table, recipe.judge, recipe.seed)


def open_judge(recipe: Recipe, this: Run, parent: LocalJudge) -> Judge:
    """The judge that the recipe names: the parent itself, another stage's model, one from elsewhere, or an endpoint."""
    table = recipe.judge
    if table.base_url:
        return RemoteJudge(Endpoint(table, this.path / "replies.jsonl"))
    if not table.model or this.manifest["parents"].get("judge") == this.manifest["parents"]["model"]:
        return parent
    if "judge" in this.manifest["parents"]:
        other = this.parent("judge")
        return LocalJudge(models.load(other, parent.model.dtype), models.load_tokenizer(other))
    model, tokenizer = models.fetch_base(table.model, recipe.seed)
    return LocalJudge(models.ready(model, parent.model.dtype), tokenizer)


def announce(endpoint: Endpoint, recipe: Recipe, requests: list[Request]) -> None:
    """Say, before the start, what asking a server will take: to qualify, and at most for the rows.

    Args:
        requests: those by which it qualifies.
    """
    table, first = recipe.constitution, endpoint.estimate(requests)
    say(f"  to qualify: {first}")
    each = {
        "samples": table.samples * (table.samples - 1) * recipe.judge.principles,
        "contrast": 2,
    }
    count = table.max_prompts * (2 * table.rounds + sum(each.get(way, 0) for way in table.ways))
    if first.requests:
        say(f"  for the rows: {first.times(count)}")


def tell(record: dict[str, Any], principles: list[Principle]) -> None:
    """Print how the judge did, and by which principles it may judge."""
    for method, row in record["methods"].items():
        verdict = "at chance, refused" if row["refused"] else "qualified"
        first = f"; takes A in {row['first']:.0%}" if "first" in row else ""
        say(f"  judge by {method}: {stats.Interval(**row['accuracy'])} {verdict}{first}")
    chosen = record["chosen"]
    out = [p.id for p in principles if p.id not in chosen]
    say(f"  it may judge by {len(chosen)} of {len(principles)} principles" + (f"; not by {', '.join(out)}" if out else ""))


def whole_lines(path: Path) -> list[Rows]:
    """Groups that were written to their end; a line cut off by a kill is dropped from the file."""
    if not path.exists():
        return []
    kept = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what follows the last line end was cut off
    write_text(path, "".join(line + "\n" for line in kept))
    return [json.loads(line) for line in kept]


if __name__ == "__main__":
    main("constitution", run)
