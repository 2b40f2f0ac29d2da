"""Supervised fine-tuning: demonstrations and revisions -> model. ``python -m sft RECIPE``."""
