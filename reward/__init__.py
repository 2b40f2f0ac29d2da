"""The preference model: preferences -> a score for any answer. ``python -m reward RECIPE``."""

import truthward as truthward  # before torch, which reads what it sets
