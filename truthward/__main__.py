"""``python -m truthward`` is the ``truthward`` command."""

from truthward.cli import main

main()
