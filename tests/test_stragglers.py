"""Which rank is named as the one that holds the others up: by hand-written times, and in training
in which one rank is slow.
"""

import json
import os
import time

import pytest
import torch

from programs import Nursery, tiny, zero


def slowed(arguments):
    """run.py, where rank ``arguments[0]`` sleeps in every forward or reading."""
    from diffmoe.data.feed import Feed
    from diffmoe.training.engine import Engine
    from run import main

    victim, where, *arguments = arguments
    owner, name = {"forward": (Engine, "forward"), "data": (Feed, "read_ahead")}[where]
    kept = getattr(owner, name)

    def sleepy(*given):
        time.sleep(0.3)
        return kept(*given)

    if os.environ["RANK"] == victim:
        setattr(owner, name, sleepy)
    return main(arguments)
