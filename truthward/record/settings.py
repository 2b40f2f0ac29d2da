"""Every value of a recorded recipe beside its default and its reason, and the recipe as TOML again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from truthward.recipe import table_names
from truthward.tables import Recipe


@dataclass(frozen=True)
class Setting:
    """One value of a recipe, its default and the reason that was given for it; ``table`` is empty for the recipe's own."""

    table: str
    key: str
    value: Any
    default: Any
    reason: str
    about: str

    @property
    def changed(self) -> bool:
        return self.value != self.default

    @property
    def name(self) -> str:
        return f"{self.table}.{self.key}" if self.table else self.key


def recipe_settings(values: dict[str, Any]) -> list[Setting]:
    """Every value of a dumped recipe in its order."""
    rows = _settings("", values, Recipe.model_fields)
    for name in table_names():
        if isinstance(values.get(name), dict):
            rows += _settings(name, values[name], type(Recipe.model_fields[name].default).model_fields)
    return rows


def _settings(table: str, values: dict[str, Any], fields: Any) -> list[Setting]:
    reasons = values.get("why", {})
    tables = table_names()
    return [
        Setting(
            table,
            key,
            value,
            fields[key].default if key in fields else None,
            reasons.get(key, "").strip(),
            (fields[key].description or "") if key in fields else "",
        )
        for key, value in values.items()
        if key != "why" and (table or key not in tables)
    ]


def recipe_toml(recipe: dict[str, Any]) -> str:
    """A recipe as TOML that loads: changed or explained values with ``why`` tables, defaults as comments."""
    settings = [s for s in recipe_settings(recipe) if s.key != "runs"]
    lines: list[str] = []
    for table in dict.fromkeys(s.table for s in settings):
        rows = [s for s in settings if s.table == table]
        lines += [f"\n[{table}]"] if table else []
        lines += [("" if s.changed or s.reason else "# ") + f"{s.key} = {_toml(s.value)}" for s in rows]
        reasons = [f"{s.key} = {_toml(s.reason)}" for s in rows if s.reason]
        lines += [f"[{table}.why]" if table else "\n[why]", *reasons] if reasons else []
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return '""' if value is None else json.dumps(value, ensure_ascii=False)
