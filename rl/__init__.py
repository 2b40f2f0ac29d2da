"""Reinforcement learning from preferences: ``python -m rl.dpo RECIPE`` and ``python -m rl.ppo RECIPE``."""

import truthward as truthward  # before torch, which reads what it sets
