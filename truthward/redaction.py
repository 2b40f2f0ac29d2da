"""What is never written down: keys, tokens and passwords, and whose home a path leads through.

Records, cards, reports and messages pass here on their way out. A secret is known by its shape, by the name that a value
is given to, or because it stands in an environment variable whose name says so.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters of a secret; a user's name and password in an address have more with the address
SURROGATE = re.compile("[\ud800-\udfff]")
SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      hf_[A-Za-z0-9]{20,}                                   # Hugging Face
    | sk-(?=[\w-]*\d)[\w-]{16,}                             # OpenAI, Anthropic and their like
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,}       # GitHub
    | glpat-[\w-]{20,}                                      # GitLab
    | (?:AKIA|ASIA)[0-9A-Z]{16}                             # AWS
    | AIza[\w-]{30,}                                        # Google
    | xox[abeoprs]-[\w-]{10,}                               # Slack
    | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}                 # JSON web token
    )""",
    re.VERBOSE,
)
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
NAMED = re.compile(  # what stands after a name and a sign: api_key = "…", Authorization: Bearer …, https://user:…@host
    r"""((?i:api[_-]?key|secret|token|passw(?:or)?d|credential|authorization|(?<![A-Za-z])key)s?["']?\s*[=:]\s*["']?
         (?i:bearer\s+|basic\s+)?
    | (?i:\bbearer\s+))
    (?=[^\s"']*\d)(?=[^\s"']*[A-Za-z])[A-Za-z0-9+/_\-]{20,}={0,2}(?![\w.(\[])""",
    re.VERBOSE,
)
USERINFO = re.compile(r"(?<![\w+.-])([a-z][a-z0-9+.-]{0,20}://)[^\s/@\"'<>]{1,200}@")
SAYS_SECRET = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?|AUTH)(?:_|$)", re.IGNORECASE
)
SECRET_KEYS = re.compile(r"(?:.*[_-])?(?:api[_-]?key|password|passwd|secret|authorization|access[_-]?token)", re.IGNORECASE)
HOMES = re.compile(r"(?<![\w.~-])(?:/home/[^/\s'\"]+|/Users/[^/\s'\"]+|/root)(?=$|[/\s'\",:;)\]])")


def without_secrets(text: str) -> str:
    """The text with ``***`` for every secret in it."""
    if len(text) < SHORTEST:
        return text
    for value in _environment():
        text = text.replace(value, HIDDEN)
    text = PRIVATE_KEY.sub(HIDDEN, text)
    text = USERINFO.sub(rf"\1{HIDDEN}@", text)
    return NAMED.sub(rf"\1{HIDDEN}", SHAPES.sub(HIDDEN, text))


def holds_secret(text: str) -> bool:
    """Whether :func:`without_secrets` would change the text."""
    return without_secrets(text) != text


def tidy(text: str) -> str:
    """Text without the folders that lead to this project or to somebody's home."""
    for folder, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if len(folder.parts) > 1:
            text = re.sub(rf"(?<![\w.~/-]){re.escape(str(folder))}/", short, text)
    return HOMES.sub("~", text)


def clean(value: Any, *, homes: bool = False) -> Any:
    """A JSON value without secrets, in its keys too; what is called a password is hidden whatever it looks like.

    Args:
        homes: leave the way to them in place; in what people and models say it gives nobody away.
    """
    if isinstance(value, str):
        value = SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)  # a command line can hold half a pair, a file cannot
        if len(value) < len("/root"):
            return value
        return without_secrets(value) if homes else tidy(without_secrets(value))
    if isinstance(value, list | tuple):
        return [clean(one, homes=homes) for one in value]
    if isinstance(value, dict):
        return {clean(k, homes=homes): HIDDEN if _named(k, v) else clean(v, homes=homes) for k, v in value.items()}
    return value


def _named(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and value != "" and SECRET_KEYS.fullmatch(key) is not None


def _environment() -> list[str]:
    """Values of variables that are named like secrets, longest first; paths, and words too short or plain, are none."""
    values = {value.strip() for name, value in os.environ.items() if SAYS_SECRET.search(name)}
    return sorted((v for v in values if _telling(v)), key=len, reverse=True)


def _telling(value: str) -> bool:
    long = len(value) >= 16 or (len(value) >= SHORTEST and any(c.isdigit() for c in value))
    return long and not os.path.exists(value)
