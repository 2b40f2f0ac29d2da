"""What the constitution stage makes of a group of prompts: answers, critiques, revisions, and preferences.

Every draw is seeded by (seed, prompt, purpose), and every row names its principle and version, its seed and its model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from constitution.critique import critique_request, fault, pick_shots, repeats, revision_request
from constitution.qualify import Panel, pick
from truthward import chat
from truthward.examples import Example
from truthward.generate import Completion, generate
from truthward.ledger import digest
from truthward.principles import Principle
from truthward.records import Preference, Prompt, Revision
from truthward.stats import probability
from truthward.tables import Constitution, Judge

Rows = dict[str, list[dict[str, Any]]]


@dataclass
class Workshop:
    """A model that writes, a panel that judges, and the recipe's values.

    Attributes:
        fingerprint: of the model.
    """

    model: Any
    tokenizer: Any
    fingerprint: str
    panel: Panel
    examples: list[Example]
    table: Constitution
    judge: Judge
    seed: int

    def group(self, prompts: list[Prompt]) -> Rows:
        """Everything made from a group of prompts: ``revisions`` of all rounds, and ``preferences``."""
        answers = self._answers(prompts)
        revisions: list[Revision] = []
        current = [row[0] for row in answers]
        for number in range(1, self.table.rounds + 1):
            made = self._revise(prompts, current, number)
            revisions += made
            current = [r.revision if r.helped else a for r, a in zip(made, current, strict=True)]
        preferences: list[Preference] = []
        if "samples" in self.table.ways:
            preferences += self._from_samples(prompts, answers)
        if "contrast" in self.table.ways:
            preferences += self._from_contrast(prompts)
        if "revisions" in self.table.ways:
            preferences += [self._from_revision(r) for r in revisions if r.helped]
        return {
            "revisions": [r.model_dump() for r in revisions],
            "preferences": [p.model_dump() for p in preferences if p.probability >= self.table.min_confidence],
        }

    # ------------------------------------------------------------------------------------------------------- writing

    def _say(self, requests: list[list[dict[str, str]]], seeds: list[int]) -> list[Completion]:
        return generate(
            self.model,
            [chat.prompt_ids(self.tokenizer, request) for request in requests],
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

    def _pick(self, prompt: Prompt, purpose: str, how_many: int = 1) -> list[Principle]:
        return pick(self.panel.principles, how_many, random.Random(self._draw(prompt, purpose)))

    def _answers(self, prompts: list[Prompt]) -> list[list[str]]:
        """Several sampled answers to each prompt."""
        many = [(p, k) for p in prompts for k in range(self.table.samples)]
        seeds = [self._draw(p, f"answer {k}") for p, k in many]
        spoken = iter(self._say([chat.user(p.prompt) for p, _ in many], seeds))
        return [[self._text(next(spoken)) for _ in range(self.table.samples)] for _ in prompts]

    def _shots(self, prompt: Prompt, principle: Principle, number: int) -> list[Example]:
        return pick_shots(self.examples, principle, self.table.shots, random.Random(self._draw(prompt, f"shots {number}")))

    # ----------------------------------------------------------------------------------------- critique and revision

    def _revise(self, prompts: list[Prompt], answers: list[str], number: int) -> list[Revision]:
        """One round: a critique by one principle each, a revision, and whether it helped."""
        chosen = [self._pick(p, f"principle {number}")[0] for p in prompts]
        shots = [self._shots(p, c, number) for p, c in zip(prompts, chosen, strict=True)]
        parts = list(zip(prompts, answers, chosen, shots, strict=True))
        asked = [critique_request(p.prompt, a, c, s) for p, a, c, s in parts]
        critiques = [self._text(k) for k in self._say(asked, [self._draw(p, f"critique {number}") for p in prompts])]
        asked = [revision_request(p.prompt, a, k, c, s) for (p, a, c, s), k in zip(parts, critiques, strict=True)]
        spoken = self._say(asked, [self._draw(p, f"revision {number}") for p in prompts])
        revised = [self._text(s) for s in spoken]
        cases = [(p.prompt, [a, r], [c]) for (p, a, c, _), r in zip(parts, revised, strict=True)]
        scores = self.panel.log_odds(cases, "judging revisions")
        rows = []
        for (p, a, c, s), k, r, said, pair in zip(parts, critiques, revised, spoken, scores, strict=True):
            before, after = pair or (None, None)
            why_not = fault(a, r, said.finished, s, may_refuse="harm" in c.tags)
            if not why_not and pair is None:
                why_not = "not judged"
            elif not why_not and pair and pair[1] <= pair[0]:
                why_not = "not judged better"
            rows.append(
                Revision(
                    prompt_id=p.id,
                    prompt=p.prompt,
                    answer=a,
                    critique=k,
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

    # --------------------------------------------------------------------------------------------------- preferences

    def _from_samples(self, prompts: list[Prompt], answers: list[list[str]]) -> list[Preference]:
        """The best against the worst of each prompt's samples, judged by principles drawn for it."""
        drawn = [self._pick(p, "judge", self.judge.principles) for p in prompts]
        cases = [(p.prompt, a, d) for p, a, d in zip(prompts, answers, drawn, strict=True)]
        rows = []
        scored = self.panel.log_odds(cases, "judging samples")
        for prompt, (_, texts, principles), scores in zip(prompts, cases, scored, strict=True):
            if scores is None:
                continue
            order = sorted(range(len(scores)), key=lambda k: -scores[k])
            best, worst = order[0], order[-1]
            if texts[best] != texts[worst] and not repeats(texts[best]):
                rows.append(
                    self._preference(
                        scores[best] - scores[worst],
                        prompt=prompt.prompt,
                        chosen=texts[best],
                        rejected=texts[worst],
                        source=f"constitution/{prompt.id}/samples",
                        principle=[p.id for p in principles],
                        seed=self._draw(prompt, "judge"),
                    )
                )
        return rows

    def _from_contrast(self, prompts: list[Prompt]) -> list[Preference]:
        """An answer told to keep a principle against one told to break it (RLCD), where the panel sees it so too."""
        principles = [self._pick(p, "contrast")[0] for p in prompts]
        sides: list[list[str]] = []
        for side in ("follow", "violate"):
            asked = [chat.user(p.prompt, getattr(c, side)) for p, c in zip(prompts, principles, strict=True)]
            sides.append([self._text(s) for s in self._say(asked, [self._draw(p, side) for p in prompts])])
        cases = [(p.prompt, [f, v], [c]) for p, f, v, c in zip(prompts, *sides, principles, strict=True)]
        rows = []
        scored = self.panel.log_odds(cases, "judging contrasts")
        for prompt, (_, (kept, broke), (c,)), scores in zip(prompts, cases, scored, strict=True):
            if scores is not None and scores[0] > scores[1] and not repeats(kept):
                rows.append(
                    self._preference(
                        scores[0] - scores[1],
                        prompt=prompt.prompt,
                        chosen=kept,
                        rejected=broke,
                        source=f"constitution/{prompt.id}/contrast",
                        principle=[c.id],
                        seed=self._draw(prompt, "follow"),
                    )
                )
        return rows

    def _from_revision(self, r: Revision) -> Preference:
        assert r.score_before is not None  # or it would not have helped
        assert r.score_after is not None
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

    def _preference(self, log_odds: float, **fields: Any) -> Preference:
        label = min(probability(log_odds), 1 - self.judge.clamp)
        return Preference(probability=label, model=self.fingerprint, **fields)
