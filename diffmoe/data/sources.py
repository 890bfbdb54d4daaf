"""Where a data set's files are: local paths, http(s), `pipe:` commands, and what fsspec opens (s3,
gs, hf, …).

All shards of a data set lie in one place, which is written as an address with `{name}` where the
file's name goes.
"""

from __future__ import annotations

import glob
import http.client
import os
import re
import select
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from diffmoe.errors import UserError
from diffmoe.files import Refused, retried
from diffmoe.remote import translated

STALL = 60.0  # seconds without a byte after which a transfer counts as dead
_CHUNK = 1 << 20
_LAST_NAME = re.compile(r"[^/\s]+\.tar(?=[^/]*$)")
_FINAL = (400, 401, 403, 404, 410)  # HTTP statuses: asking again will not help


def is_remote(address: str) -> bool:
    """Whether the address is a URL or a pipe and not a local path."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", address) is not None


def runs_a_program(address: str) -> bool:
    """Whether reading from the address may run code that the address chooses: `pipe:`, and, through
    fsspec's plugins, all that is not http(s).
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
    found = expanded(address, "data.shards")
    if not remote:
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
            f"data.shards ({address}) lies in {len(places)} places "
            f"({', '.join(sorted(places)[:2])}); a data set has one, with its index.json"
        )
    return places.pop(), tuple(names)


def expanded(pattern: str, what: str) -> list[str]:
    """The names that a pattern with braces means, and a local one with stars.  UserError, which
    calls the pattern `what`, for a brace without its other half.
    """
    from braceexpand import braceexpand

    try:
        parts = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{what} ({pattern}): {error}") from None
    if is_remote(pattern):
        return parts
    return [name for part in parts for name in (sorted(glob.glob(part)) or [part])]


def _place(address: str, name: str) -> str:
    before, _, after = address.rpartition(name)
    return f"{before}{{name}}{after}"


def read_all(address: str, limit: int = 1 << 28) -> bytes:
    """The whole of a small file (an index). UserError when it cannot be had."""

    def once() -> bytes:
        data = bytearray()
        with closing(chunks(address)) as stream:
            for chunk in stream:
                data += chunk
                if len(data) > limit:
                    raise Refused(f"more than {limit} bytes")
        return bytes(data)

    try:
        return retried(once, address) if is_remote(address) else Path(address).read_bytes()
    except OSError as error:
        raise UserError(f"{address} cannot be read: {error}") from error


def chunks(address: str) -> Generator[bytes, None, None]:
    """The bytes at a remote address. OSError when it fails or ends early, and, of http(s) and
    pipes, when it says nothing for `STALL` seconds.
    """
    if address.startswith("pipe:"):
        return _command(address[5:])
    return (_http if address.startswith(("http://", "https://")) else _filesystem)(address)


def _http(url: str) -> Generator[bytes, None, None]:
    # Not fsspec's, which needs aiohttp.
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
    except http.client.InvalidURL as error:
        raise Refused(str(error)) from None
    except (ValueError, EOFError, http.client.HTTPException) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _filesystem(url: str) -> Generator[bytes, None, None]:
    import fsspec

    with translated(), fsspec.open(url, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _command(command: str) -> Generator[bytes, None, None]:
    process = subprocess.Popen(
        command,
        shell=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    poll = select.poll()  # select.select takes no descriptor above 1,023
    poll.register(process.stdout, select.POLLIN)
    try:
        while poll.poll(STALL * 1000):
            chunk = os.read(process.stdout.fileno(), _CHUNK)
            if not chunk:
                break
            yield chunk
        else:
            raise OSError(f"no byte for {STALL:g} s")
        if code := process.wait():
            raise OSError(f"command ended with exit status {code}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its session: a shell's children too
            process.wait()
        process.stdout.close()
