"""Data that are not on this machine: a real server on this one's loopback, pipes, retries, and the
cache of bounded size.
"""

from __future__ import annotations

import errno
import fcntl
import http.server
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diffmoe import files
from diffmoe.config import load_config
from diffmoe.data import sources
from diffmoe.data.cache import Cache
from diffmoe.data.fit import check_local_index
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import BadShard
from diffmoe.data.shards import ShardIndex, ShardMeta, load_index, write_shards
from diffmoe.data.share import Share
from diffmoe.data.stream import BatchStream
from diffmoe.errors import UserError
from programs import REPOSITORY

SHARD = 30_720  # bytes
FIT = ["model.input_size=8", "model.channels=1", "model.classes=10"]  # with `index`


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    samples = ((f"{i:03d}", np.full((1, 8, 8), i, np.float32), i % 10) for i in range(103))
    made = write_shards(
        samples,
        tmp_path / "set",
        samples_per_shard=10,
        meta=ShardMeta("pixels", 10, accept_values=True),
    )
    assert {shard.bytes for shard in made.shards[:-1]} == {SHARD}
    return made


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.01)


@dataclass
class Server:
    """A folder served over HTTP. The first requests for shards go wrong: `faults` are taken in
    turn.
    """

    address: str = ""
    faults: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)


@contextmanager
def serving(folder: Path, *faults: str) -> Iterator[Server]:
    server = Server(faults=list(faults))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            server.served.append(self.path.rpartition("/")[2])
            fault = server.faults.pop(0) if server.faults and ".tar" in self.path else ""
            if fault.isdigit():
                self.send_error(int(fault))
            elif fault == "dies":
                self.connection.close()
            elif fault:
                content = (folder / server.served[-1]).read_bytes()
                content = content[: len(content) // 2] + (
                    b"x" * (len(content) // 2) if fault == "alters" else b""
                )
                if fault == "babbles":
                    return
                self.send_response(200)
                if fault == "cuts a chunk":
                    self.send_header("Transfer-Encoding", "chunked")
                    content = b"%x\r\n%s" % (2 * len(content), content)
                if fault == "cuts":
                    self.send_header("Content-Length", str(2 * len(content)))
                self.end_headers()
                self.wfile.write(content)
                if fault == "stalls":
                    time.sleep(3)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    class Listener(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    with Listener(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as httpd:
        server.address = f"http://127.0.0.1:{httpd.server_address[1]}"
        threading.Thread(
            target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        yield server
        httpd.shutdown()


def cache(folder: Path, shards: float = 100) -> Cache:
    return Cache(folder / "cache", int(shards * SHARD))


def numbers(
    index: ShardIndex, store: Cache | None, positions: range = range(103), **more
) -> list[int]:
    reader = ShardReader(index, seed=0, cache=store, **more)
    x, _ = reader.read(positions)
    reader.close()
    return x[:, 0, 0, 0].astype(int).tolist()


def held(store: Cache) -> int:
    return sum(path.stat().st_size for path in store.folder.iterdir())


@pytest.mark.parametrize("form", ["{}", "{}/index.json", "{}/shard-{{000000..000010}}.tar"])
def test_a_served_data_set_is_read_as_the_local_one(
    index: ShardIndex, tmp_path: Path, form: str
) -> None:
    with serving(index.folder) as server:
        remote = load_index(form.format(server.address))
        assert (remote.count, remote.fingerprint) == (103, index.fingerprint)
        assert numbers(remote, cache(tmp_path)) == numbers(index, None)
        assert numbers(remote, cache(tmp_path)) == numbers(index, None)
    assert sorted(server.served) == ["index.json"] + [
        shard.name for shard in index.shards
    ]  # each fetched once


def test_pipes_braces_globs_and_a_far_index(index: ShardIndex, tmp_path: Path) -> None:
    piped = load_index(f"pipe:cat {index.folder}/shard-{{000000..000010}}.tar")
    assert numbers(piped, cache(tmp_path)) == numbers(index, None)
    (tmp_path / "elsewhere.json").write_bytes((index.folder / "index.json").read_bytes())
    (index.folder / "index.json").unlink()
    far = load_index(f"{index.folder}/shard-*.tar", str(tmp_path / "elsewhere.json"))
    assert numbers(far, None) == numbers(index, None)
    some = load_index(
        f"{index.folder}/shard-00000{{1..3}}.tar", f"pipe:cat {tmp_path}/elsewhere.json"
    )
    assert sorted(numbers(some, None, range(30))) == list(range(10, 40))


def test_a_pipe_is_read_by_a_process_with_a_thousand_open_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    held = [os.open(tmp_path, os.O_RDONLY) for _ in range(1030)]
    try:
        assert b"".join(sources.chunks("pipe:printf abc")) == b"abc"
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_fsspec_opens_is_read(index: ShardIndex, tmp_path: Path) -> None:
    for path in index.folder.iterdir():
        with fsspec.open(f"memory://bucket/set/{path.name}", "wb") as stream:
            stream.write(path.read_bytes())
    assert numbers(load_index("memory://bucket/set"), cache(tmp_path)) == numbers(index, None)
    with pytest.raises(UserError, match="memory://nowhere/index.json cannot be read"):
        load_index("memory://nowhere")


def test_what_a_stores_client_raises_is_tried_again_and_then_said(monkeypatch) -> None:
    class NoCredentials(Exception):
        pass

    asked = []

    def fail(*_: object, **__: object) -> None:
        asked.append(1)
        raise NoCredentials("who are you")

    monkeypatch.setattr(MemoryFileSystem, "_open", fail)
    with pytest.raises(UserError, match="index.json cannot be read: NoCredentials: who are you"):
        load_index("memory://bucket/set")
    assert len(asked) == files.TRIES


@pytest.mark.parametrize(
    "fault", ["503", "429", "dies", "cuts", "cuts a chunk", "babbles", "ends", "alters"]
)
def test_a_server_that_fails_and_then_works(
    index: ShardIndex, tmp_path: Path, capfd: pytest.CaptureFixture, fault: str
) -> None:
    with serving(index.folder) as server:
        remote = load_index(server.address)
        server.faults += [fault] * 3
        assert numbers(remote, cache(tmp_path), streams=1) == numbers(index, None, streams=1)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data: ")]
    assert len(said) == 3 and all(
        "shard-" in line and "trying again in" in line for line in said
    ), said


def test_a_silent_server_is_given_up(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "STALL", 0.3)
    with serving(index.folder) as server:
        remote = load_index(server.address)
        server.faults += ["stalls"]
        assert numbers(remote, cache(tmp_path), range(2)) == numbers(index, None, range(2))
    with pytest.raises(OSError, match="no byte for 0.3 s"):
        list(sources.chunks("pipe:sleep 30"))


def test_a_source_that_stays_bad_is_an_error_that_names_it(
    index: ShardIndex, tmp_path: Path
) -> None:
    with serving(index.folder) as server:
        remote = load_index(server.address)
        server.faults += ["500"] * 1000
        with pytest.raises(
            BadShard, match=r"shard shard-0.*tar cannot be fetched from http:.*HTTP status 500"
        ):
            numbers(remote, cache(tmp_path), range(1))
        assert len(server.served) == 1 + files.TRIES
        server.faults = ["404"] * 1000
        with pytest.raises(BadShard, match="HTTP status 404"):
            numbers(remote, cache(tmp_path), range(1))
        assert len(server.served) == 2 + files.TRIES  # asked once: it said no
        with pytest.raises(UserError, match="nowhere/index.json cannot be read: HTTP status 404"):
            load_index(f"{server.address}/nowhere")
    with pytest.raises(BadShard, match="command ended with exit status 3"):
        store = cache(tmp_path)
        store.open(index.shards[0], "pipe:exit 3")
    assert not [path for path in store.folder.iterdir() if path.suffix == ".part"]


def test_a_local_disk_that_is_full_is_no_bad_shard(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"pipe:cat {index.folder}/{index.shards[0].name}"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda _file, data, _place: len(data) - 1)  # what is left
        with pytest.raises(UserError, match=f"data.cache .*{os.strerror(errno.ENOSPC)}") as full:
            cache(tmp_path).open(index.shards[0], place)
    assert not isinstance(full.value, BadShard)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache \(.*file/cache\) cannot be written"):
        cache(tmp_path / "file").open(index.shards[0], place)
    os.close(cache(tmp_path).open(index.shards[0], place))


def test_the_cache_is_bounded_and_what_is_open_stays(index: ShardIndex, tmp_path: Path) -> None:
    with serving(index.folder) as server:
        remote = load_index(server.address)
        small = cache(tmp_path, shards=4)
        reader = ShardReader(remote, seed=0, cache=small)
        for position in range(2 * 103):
            reader.read([position])
            assert held(small) <= small.limit
        assert len(server.served) > 1 + 11  # some were fetched again
        reader.close()
        descriptors = [small.open(shard, remote.address(shard)) for shard in remote.shards[:4]]
        with pytest.raises(
            UserError,
            match=r"data.cache_gib \(0.000114\) is too small: .* shards in use with shard "
            r"shard-000004",
        ):
            small.open(remote.shards[4], remote.address(remote.shards[4]))
        os.close(descriptors[2])
        os.close(small.open(remote.shards[4], remote.address(remote.shards[4])))
        names = {path.name.removesuffix(".tar") for path in small.folder.glob("*.tar")}
        assert names == {remote.shards[i].sha256 for i in (0, 1, 3, 4)}
        for descriptor in descriptors[:2] + descriptors[3:]:
            os.close(descriptor)


_READ = """
import sys
from pathlib import Path
from diffmoe.data.cache import Cache
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import load_index
index = load_index(sys.argv[1])
reader = ShardReader(index, seed=0, batch=11, streams=11, cache=Cache(Path(sys.argv[2]), 1 << 30))
print(reader.read(range(103))[0][:, 0, 0, 0].astype(int).tolist())
"""


def test_processes_share_the_cache_and_fetch_each_shard_once(
    index: ShardIndex, tmp_path: Path
) -> None:
    with serving(index.folder) as server:
        command = [sys.executable, "-c", _READ, server.address, str(tmp_path / "cache")]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
            for _ in range(3)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == [f"{numbers(index, None, batch=11, streams=11)}\n"] * 3
    assert sorted(name for name in server.served if name != "index.json") == [
        shard.name for shard in index.shards
    ]


def test_what_a_killed_process_left_is_cleared_away(index: ShardIndex, tmp_path: Path) -> None:
    store = cache(tmp_path, shards=3)
    store.folder.mkdir()
    part = store.folder / f"{index.shards[0].sha256}.part"
    part.write_bytes(b"half")
    short = store.folder / f"{index.shards[1].sha256}.tar"
    short.write_bytes(b"half")  # a disk that lost its power
    for shard in index.shards[:2]:
        descriptor = store.open(shard, f"pipe:cat {index.address(shard)}")
        assert os.pread(descriptor, shard.bytes, 0) == Path(index.address(shard)).read_bytes()
        with open(store.folder / f"{shard.sha256}.tar") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    assert not part.exists()


def test_workers_read_remote_shards(index: ShardIndex, tmp_path: Path) -> None:
    with serving(index.folder) as server:
        remote = load_index(server.address)
        reader = ShardReader(remote, seed=0, batch=12, streams=3, window=1, cache=cache(tmp_path))
        local = ShardReader(index, seed=0, batch=12, streams=3, window=1)
        with BatchStream(reader, Share(12, 12, 1, 0, 1), start_step=0, workers=2) as stream:
            for step in range(12):
                (batch,) = next(stream)
                assert np.array_equal(batch.x.numpy(), local.read(batch.positions)[0]), step


@pytest.mark.parametrize(
    "address, message",
    [
        ("/nowhere", "/nowhere. does not exist"),
        ("/nowhere/a.tar", "a.tar does not exist"),
        ("pipe:cat x", "must name a .tar"),
        ("pipe:cat /{a,b}/x.tar", "lies in 2 places"),
        ("/data/{000..010.tar", r"data.shards \(/data/\{000..010.tar\): Unbalanced braces"),
        ("http://no where/set", "index.json cannot be read: URL can't contain control characters"),
        ("odd://host/set", "odd://host/set/index.json cannot be read: Protocol not known: odd"),
    ],
)
def test_bad_addresses(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_index(address)


def test_what_a_local_data_set_lacks(index: ShardIndex, tmp_path: Path) -> None:
    """A remote one is not asked."""

    def lacking(address: str, *more: str) -> str | None:
        return check_local_index(load_config(None, [f"data.shards={address}", *FIT, *more]))

    here, empty = index.folder, tmp_path / "empty"
    empty.mkdir()
    for address in (str(here), f"{here}/*.tar", f"{here}/index.json", "s3://bucket/set"):
        assert lacking(address) is None
    assert lacking(str(empty), "data.index=elsewhere/index.json") is None
    assert lacking("''") == "data.shards is not set"
    for address, lacks in {
        f"{tmp_path}/gone": "nothing is there",
        f"{empty}": "no index.json is there",
        f"{empty}/*.tar": f"{empty}/*.tar does not exist",
    }.items():
        assert lacking(address) == f"data.shards ({address}): {lacks}"


def test_a_shard_that_the_index_does_not_know(index: ShardIndex) -> None:
    (index.folder / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shard other.tar is not in the index"):
        load_index(f"{index.folder}/*.tar")
    with pytest.raises(UserError, match="is remote and needs a cache"):
        ShardReader(load_index(f"pipe:cat {index.folder}/shard-000000.tar"), seed=0)
