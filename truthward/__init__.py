"""truthward: alignment post-training that can say whether it worked, and why each choice was made.

This package holds what the stages share; it imports none of them. Stages talk through run directories on disk
(:mod:`truthward.ledger`), never by importing each other.
"""

import os

__version__ = "0.1.0"

# Libraries read these once, when they are loaded. Every command imports this package before any of them, and the processes
# that it starts inherit them. What the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:  # torch's threads spin where they wait: beside other work 5 to 25 times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for the OpenMP of Intel and LLVM
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars show the progress
