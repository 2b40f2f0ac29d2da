"""truthward: alignment post-training that can say whether it worked, and why each choice was made.

This package holds what the stages share; it imports none of them. Stages talk through run directories on disk
(:mod:`truthward.ledger`), never by importing each other.
"""

__version__ = "0.1.0"
