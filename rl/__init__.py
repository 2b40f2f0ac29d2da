"""Reinforcement learning from preferences: ``python -m rl.dpo RECIPE`` and ``python -m rl.ppo RECIPE``."""
