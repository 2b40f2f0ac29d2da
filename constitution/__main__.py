"""``python -m constitution RECIPE``: the model answers, criticises, revises and judges by the written principles.

Work goes prompt group by prompt group; each group's rows are appended to ``groups.jsonl`` in one write, so a run killed
at any moment goes on with the next group and ends with the same rows. Every draw is seeded by (seed, prompt, purpose).
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from constitution.critique import critique_request, fault, repeats, revision_request
from constitution.judge import Case, Judge, measure, pick, require_qualified, soft_label
from truthward import chat, hardware, models, stats
from truthward.console import progress, say
from truthward.generate import Completion, generate
from truthward.ledger import Run, digest, write_text
from truthward.principles import COPY, read_principles
from truthward.records import Preference, Prompt, Question, Revision, draw, read_rows, write_rows
from truthward.stage import main
from truthward.tables import Recipe

GROUP = 32  # prompts between two writes
NOMINAL_TOKENS = 10  # scores are means a token; a label speaks of answers of this length


class Workshop:
    """The model, its judge and the recipe's values, with the steps that make rows."""

    def __init__(self, recipe: Recipe, this: Run) -> None:
        self.table, self.seed = recipe.constitution, recipe.seed
        parent = this.parent("model")
        self.fingerprint = parent.manifest["fingerprint"]
        self.tokenizer = models.load_tokenizer(parent)
        self.principles = read_principles(self.table.principles)
        write_text(this.path / COPY, Path(self.table.principles).read_bytes().decode())  # byte for byte, for its hash
        dtype, _ = hardware.set_up(recipe.model, this)
        self.model = models.load(parent, dtype)
        if "judge" not in this.manifest:
            this.record(judge=self._measure_judge(recipe))
        record = this.manifest["judge"]
        if recipe.constitution.judge_gate == "block":
            require_qualified(record)
        self.judge = Judge(self.model, self.tokenizer, record["chosen"])
        for method, row in record["methods"].items():
            verdict = ("at chance" if row["refused"] else "qualified") + (", used" if method == record["chosen"] else "")
            say(f"  judge by {method}: {stats.Interval(**row['accuracy'])} {verdict}")

    def _measure_judge(self, recipe: Recipe) -> dict[str, Any]:
        questions = draw(read_rows(self.table.judge_bank, Question), self.table.judge_questions, self.seed)
        truthful = [p for p in self.principles if "truth" in p.tags] or self.principles
        how_many, resamples = self.table.judge_principles, recipe.evals.resamples
        return measure(self.model, self.tokenizer, questions, truthful, how_many, resamples, self.seed)

    def group(self, prompts: list[Prompt]) -> dict[str, list[dict[str, Any]]]:
        """Everything made from a group of prompts: revisions of all rounds, and preferences."""
        answers = self._answers(prompts)
        revisions: list[Revision] = []
        current = [row[0] for row in answers]
        for number in range(1, self.table.rounds + 1):
            made = self._revise(prompts, current, number)
            revisions += made
            current = [r.revision if r.helped else a for r, a in zip(made, current, strict=True)]
        preferences = self._prefer(prompts, answers) + [self._from_revision(r) for r in revisions if r.helped]
        return {
            "revisions": [r.model_dump() for r in revisions],
            "preferences": [p.model_dump() for p in preferences if p.probability >= self.table.min_confidence],
        }

    def _say(self, requests: list[list[dict[str, str]]], seeds: list[int]) -> list[Completion]:
        return generate(
            self.model,
            [chat.prompt_ids(self.tokenizer, messages) for messages in requests],
            seeds,
            eos=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=self.table.max_new_tokens,
            temperature=self.table.temperature,
            batch_size=self.table.batch_size,
        )

    def _text(self, completion: Completion) -> str:
        return chat.decode(self.tokenizer, completion.ids) or "…"

    def _draw(self, prompt: Prompt, purpose: str) -> int:
        return int(digest([self.seed, prompt.id, purpose])[:12], 16)

    def _answers(self, prompts: list[Prompt]) -> list[list[str]]:
        """Several sampled answers to each prompt."""
        many = [(p, k) for p in prompts for k in range(self.table.samples)]
        spoken = iter(self._say([chat.user(p.prompt) for p, _ in many], [self._draw(p, f"answer {k}") for p, k in many]))
        return [[self._text(next(spoken)) for _ in range(self.table.samples)] for _ in prompts]

    def _revise(self, prompts: list[Prompt], answers: list[str], number: int) -> list[Revision]:
        """One round: a critique by one principle each, a revision, and whether it helped."""
        chosen = [pick(self.principles, 1, random.Random(self._draw(p, f"principle {number}")))[0] for p in prompts]
        triples = list(zip(prompts, answers, chosen, strict=True))
        seeds = [self._draw(p, f"critique {number}") for p in prompts]
        critiques = self._say([critique_request(p.prompt, a, c) for p, a, c in triples], seeds)
        requests = [revision_request(p.prompt, a, self._text(k), c) for (p, a, c), k in zip(triples, critiques, strict=True)]
        spoken = self._say(requests, [self._draw(p, f"revision {number}") for p in prompts])
        revised = [self._text(s) for s in spoken]
        cases = [Case(p.prompt, [a, r], [c]) for (p, a, c), r in zip(triples, revised, strict=True)]
        rows = []
        for (p, a, c), k, s, r, (before, after) in zip(
            triples, critiques, spoken, revised, self.judge.scores(cases, "judging revisions"), strict=True
        ):
            why_not = fault(a, r, s.finished) or ("" if after > before else "not judged better")
            rows.append(
                Revision(
                    prompt_id=p.id,
                    prompt=p.prompt,
                    answer=a,
                    critique=self._text(k),
                    revision=r,
                    principle=c.id,
                    principle_version=c.version,
                    round=number,
                    seed=self._draw(p, f"revision {number}"),
                    model=self.fingerprint,
                    score_before=before,
                    score_after=after,
                    helped=not why_not,
                    why_not=why_not,
                )
            )
        return rows

    def _prefer(self, prompts: list[Prompt], answers: list[list[str]]) -> list[Preference]:
        """The best against the worst of each prompt's answers, judged under principles drawn for it."""
        drawn = [pick(self.principles, self.table.judge_principles, random.Random(self._draw(p, "judge"))) for p in prompts]
        cases = [Case(p.prompt, a, d) for p, a, d in zip(prompts, answers, drawn, strict=True)]
        rows = []
        for prompt, case, scores in zip(prompts, cases, self.judge.scores(cases, "judging answers"), strict=True):
            order = sorted(range(len(scores)), key=lambda k: -scores[k])
            best, worst = case.answers[order[0]], case.answers[order[-1]]
            if best != worst and not repeats(best):
                rows.append(
                    self._preference(
                        scores[order[0]] - scores[order[-1]],
                        prompt=prompt.prompt,
                        chosen=best,
                        rejected=worst,
                        source=f"constitution/{prompt.id}/{self.judge.method}",
                        principle=[p.id for p in case.principles],
                        seed=self._draw(prompt, "judge"),
                    )
                )
        return rows

    def _from_revision(self, r: Revision) -> Preference:
        return self._preference(
            r.score_after - r.score_before,
            prompt=r.prompt,
            chosen=r.revision,
            rejected=r.answer,
            source=f"constitution/{r.prompt_id}/revision",
            principle=[r.principle],
            round=r.round,
            seed=r.seed,
        )

    def _preference(self, difference: float, **fields: Any) -> Preference:
        probability = soft_label(difference * NOMINAL_TOKENS, self.table.judge_temperature)
        return Preference(probability=probability, model=self.fingerprint, **fields)


def run(recipe: Recipe, this: Run) -> None:
    """Make all rows, group by group, and write ``revisions.jsonl`` and ``preferences.jsonl``."""
    prompts = draw(read_rows(recipe.constitution.prompts, Prompt), recipe.constitution.max_prompts, recipe.seed)
    groups = [prompts[i : i + GROUP] for i in range(0, len(prompts), GROUP)]
    path = this.path / "groups.jsonl"
    done = _whole_lines(path)
    workshop = Workshop(recipe, this)
    with progress() as bar:
        task = bar.add_task("constitution", total=len(groups), completed=len(done))
        for group in groups[len(done) :]:
            done.append(workshop.group(group))
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            bar.advance(task)
    revisions = [Revision.model_validate(r) for group in done for r in group["revisions"]]
    preferences = [Preference.model_validate(r) for group in done for r in group["preferences"]]
    write_rows(this.path / "revisions.jsonl", revisions)
    write_rows(this.path / "preferences.jsonl", preferences)
    helped = sum(r.helped for r in revisions)
    say(f"  {helped} of {len(revisions)} revisions helped; {len(preferences)} preferences")
    this.finish(
        metrics={"prompts": len(prompts), "revisions": len(revisions), "helped": helped, "preferences": len(preferences)}
    )


def _whole_lines(path: Any) -> list[dict[str, Any]]:
    """Groups that were written to their end; a line cut off by a kill is dropped from the file."""
    if not path.exists():
        return []
    kept = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what follows the last line end was cut off
    write_text(path, "".join(line + "\n" for line in kept))
    return [json.loads(line) for line in kept]


if __name__ == "__main__":
    main("constitution", run)
