"""What a recipe would take elsewhere: memory, communication, time and money, by a written cost model (``docs/scale.md``).

No stage imports this, and nothing here changes a result.
"""
