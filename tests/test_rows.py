"""The checklist of PPO's details: each of its 45 rows is named by a test, or left out on docs/ppo.md with the reason."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"\b[Rr]ows? (\d+(?:(?:, | and )\d+)*)\b[^:.]{0,12}:")
LEFT_OUT = re.compile(r"^- Row (\d+)\b", re.MULTILINE)


def named(source: str) -> set[int]:
    """Rows that tests of a file name before a colon in their docstrings: ``Row 14: …`` or ``Rows 3, 6 and 22: …``."""
    tests = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))
    return {
        int(n) for test in tests for found in NAMED.findall(ast.get_docstring(test) or "") for n in re.findall(r"\d+", found)
    }


def test_every_row_of_the_checklist_has_its_test_or_its_reason():
    tested = set().union(*(named(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("test_*.py")))
    page = ROOT / "docs/ppo.md"
    left_out = {int(n) for n in LEFT_OUT.findall(page.read_text(encoding="utf-8"))} if page.exists() else set()
    assert sorted(set(range(1, 46)) - tested - left_out) == []
    assert tested <= set(range(1, 46))


def test_a_row_that_no_test_names_is_missed():
    """What counts: docstrings of tests, a colon, one row or several; what does not: helpers, and rows of data."""
    source = '''
def test_one():
    """Rows 3, 6 and 22: shift."""
def test_two():
    """Hand number; row 16: V is 0. The first 7 rows: nothing, and row 9 is only spoken of."""
def helper():
    """Row 30: not a test."""
'''
    assert named(source) == {3, 6, 22, 16}
    assert LEFT_OUT.findall("- Row 19, whitening: no.\nRow 7\n- Row 45: no.") == ["19", "45"]
