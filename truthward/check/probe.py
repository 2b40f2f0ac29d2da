"""``python -m truthward.check.probe FILE.py:FUNCTION``: ask a reward function for scores, in a process of its own.

It reads ``{"prompts": [...], "completions": [...], "completion_ids": [[...], ...]}`` and writes the scores as JSON in its
last line, so that the function may print what it likes, and can neither harm nor delay the check.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path


def main() -> None:
    """Entry point."""
    path, _, name = sys.argv[1].rpartition(":")
    sys.path[:0] = [str(Path.cwd())]
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function, given = getattr(module, name), json.load(sys.stdin)
    parameters = inspect.signature(function).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    scores = function(**{n: values for n, values in given.items() if free or n in parameters})
    print()
    print(json.dumps([float(score) for score in scores]))


if __name__ == "__main__":
    main()
