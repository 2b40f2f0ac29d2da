"""``truthward chat RUN_DIR``: a conversation with the model of any stage."""

from __future__ import annotations

import sys

from truthward import chat, models
from truthward.console import plain, say, tell
from truthward.generate import generate
from truthward.hardware import use_threads
from truthward.ledger import Run


def talk(run: Run, system: str, temperature: float, max_new_tokens: int) -> None:
    """Read lines, print answers, until end of file, an empty line or an interrupt."""
    use_threads(0)
    model, tokenizer = models.load(run), models.load_tokenizer(run)
    if sys.stdin.isatty():
        say(f"[dim]{plain(run.path)}; an empty line ends[/]")
    messages = chat.user("", system)[:-1]
    for turn, line in enumerate(_lines()):
        messages.append({"role": "user", "content": line})
        (completion,) = generate(
            model,
            [chat.prompt_ids(tokenizer, messages)],
            [turn],
            eos=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        answer = chat.decode(tokenizer, completion.ids)
        tell(answer)
        messages.append({"role": "assistant", "content": answer})


def _lines():  # type: ignore[no-untyped-def]
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
