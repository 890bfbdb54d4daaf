"""``train.mirror``: copies of checkpoints at a real S3 server (moto's, on this machine), whatever
becomes of the run, the store or the run folder.
"""

import io
import json
import shutil
import signal
import threading
import time
import urllib.request

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from diffmoe.checkpoints.manifest import MANIFEST
from diffmoe.checkpoints.reader import Checkpoint, complete_folders
from diffmoe.checkpoints.tensor_file import Corrupt
from diffmoe.errors import UserError
from diffmoe.remote import remote_path
from programs import Nursery, losses, tiny
from test_run import assert_same_tensors, copy_run

BUCKET = "checkpoints"
QUOTA = b"<Error><Code>QuotaExceeded</Code><Message>The bucket is full</Message></Error>"


class Store:
    """moto's S3, with what it was sent (key, bytes), a time for each file of tensors, and a quota
    of bytes.
    """

    def __init__(self):
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.begin()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def begin(self):
        self.sent, self.in_hand, self.delay, self.quota = [], [], 0.0, float("inf")

    def _serve(self, environ, respond):
        path, size = environ["PATH_INFO"], int(environ.get("CONTENT_LENGTH") or 0)
        self.in_hand.append(path)
        try:
            if environ["REQUEST_METHOD"] == "PUT" and path.endswith(".safetensors"):
                time.sleep(self.delay)
                body = environ["wsgi.input"].read(size)
                if len(body) < size:  # its sender is dead: S3 keeps nothing of it
                    respond("400 Bad Request", [("Content-Type", "text/plain")])
                    return []
                if sum(bytes for _, bytes in self.sent) + size > self.quota:
                    respond("507 Insufficient Storage", [("Content-Type", "application/xml")])
                    return [QUOTA]
                self.sent.append((path, size))
                environ["wsgi.input"] = io.BytesIO(body)
            return self._app(environ, respond)
        finally:
            self.in_hand.remove(path)

    def close(self):
        self._server.shutdown()


@pytest.fixture(scope="module")
def store():
    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield store
    store.close()


@pytest.fixture(scope="module")
def nursery(store):
    return Nursery()  # which inherits the store's address


@pytest.fixture
def place(store, tmp_path):
    store.begin()
    return f"s3://{BUCKET}/{tmp_path.name}"


def run(nursery, folder, place, *more):
    results = nursery.run(2, *tiny(folder, f"train.mirror={place}", *more))
    assert [r.returncode for r in results] == [0, 0], results
    return results


def copies(place):
    return [path.name for path in complete_folders(remote_path(place) / "checkpoints")]


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def read_whole(checkpoint):
    for name in checkpoint.manifest.files:
        checkpoint.check_file(name)


# ------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_a_checkpoint_is_read_where_it_lies_and_checked(kind, store, tmp_path):
    local = copy_run(tmp_path / "here", 8)
    place = {"memory": "memory://x/", "file": f"file://{tmp_path}/", "s3": f"s3://{BUCKET}/"}
    there = remote_path(f"{place[kind]}read")
    assert not there.exists() and complete_folders(there / "checkpoints") == []
    folder = there / "checkpoints" / "step_00000008"
    for path in (local / "checkpoints/step_00000008").iterdir():
        (folder / path.name).write_chunks([path.read_bytes()[:100], path.read_bytes()[100:]])
    checkpoint = Checkpoint(there)
    assert checkpoint.step == 8 and str(checkpoint.path) == str(folder)
    read_whole(checkpoint)
    mine = Checkpoint(local).tensors("master")
    assert {n: v.tolist() for n, v in checkpoint.tensors("master").items()} == {
        n: v.tolist() for n, v in mine.items()
    }
    name = next(iter(checkpoint.manifest.files))
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(Corrupt, match="not what was written"):
        read_whole(Checkpoint(there))
    (folder / name).write_bytes(bytes(data[:-1]))
    with pytest.raises(Corrupt, match=f"must have {len(data)} bytes and has {len(data) - 1}"):
        Checkpoint(there)
    (folder / MANIFEST).remove()
    (folder / MANIFEST).remove()  # nothing there is no error
    with pytest.raises(UserError, match="no complete checkpoint in"):
        Checkpoint(there)


@pytest.mark.full
def test_a_large_file_goes_in_parts_and_what_is_given_up_leaves_none(place):
    chunk, there = bytes(range(256)) * 2**12, remote_path(place)  # 1 MiB of 110
    (there / "whole").write_chunks(chunk for _ in range(110))
    assert (there / "whole").read_bytes() == chunk * 110
    client = boto3.client("s3")
    parts = client.head_object(Bucket=BUCKET, Key=f"{there.name}/whole", PartNumber=1)
    assert parts["PartsCount"] > 1

    def given_up():
        yield from [chunk] * 70
        assert client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
        raise ConnectionError("gone")

    with pytest.raises(OSError, match="gone"):
        (there / "half").write_chunks(given_up())
    assert not (there / "half").exists()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


def test_an_address_that_nothing_opens(tmp_path):
    with pytest.raises(UserError, match=r"train.mirror \(nosuch://x\) cannot be used: .*nosuch"):
        remote_path("nosuch://x", "train.mirror")


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    results = nursery.run(2, *tiny(folder, "train.save_every=2"))
    assert [r.returncode for r in results] == [0, 0], results
    return folder


@pytest.mark.full
def test_without_its_folder_a_run_goes_on_from_the_newest_copy_that_is_intact(
    nursery, undisturbed, place, tmp_path
):
    folder = tmp_path / "run"
    keep = ("train.save_every=2", "train.keep=2", "train.keep_every=4")
    run(nursery, folder, place, *keep)
    assert copies(place) == ["step_00000004", "step_00000006", "step_00000008"]  # pruned alike
    checked = nursery.run(1, "check-checkpoint", place)[0]
    assert (checked.returncode, checked.stdout.count("intact")) == (0, 3), checked
    images = ("--count", "2", "--out", str(tmp_path / "x"))
    sampled = nursery.run(1, "sample", "--checkpoint", place, *images)[0]
    assert sampled.returncode == 0 and (tmp_path / "x.npz").exists(), sampled
    shutil.rmtree(folder)
    newest = remote_path(place) / "checkpoints" / "step_00000008"
    name = next(path.name for path in newest.iterdir() if "exp_avg" in path.name)
    data = bytearray((newest / name).read_bytes())
    data[-1] ^= 1
    (newest / name).write_bytes(bytes(data))
    (remote_path(place) / "checkpoints" / "step_00000006" / MANIFEST).remove()  # half a copy
    left = folder / "checkpoints/step_00000004"  # of a folder that somebody cleaned
    left.mkdir(parents=True)
    (left / "rank_00000.safetensors").write_bytes(b"old")
    again = run(nursery, folder, place, *keep)[0].stdout
    assert "step_00000008 is corrupt (" in again and "falling back to step_00000004" in again
    assert f"resumed from {folder}/checkpoints/step_00000004 at step 4" in again
    assert losses(folder) == losses(undisturbed)
    assert_same_tensors(
        undisturbed / "checkpoints/step_00000008", folder / "checkpoints/step_00000008"
    )
    read_whole(Checkpoint(remote_path(place)))  # the corrupt one was written anew
    assert copies(place) == ["step_00000004", "step_00000006", "step_00000008"]


@pytest.mark.full
def test_killed_while_copying_the_next_start_sends_what_is_missing(nursery, store, place, tmp_path):
    store.delay, arguments = 0.4, tiny(tmp_path / "run", f"train.mirror={place}")
    with nursery.start(2, *arguments) as program:
        deadline = time.monotonic() + 120
        while len(store.sent) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in (0, 1):
            program.signal(rank, signal.SIGKILL)
        program.wait()
    time.sleep(0.5)  # what was on its way to the server
    while store.in_hand and time.monotonic() < deadline:
        time.sleep(0.02)
    before = {path for path, _ in store.sent}
    assert len(before) >= 3 and copies(place) == []
    store.delay = 0.0
    run(nursery, tmp_path / "run", place)
    assert copies(place) == ["step_00000004", "step_00000008"]
    assert len(store.sent) == len({path for path, _ in store.sent}), "sent twice"
    for name in copies(place):
        read_whole(Checkpoint(remote_path(place) / "checkpoints" / name))
        left = {path.name for path in (remote_path(place) / "checkpoints" / name).iterdir()}
        here = {path.name for path in (tmp_path / "run/checkpoints" / name).iterdir()}
        assert left == here


@pytest.mark.full
def test_a_full_bucket_is_one_line_and_training_goes_on(
    nursery, undisturbed, store, place, tmp_path
):
    folder = tmp_path / "run"
    store.quota = 100_000
    results = run(nursery, folder, place, "train.save_every=0")
    assert losses(folder) == losses(undisturbed)
    found = [event for event in events(folder) if event["event"] == "not copied"]
    assert len(found) == 1 and "The bucket is full" in found[0]["text"], found
    assert results[0].stderr.count("is behind: ") == 1 and "Traceback" not in results[0].stderr
    assert copies(place) == []
    store.quota = float("inf")
    run(nursery, folder, place, "train.save_every=0")  # nothing left but to copy
    assert copies(place) == ["step_00000008"]


@pytest.mark.full
def test_a_place_that_cannot_be_written_ends_every_rank_with_one_line(
    nursery, store, place, tmp_path
):
    def refused(mirror, *more):
        results = nursery.run(2, *tiny(tmp_path / "run", f"train.mirror={mirror}", *more))
        assert [r.returncode for r in results] == [2, 2], results
        assert not (tmp_path / "run").exists()
        said = [line for r in results for line in r.stderr.splitlines() if "train.mirror" in line]
        assert len(said) == 1, results
        return said[0]

    assert "cannot be written" in refused("s3://no-such-bucket/x")
    assert "nosuch" in refused("nosuch://bucket/x")
    assert "must be an address" in refused("/just/a/folder")
    text = {"Content-Type": "text/plain"}
    put = urllib.request.Request(
        f"{store.url}/moto-api/reset-auth", data=b"0", headers=text, method="POST"
    )
    urllib.request.urlopen(put).close()  # from now on keys are looked up, and ours is unknown
    try:
        assert "cannot be written" in refused(place)
    finally:
        put.data = b"inf"
        urllib.request.urlopen(put).close()
    run(nursery, tmp_path / "other", place, "train.save_every=0")
    other = nursery.run(2, *tiny(tmp_path / "run", f"train.mirror={place}", "run.seed=1"))
    assert [r.returncode for r in other] == [2, 2], other
    assert "holds another run's checkpoints (run.seed: 0 -> 1)" in other[0].stderr
    assert not (tmp_path / "run/checkpoints").exists()
