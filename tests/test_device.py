"""Which device a rank takes, and what it is said to be able to do."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from diffmoe import device as devices
from diffmoe.device import check_own_gpu, local_device, measured_flops, peak_flops
from diffmoe.errors import UserError


def see_gpus(monkeypatch, *uuids):
    """What torch tells of CUDA in a process that sees these GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "to be put back")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(uuids))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index]))


def test_more_ranks_than_gpus_is_every_ranks_error(monkeypatch):
    """The ranks that have a GPU would otherwise wait for the one that has none."""
    see_gpus(monkeypatch, "a", "b")
    for rank in range(3):
        with pytest.raises(UserError, match=r"ranks on this node \(3\) must not exceed its GPUs \(2\)"):
            local_device(rank, 3)


@pytest.mark.parametrize(("shown", "number"), [(["abc", "abc", "abc"], [0, 1, 2]), (["a", "b", "c"], [0, 0, 0])])
def test_each_rank_has_its_own_gpu_of_all_or_the_one_it_sees(monkeypatch, shown, number):
    """``srun --gpus-per-task=1`` shows every process one GPU, which it calls 0."""
    store = HashStore()
    for rank, uuids in reversed(list(enumerate(shown))):
        see_gpus(monkeypatch, *uuids)
        device = local_device(rank, 3)
        assert device.index == number[rank] and os.environ["LOCAL_RANK"] == str(number[rank]), "what DeepSpeed reads"
        if rank:
            store.set(f"gpu/{socket.gethostname()}/{rank}", uuids[device.index])
    check_own_gpu(device, 0, 3, store)  # the others are there already


def test_ranks_that_see_the_same_one_gpu_are_refused(monkeypatch):
    see_gpus(monkeypatch, "a")
    store = HashStore()
    for rank in (1, 0):
        device = local_device(rank, 2)
        store.set(f"gpu/{socket.gethostname()}/{rank}", "a")
    with pytest.raises(UserError, match=r"ranks on this node \(2\) must not exceed its GPUs \(1\)"):
        check_own_gpu(device, 0, 2, store)


def test_the_peak_of_an_unknown_gpu_is_measured_in_bf16(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA Z1")
    monkeypatch.setattr(devices, "measured_flops", lambda *what: asked.append(what) or 5e12)
    peak = peak_flops.__wrapped__  # what was found is kept for the rest of a process
    assert peak(torch.device("cuda", 0)) == (5e12, "NVIDIA Z1, measured bf16 matmul")
    (_, dtype, size, tries), = asked
    assert dtype == torch.bfloat16 and size >= 8192 and tries >= 5
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert peak(torch.device("cuda", 0)) == (989e12, "NVIDIA H200 data sheet") and len(asked) == 1


def test_a_measured_peak_is_a_rate():
    assert 1e6 < measured_flops(torch.device("cpu"), torch.float32, 128, 5) < 1e15
