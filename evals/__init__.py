"""Evals: any model -> truthfulness with intervals, paired against its parent, and a gate. ``python -m evals RECIPE``."""

import truthward as truthward  # before torch, which reads what it sets
