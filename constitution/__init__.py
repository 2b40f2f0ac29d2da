"""The constitution at work: principles -> critiques, revisions, preferences. ``python -m constitution RECIPE``."""
