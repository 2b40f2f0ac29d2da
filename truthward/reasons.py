"""A reason for every value: which are missing, and which say nothing."""

from __future__ import annotations

import re

from truthward.errors import UserError
from truthward.recipe import DATA_KEYS, prefixed, table_names
from truthward.tables import Recipe

EXAMPLE = '"1e-4 moved the loss too little in one pass over 328 rows"'
LINK = r"https?://[^\s,;)]+|(?<!\w)#\d+|[\w./-]+\.(?:md|html|svg|png|toml|jsonl?)\b|\b[a-z]+-[0-9a-f]{4,10}\b"
FEWEST = 2  # words that say something
WITHOUT_MEANING = re.findall(  # words that carry no reason by themselves
    r"\w+",
    """a an and any as at be because but by can change changed check choice chosen config default do done else experiment
    fine fix for foo bar baz from good better best had has have here hmm i idea if in into is it its just like look me my n
    na need needed needs new no none not nothing now of off ok okay old on or our override param parameter please quick
    reason reasons see set setting settings so some tbd temp temporary test tested testing tests than that the them then
    there these this to todo tried tries try trying tweak tweaked us use used using value values want wanted was we why wip
    with work works x xx xxx yes you""",
)


def links(reason: str) -> list[str]:
    """What a reason points to: runs (``ppo-81c2``), issues (``#12``), files (``docs/log.md``) and addresses."""
    return re.findall(
        r"https?://[^\s,;)]+|(?<!\w)#\d+|[\w./-]+\.(?:md|html|svg|png|toml|jsonl?)\b|\b[a-z]+-[0-9a-f]{4,10}\b", reason
    )


def says_nothing(reason: str, key: str) -> bool:
    """Whether a reason has fewer than two words that carry a meaning, apart from the key's own name, and points nowhere."""
    if links(reason):
        return False
    own = set(re.findall(r"[a-z]+", key.casefold()))
    words = re.findall(r"[^\W_]+(?:[-./#%][^\W_]+)*", reason.casefold())
    telling = {w for w in words if w not in WITHOUT_MEANING and w not in own and len(w) > 1}
    return len(telling) < FEWEST


def missing_reasons(recipe: Recipe) -> list[str]:
    """Dotted keys that were set to something other than the default, or name data, and carry no reason."""
    return [name for name, reason in _reasons(recipe) if not reason]


def empty_reasons(recipe: Recipe) -> list[tuple[str, str]]:
    """Dotted keys whose reason says nothing, with that reason."""
    return [(name, reason) for name, reason in _reasons(recipe) if reason and says_nothing(reason, name)]


def require_reasons(recipe: Recipe, where: str) -> list[str]:
    """Stop when a value lacks its reason or the reason says nothing; return what is missing when the recipe only warns.

    Raises:
        UserError: ``unexplained = "stop"`` and a value has no reason.
    """
    missing, empty = missing_reasons(recipe), empty_reasons(recipe)
    if recipe.unexplained == "warn":
        return missing + [name for name, _ in empty]
    if missing:
        table, _, key = missing[0].rpartition(".")
        header = f"[{table}.why]" if table else "[why]"
        raise UserError(
            "no reason is given for " + ", ".join(missing),
            where=where,
            fix=f'write why, e.g. under {header}: {key} = "…"; for overrides pass --why "…"; '
            'unexplained = "warn" relaxes this',
        )
    if empty:
        said = "; ".join(f'{name}: "{reason}"' for name, reason in empty)
        fix = f"say what made you choose it, so that somebody else can judge it later, e.g. {EXAMPLE}"
        raise UserError(f"a reason that says nothing is none: {said}", where=where, fix=fix)
    return missing


def _reasons(recipe: Recipe) -> list[tuple[str, str]]:
    """Every key that needs a reason, or has one, with what is given."""
    found = []
    for prefix, table in prefixed(recipe):
        for key in sorted(table.model_fields_set - {"why", "name", "runs", *table_names()}):
            changed = getattr(table, key) != type(table).model_fields[key].default
            reason = table.why.get(key, "").strip()
            if changed or reason or key in DATA_KEYS:
                found.append((prefix + key, reason))
    return found
