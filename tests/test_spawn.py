"""Ranks as child processes: results in order, errors with their rank, no hang, and a fresh world
after a failure.
"""

import os
import time

import pytest
import torch
import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.parallel.spawn import RankError, Ranks


def add_up(value):
    total = torch.full((2,), float(value))
    dist.all_reduce(total)
    return dist.get_rank(), total, torch.get_num_threads()


def fail_alone(how):
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("depth (3) must be 4")
        if how == "die":
            os._exit(3)
        time.sleep(60)
    dist.barrier()


def lose_rank_1():
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os._exit(3)
    raise RuntimeError("Read error: Connection reset by peer")


def process_id():
    return os.getpid()


@pytest.mark.full
def test_results_errors_and_fresh_worlds():
    with Ranks(2) as ranks:
        for value in (1, 2):
            for rank, (number, total, threads) in enumerate(ranks.run(add_up, value)):
                assert (number, threads) == (rank, 1) and torch.equal(
                    total, torch.full((2,), 2.0 * value)
                )
        with pytest.raises(
            RankError, match=r"(?s)rank 1: ValueError: depth \(3\) must be 4.*in fail_alone"
        ) as error:
            ranks.run(fail_alone, "raise")
        assert (error.value.rank, error.value.kind) == (1, "ValueError")
        children = ranks.run(process_id)
        with pytest.raises(RankError, match="rank 1: RuntimeError: the process died"):
            ranks.run(fail_alone, "die")
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_the_rank_that_died_is_told_of_and_not_the_one_that_lost_it():
    with Ranks(2) as ranks:
        ranks.run(process_id)
        with pytest.raises(RankError, match="rank 1: RuntimeError: the process died"):
            ranks.run(lose_rank_1)


@pytest.mark.full
def test_a_rank_that_hangs():
    with Ranks(2) as ranks:
        ranks.run(process_id)
        ranks.timeout = 3.0
        with pytest.raises(
            RankError, match=r"TimeoutError: no answer after 3 s from ranks \[0, 1\]"
        ):
            ranks.run(fail_alone, "sleep")


def test_one_rank_and_none():
    with Ranks(1) as ranks:
        assert [total[0].item() for _, total, _ in ranks.run(add_up, 5)] == [5.0]
    with pytest.raises(UserError, match=r"world \(0\)"):
        Ranks(0)
