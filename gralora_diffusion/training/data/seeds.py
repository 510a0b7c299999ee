"""Random generators that depend only on (seed, purpose, position), so that none has a state."""

from __future__ import annotations

import hashlib
import json

import torch


def seed_from(*parts: int | str) -> int:
    """Hash ``parts`` to a seed from 0 to 2**63 - 1 that is the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """Return the CPU generator for one purpose at one position of the stream.

    torch's CPU generator uses only the lower 32 bits of its seed, so two positions get the same
    random numbers with a probability of 1 in 2**32. Among n positions there are about n**2 / 2**33
    such pairs: one among the first 90,000, and 20 of 300,000 positions have a partner. They share
    noise or a timestep, but hardly ever the same image. More bits would change the random numbers
    of every run, and so the result of every run that is resumed.
    """
    return torch.Generator("cpu").manual_seed(seed_from(seed, purpose, position))
