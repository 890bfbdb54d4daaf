"""The record that a rank leaves of itself: what the main thread says in it is never lost; and who counts as a lost peer."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from diffmoe.parallel.collectives import is_lost_peer
from diffmoe.parallel.groups import single_process
from diffmoe.training.watchdog import Beat, Watchdog


def break_off(watchdog):
    """The main thread's connection breaks; the thread that talks finds out who has gone, which takes it some beats."""
    looks = iter([None, None, None, "the end"])
    watchdog._look = lambda: next(looks) if watchdog._lost_at else None
    watchdog._without_store = lambda: None
    watchdog._end = lambda _text: watchdog._stopping.set()
    watchdog._lost(RuntimeError("Connection closed by peer"))


def fail(watchdog):
    error = KeyError("a mistake of ours")
    watchdog.__exit__(KeyError, error, None)


class Store:
    """A store in which the gate is passed before a beat is written."""

    def __init__(self, store, gate):
        self.store, self.gate = store, gate

    def set(self, key, text):
        self.gate()
        self.store.set(key, text)

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.mark.parametrize("where", ["making the beat", "writing it"])
@pytest.mark.parametrize(("end", "state"), [(break_off, "lost"), (fail, "KeyError: 'a mistake of ours'")])
def test_what_the_main_thread_says_is_in_the_last_beat(where, end, state):
    """It says so while the other thread is in the middle of a beat that does not know it yet."""
    watchdog = Watchdog(single_process(), 60.0)
    watchdog.world, watchdog.interval = 2, 0.02
    store, place = watchdog._store, watchdog._place
    inside, go_on = threading.Event(), threading.Event()

    def gate():
        if threading.current_thread() is watchdog._talker and not inside.is_set():
            inside.set()
            go_on.wait(60)

    if where == "making the beat":
        watchdog._place = lambda: (gate(), place())[1]
    else:
        watchdog._store = Store(store, gate)
    watchdog.__enter__()
    assert inside.wait(60)
    threading.Timer(0.3, go_on.set).start()  # once the main thread has said it, and waits
    end(watchdog)
    for thread in (watchdog._talker, watchdog._thread):
        thread.join(60)
        assert not thread.is_alive()
    assert Beat.loads(store.get("beat/0")).state == state


def test_a_rank_that_ends_by_its_own_error_is_not_ended_by_anothers(monkeypatch):
    """All ranks met the same mistake: each keeps its own traceback."""
    watchdog = Watchdog(single_process(), 60.0)
    watchdog.world, watchdog.interval = 2, 0.02
    ended = []
    monkeypatch.setattr(watchdog, "_end", ended.append)
    watchdog._look = lambda: "rank 1 ended by KeyError" if watchdog._state else None
    watchdog.__enter__()
    tell = watchdog._tell

    def slow_tell():
        tell()
        time.sleep(0.2)

    watchdog._tell = slow_tell
    fail(watchdog)
    assert not ended


# -------------------------------------------------------------------------------------------------- a lost peer


GLOO = "[/a/pytorch/third_party/gloo/gloo/transport/tcp/"
NCCL = "NCCL error in: /a/ProcessGroupNCCL.cpp:77, "


class OurError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [
    RuntimeError(GLOO + "pair.cc:553] Connection closed by peer [127.0.0.1]:24971. This is typically caused by a remote worker"),
    RuntimeError(GLOO + "pair.cc:538] Read error [127.0.0.1]:9: Connection reset by peer"),
    RuntimeError(GLOO + "unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"),
    RuntimeError("[/a/third_party/gloo/gloo/rendezvous/context.cc:143] Gloo connectFullMesh failed with timed out connecting"),
    RuntimeError("Wait timeout"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
    RuntimeError("[PG ID 0 PG GUID 0 Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    dist.DistBackendError(NCCL + "remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"),
    dist.DistStoreError("wait timeout after 5000ms, keys: /default_pg/0"),
], ids=lambda error: str(error)[:40])
def test_what_torch_says_of_a_lost_peer(error):
    assert is_lost_peer(error)


@pytest.mark.parametrize("error", [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4): an input of gloo's all-reduce"),
    RuntimeError("[enforce fail at /a/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 1200 vs 400"),
    RuntimeError("shape mismatch in the buffer of an NCCL all-to-all"),
    RuntimeError("CUDA error: an illegal memory access was encountered; NCCL may report it later"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (connection reset by peer is no reason)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB, of which NCCL holds 1"),
    dist.DistBackendError(NCCL + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA failed. Cuda failure 2 'out of memory'"),
    dist.DistBackendError(NCCL + "invalid usage\nncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"),
    OurError("Wait timeout"),
    ConnectionResetError("[Errno 104] Connection reset by peer"),
    TimeoutError("timed out"),
    ValueError("gloo"),
], ids=lambda error: str(error)[:40])
def test_what_only_mentions_it(error):
    assert not is_lost_peer(error)
