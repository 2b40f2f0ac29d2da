"""The preference model: preferences -> a score for any answer. ``python -m reward RECIPE``."""
