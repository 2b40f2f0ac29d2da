"""The constitution at work: principles -> critiques, revisions, preferences. ``python -m constitution RECIPE``."""

import truthward as truthward  # before torch, which reads what it sets
