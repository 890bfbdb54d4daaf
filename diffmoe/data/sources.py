"""Where a data set's files are: local paths, and whatever webdataset opens (`pipe:`, http(s), s3,
gs, hf, …), with retries.

All shards of a data set lie in one place, which is written as an address with `{name}` where the
file's name goes.
"""

from __future__ import annotations

import glob
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from diffmoe.errors import UserError

TRIES = 5
FIRST_PAUSE = 1.0  # seconds before the second try; doubled each time
STALL = 60.0  # seconds without a byte after which a transfer counts as dead
_CHUNK = 1 << 20
_LAST_NAME = re.compile(r"[^/\s]+\.tar(?=[^/]*$)")
_FINAL = (400, 401, 403, 404, 410)  # asking again will not help
T = TypeVar("T")


class Refused(OSError):
    """The source says no for good: trying again will not help."""


def is_remote(address: str) -> bool:
    """Whether the address is a URL or a pipe and not a local path."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", address) is not None


def runs_a_program(address: str) -> bool:
    """Whether reading from the address starts a program with words of the address: `pipe:`, and all
    that is not http(s).
    """
    return is_remote(address) and not address.startswith(("http://", "https://"))


def resolve(address: str) -> tuple[str, tuple[str, ...] | None]:
    """The place (with `{name}`) that an address means, and the names that it picks (None: all).

    Args:
        address: a folder, its index.json, or tars by path, glob or braces; the same as URLs;
            `pipe:` with one tar's name.

    Raises:
        UserError: nothing matches, or the tars lie in more than one place.
    """
    remote = is_remote(address)
    path = address.partition("?")[0].rstrip("/")
    if path.endswith("index.json"):
        return _place(address, "index.json"), None
    if not address.startswith("pipe:") and not path.endswith(".tar"):
        # In a local path a brace or a star may be part of a folder's name.
        return f"{address.rstrip('/')}/{{name}}", None
    from braceexpand import braceexpand

    found = list(braceexpand(address))
    if not remote:
        found = [name for part in found for name in (sorted(glob.glob(part)) or [part])]
        gone = [name for name in found if not Path(name).is_file()]
        if gone:
            raise UserError(f"data.shards ({address}): {gone[0]} does not exist")
    names = []
    for one in found:
        match = _LAST_NAME.search(one)
        if not match:
            raise UserError(f"data.shards ({one}) must name a .tar")
        names.append(match[0])
    places = {_place(one, name) for one, name in zip(found, names)}
    if len(places) > 1:
        raise UserError(
            f"data.shards ({address}) lies in {len(places)} places ({', '.join(sorted(places)[:2])}); a data set "
            "has one, with its index.json"
        )
    return places.pop(), tuple(names)


def _place(address: str, name: str) -> str:
    before, _, after = address.rpartition(name)
    return f"{before}{{name}}{after}"


def read_all(address: str, limit: int = 1 << 28) -> bytes:
    """The whole of a small file (an index). UserError when it cannot be had."""
    if not is_remote(address):
        return Path(address).read_bytes()

    def once() -> bytes:
        data = bytearray()
        with closing(chunks(address)) as stream:
            for chunk in stream:
                data += chunk
                if len(data) > limit:
                    raise Refused(f"more than {limit} bytes")
        return bytes(data)

    try:
        return again(once, address)
    except OSError as error:
        raise UserError(f"{address} cannot be read: {error}") from error


def again(action: Callable[[], T], what: str) -> T:
    """`action`, tried up to `TRIES` times over an OSError, with growing pauses, said aloud; Refused
    is final.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except OSError as error:
            if attempt == TRIES or isinstance(error, (Refused, FileNotFoundError, PermissionError)):
                raise
            # One write: several threads fetch, and print would let their lines run into each other.
            sys.stderr.write(
                f"data: {what}: {error}; trying again in {pause:g} s ({attempt} of {TRIES - 1})\n"
            )
            time.sleep(pause)
            pause *= 2
    raise AssertionError("unreachable")


def chunks(address: str) -> Iterator[bytes]:
    """The bytes at a remote address. OSError when it fails, ends early or says nothing for `STALL`
    seconds.
    """
    if os.environ.get("GOPEN_REWRITE"):
        from webdataset.gopen import rewrite_url

        address = rewrite_url(address)
    scheme = address.partition(":")[0]
    if scheme in ("http", "https"):
        # Not webdataset's curl: that one waits for a silent server without end, and retries
        # silently.
        return _http(address)
    if scheme == "pipe":
        return _command(address[5:])
    if scheme == "s3" and "s3" not in os.environ.get("USE_AIS_FOR", "").split(":"):
        return _command(
            f"aws s3 cp {shlex.quote(address)} -"
        )  # webdataset has no opener of its own for it
    return _webdataset(address)


def _http(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=STALL) as response:
            length, got = response.headers.get("Content-Length"), 0
            while chunk := response.read(_CHUNK):
                got += len(chunk)
                yield chunk
            if length is not None and got != int(length):
                raise OSError(f"ended after {got} of {length} bytes")
    except urllib.error.HTTPError as error:
        kind = Refused if error.code in _FINAL else OSError
        raise kind(f"HTTP status {error.code} ({error.reason})") from None
    except urllib.error.URLError as error:
        raise OSError(f"{error.reason}") from None
    except (ValueError, EOFError) as error:  # http.client's own complaints are neither
        raise OSError(str(error)) from error


def _command(command: str) -> Iterator[bytes]:
    process = subprocess.Popen(
        command,
        shell=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield from _read_pipe(process.stdout.fileno())
        code = process.wait()
        if code:
            raise OSError(f"command ended with exit status {code}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its session: a shell's children too
            process.wait()
        process.stdout.close()


def _webdataset(url: str) -> Iterator[bytes]:
    from webdataset.gopen import Pipe, gopen

    try:
        stream = gopen(url)
    except ValueError as error:
        raise Refused(str(error)) from error
    with stream:
        if isinstance(stream, Pipe):
            yield from _read_pipe(stream.stream.fileno())
        else:
            while chunk := stream.read(_CHUNK):
                yield chunk


def _read_pipe(descriptor: int) -> Iterator[bytes]:
    while True:
        if not select.select([descriptor], [], [], STALL)[0]:
            raise OSError(f"no byte for {STALL:g} s")
        chunk = os.read(descriptor, _CHUNK)
        if not chunk:
            return
        yield chunk
