"""The hardware table: what machines can do, and how much of it programs reach."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from diffmoe.errors import UserError
from diffmoe.files import writing
from diffmoe.strict_yaml import build, read_yaml

TABLE = Path(__file__).with_name("hardware.yaml")
_MAY_BE_0 = ("reserve_gib", "latency_us", "operator_us", "read_us")


@dataclass(frozen=True)
class Link:
    """One direction of a rank's link: 1e9 bytes/s, and microseconds until the first byte."""

    gb_s: float
    latency_us: float


@dataclass(frozen=True)
class Hardware:
    """A kind of machine; fields as ``diffmoe/cost/hardware.yaml`` explains them; without
    ``tflops_tf32`` fp32's peak holds for TF32 as well.  ``matmul``, ``bandwidth`` and ``link`` are
    the shares of a peak that are reached (above 1 where the peak was set too low), ``attention``
    that of the attention's kernels (default: ``matmul``).  ``overlap_cost``: the share of
    their speed that kernels lose while messages pass under them (1: nothing is gained).
    ``asynchronous``: the host launches operators while the device computes.
    """

    name: str
    memory_gib: float
    reserve_gib: float
    tflops_bf16: float
    tflops_fp32: float
    memory_gb_s: float
    gpus_per_node: int
    node: Link
    network: Link
    matmul: float
    bandwidth: float
    link: float
    operator_us: float
    asynchronous: bool = True
    attention: float | None = None
    overlap_cost: float = 0.25
    read_us: float = 20.0
    calibrated: str | None = None
    tflops_tf32: float | None = None

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return int((self.memory_gib - self.reserve_gib) * 2**30)

    @property
    def assumptions(self) -> str:
        """What times follow from, beside counts, for people."""
        attention, node, network = self.attention or self.matmul, self.node, self.network
        return (
            f"products reach {100 * self.matmul:.0f} % of {self.tflops_bf16:g} TFLOP/s (bf16), "
            f"attention {100 * attention:.0f} %; memory {100 * self.bandwidth:.0f} % of "
            f"{self.memory_gb_s:g} GB/s; links {100 * self.link:.0f} % of {node.gb_s:g} GB/s in a "
            f"node and {network.gb_s:g} between, after {node.latency_us:g} and "
            f"{network.latency_us:g} us; kernels lose {100 * self.overlap_cost:.0f} % of their "
            f"speed under messages; a launch takes {self.operator_us:g} us"
        )


def read_table(path: str | Path | None) -> dict[str, Hardware]:
    """A table's machines (default: the repository's).  UserError names machine and field."""
    table = {}
    for name, entry in read_yaml(TABLE if path is None else path).items():
        try:
            machine: Hardware = build(Hardware, entry, name)
            _check(machine, name)
            _check(machine.node, f"{name}.node")
            _check(machine.network, f"{name}.network")
        except TypeError as error:  # a field without a default is not there
            missing = str(error).partition(") ")[2]
            raise UserError(f"hardware table: {name} is incomplete: {missing}") from None
        except UserError as error:
            raise UserError(f"hardware table: {error}") from None
        table[name] = machine
    return table


def _check(values: Hardware | Link, name: str) -> None:
    for key, value in vars(values).items():
        if isinstance(value, (int, float)) and key != "asynchronous":
            if value < 0 or (value == 0 and key not in _MAY_BE_0):
                raise UserError(f"{name}.{key} ({value:g}) must be a number above 0")


def choose(table: dict[str, Hardware], name: str) -> Hardware:
    """The machine called ``name``.  Raises UserError."""
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--gpu ({name}) must be one of {', '.join(table)}{hint}")
    return table[name]


def named_like(table: dict[str, Hardware], device_name: str) -> Hardware | None:
    """The entry whose key is part of a device's own name (``NVIDIA H200`` -> h200), or None."""
    return next((hardware for key, hardware in table.items() if key in device_name.lower()), None)


def write_entry(path: str | Path, name: str, hardware: Hardware) -> None:
    """Puts an entry into a (new) table file; others and its first comment stay.  UserError."""
    path = Path(path)
    tree = read_yaml(path) if path.exists() else {}
    values = asdict(hardware).items()
    tree[name] = {k: value for k, value in values if value is not None or k == "calibrated"}
    with writing(f"--write-hardware ({path})"):
        lines = path.read_text().splitlines(True) if path.exists() else []
        head = "".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
        path.write_text(head + yaml.safe_dump(tree, sort_keys=False, width=140))
