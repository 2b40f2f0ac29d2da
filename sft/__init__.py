"""Supervised fine-tuning: demonstrations and revisions -> model. ``python -m sft RECIPE``."""

import truthward as truthward  # before torch, which reads what it sets
