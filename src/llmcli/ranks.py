"""Whether this process is one of several on a run, as torchrun and accelerate launch start them. Nothing heavy: reading
the environment tells."""

import os


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def own() -> int:
    """Which of them this is. The first, 0, reads the input and writes the results."""
    return int(os.environ["RANK"]) if count() > 1 else 0
