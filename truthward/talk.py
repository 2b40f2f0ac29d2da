"""``truthward chat RUN_DIR``: a conversation with the model of any stage, or with two side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truthward import chat, models
from truthward.console import plain, say, tell
from truthward.errors import UserError
from truthward.generate import generate
from truthward.hardware import use_threads
from truthward.ledger import Run


@dataclass
class Speaker:
    """A model and its conversation: of two models, each sees its own answers alone."""

    model: Any
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, line: str, seed: int, temperature: float, max_new_tokens: int) -> str:
        """What the model says to a line; both stay in its conversation."""
        self.messages.append({"role": "user", "content": line})
        (completion,) = generate(
            self.model,
            [chat.prompt_ids(self.tokenizer, self.messages)],
            [seed],
            eos=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        answer = chat.decode(self.tokenizer, completion.ids)
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def talk(run: Run, system: str, temperature: float, max_new_tokens: int, other: Run | None = None) -> None:
    """Read lines, print answers, until end of file, an empty line or an interrupt.

    Args:
        other: a second run whose model answers every line too, under the names of both.

    Raises:
        UserError: both runs are the same, or one has no model.
    """
    heads = _heads(run, other) if other else [""]
    use_threads(0)
    runs = [run, other] if other else [run]
    speakers = [Speaker(models.load(r), models.load_tokenizer(r), chat.user("", system)[:-1]) for r in runs]
    if sys.stdin.isatty():
        say(f"[dim]{plain(' and '.join(str(r.path) for r in runs))}; an empty line ends[/]")
    for turn, line in enumerate(_lines()):
        for head, speaker in zip(heads, speakers, strict=True):
            tell(_under(head, speaker.answer(line, turn, temperature, max_new_tokens)))


def _heads(run: Run, other: Run) -> list[str]:
    """What stands before the answers of two runs, equally wide: their stages, or what tells them apart where these do not.

    Raises:
        UserError: they are the same run.
    """
    paths = [Path(r.path).resolve() for r in (run, other)]
    if paths[0] == paths[1]:
        raise UserError("a model is compared with itself", where=f"--compare {other.path}", fix="name another run")
    names = [[r.stage for r in (run, other)], [p.name for p in paths], ["/".join(p.parts[-2:]) for p in paths]]
    told = next((pair for pair in names if pair[0] != pair[1]), [str(p) for p in paths])
    return [f"{name}:".ljust(max(map(len, told)) + 2) for name in told]


def _under(head: str, answer: str) -> str:
    """An answer behind its head, with further lines set in below it."""
    return head + answer.replace("\n", "\n" + " " * len(head))


def _lines():  # type: ignore[no-untyped-def]
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
