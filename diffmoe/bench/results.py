"""``run.py bench results [FOLDER]``: records as a table, the one in README.md or a folder's
``summary.md``.  No torch.

README.md's is of all records in docs/results/*/: of records of the same thing on the same kind of
device the newest, by the date at the end of the folder's name; not files that begin with
``before``.  ``note.txt`` in a folder is one line that stands beside its figures.  A folder of
``scripts/bench_gpu.sh`` also has ``status/ITEM.json``, how each command ended, and ``ITEM.log``,
what it said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from diffmoe.commands.common import Parser
from diffmoe.cost.calibration import timed_steps
from diffmoe.errors import UserError
from diffmoe.markdown import table

_ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- made by: python run.py bench results -->", "<!-- end -->"
_LINES = 15  # of the log of what failed
_VERSIONS = ("python", "torch", "cuda", "nccl", "driver", "deepspeed", "commit", "code")
Fact = tuple[str, str]  # what was measured, and what came of it


def _name(record: dict) -> str:
    return f"{record['model'].upper()}-E{record['experts']}"


def _short(config: str) -> str:
    """A configuration's file name as people say it."""
    name = config.removeprefix("diffmoe_").removesuffix("_flow").replace("_", "-")
    return name.upper() if config.islower() else config


def _parity(r: dict) -> Iterator[Fact]:
    compiled = {row["case"].get("compiled", False) for row in r["rows"]}
    for precision in ("fp32", "bf16"):
        rows = [row for row in r["rows"] if row["case"]["precision"] == precision]
        if rows:
            columns = (
                r["bf16_bounds"] if precision == "bf16" else rows[0]["differences"]
            )  # bf16 bounds not all
            largest = max(
                float(row["differences"].get(column, 0)) for row in rows for column in columns
            )
            bounds = (
                f"bound {r['bound']:.0e}"
                if precision == "fp32"
                else f"bounds to {max(columns.values()):.0e}"
            )
            kind = f"{precision}{', compiled' * (compiled == {True})}{', a few cases' * (r.get('table') == 'quick')}"
            yield (
                f"training over ranks beside one plain process, {kind}",
                f"{sum(row['ok'] for row in rows)} of {len(rows)} cases within bounds; largest relative difference "
                f"{largest:.1e} ({bounds})",
            )


def _layer(r: dict) -> Iterator[Fact]:
    if "time_over_dense" not in r:
        cost = r["microseconds_a_token"].values()
        yield (
            f"MoE layer of {r['model'].upper()}, {r['dtype']}, cost of a token",
            f"{min(cost):.3g} to {max(cost):.3g} µs over tokens and experts",
        )
        return
    told = f"{r['time_over_dense']:.2f} x dense's time, {r['activation_memory_over_dense']:.2f} x its activations"
    if "loop_time_over_ours" in r:
        told += f"; {r['loop_time_over_ours']:.2f} x as fast as the textbook loop"
    if "deepspeed_time_over_ours" in r:
        told += f", DeepSpeed's layer {r['deepspeed_time_over_ours']:.2f} x our time"
    yield f"MoE layer of {_name(r)}, {r['tokens']:,} tokens, {r['dtype']}, training pass", told


def _step(r: dict) -> Iterator[Fact]:
    for name, share in r["mfu"].items():
        if name not in ("dense", "compiled-dense", "loop"):
            base = "compiled-dense" if name == "compiled" else "dense"
            yield (
                f"step of {_name(r)}, {r['accumulation']} x {r['samples']} samples, {r['dtype']}, "
                f"{'eager' if name == 'ours' else name}",
                f"{r['images_per_second'][name]:.4g} images/s, {share:.0%} of the matmul ceiling, "
                f"{r['seconds'][name] / r['seconds'][base]:.2f} x dense's time",
            )


def _sampling(r: dict) -> Iterator[Fact]:
    for capacity, share in r["mixtures_over_first"].items():
        if share != 1:
            yield (
                f"sampling of {_name(r)} at capacity {capacity}, {r['samples']} images, {r['dtype']}",
                f"{share:.2f} x the MoE layers' time at 1, {r['pass_over_first'][capacity]:.2f} x a pass's; "
                f"{r['images_per_second'][capacity]:.4g} images/s",
            )


def _roofline(r: dict) -> Iterator[Fact]:
    for title, case in r["cases"].items():
        for way, c in case.get("model", {}).items():
            what = f"step of {_short(title)}, {way}, as counted and priced for {r['gpu']}"
            told = f"predicted {1e3 * c['predicted_s']:.0f} ms, MFU {c['mfu']:.1%}"
            if c.get("measured"):
                seconds = c["measured"]["seconds"]
                told += f"; measured {1e3 * seconds:.0f} ms, MFU {c['mfu'] * c['predicted_s'] / seconds:.1%}"
            yield what, told


def _machine(r: dict) -> Iterator[Fact]:
    products, copies = r["matmul_flops"].items(), r["copy_bytes_s"].items()
    yield (
        "bf16 matrix products",
        ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in products) + " TFLOP/s",
    )
    yield (
        "copies, read and written",
        ", ".join(f"{name} {size / 1e9:.4g}" for name, size in copies) + " GB/s",
    )
    for each in r["attention"].values():
        yield (
            f"attention, head dimension {each['head']}",
            f"{each['flops'] / 1e12:.3g} TFLOP/s by {', '.join(each['kernels'])[:80]}",
        )
    yield "a launch, a read by the host", f"{r['launch_us']:.3g} and {r['read_us']:.3g} µs"


def _wrong(what: str, told: str, r: dict) -> Iterator[Fact]:
    yield what, "; ".join(r["wrong"]) or told


def _train(r: dict) -> Iterator[Fact]:
    told = (
        f"loss {r['loss'][0]:.3g} to {r['loss'][1]:.3g}, {r['images_per_second']:.4g} images/s, "
        f"{r['memory_gib'][1]:.3g} GiB at most, as after the first steps"
    )
    yield from _wrong(
        f"training of {_short(r['config'])}, {r['engine']}, {r['steps']:,} steps, stopped and resumed at "
        f"{r['stopped_at']}",
        told,
        r,
    )


def _checkpoint(r: dict) -> Iterator[Fact]:
    saves = r["medians"]
    yield (
        f"a save of {r['bytes'] / 1e9:.2g} GB, {r['ranks']} ranks",
        "training stands still for "
        + ", ".join(f"{each['stall_s']:.2g} s ({name})" for name, each in saves.items()),
    )


def _data(r: dict) -> Iterator[Fact]:
    speed = r["samples_per_second"]["loader"]
    yield (
        "loader on ImageNet-sized moments, one core",
        f"{speed:,.0f} samples/s: {r['ratio_to_tar']['loader']:.2f} x plain tar reading, "
        f"{r['ratio_to_webdataset']:.1f} x webdataset, {r['ratio_to_npz']:.1f} x one npz an image",
    )


def _digits(r: dict) -> Iterator[Fact]:
    yield (
        "digits asked of the demo's model",
        f"{r['accuracy']:.1%} of {r['count']} are what was asked (of real ones {r['real_accuracy']:.1%}); "
        f"precision {r['precision']:.2f}, recall {r['recall']:.2f}",
    )


# What a record is of: by the beginning of its name, or a key that only such a record has.
_BENCHES: dict[str, Callable[[dict], Iterator[Fact]]] = {
    "probe_machine": _machine,
    "probe_experts": lambda r: _wrong(
        "experts without rows, every arrangement", f"{len(r['cases'])} cases right", r
    ),
    "probe_nccl": lambda r: _wrong(
        f"new groups of {r['backend']} in a world of one",
        f"right; start {r['ms']['start']:.0f} ms",
        r,
    ),
    "moe_layer": _layer,
    "step": _step,
    "sampling": _sampling,
    "roofline": _roofline,
    "train": _train,
    "checkpoint": _checkpoint,
}
_KEYS: dict[str, Callable[[dict], Iterator[Fact]]] = {
    "bound": _parity,
    "ratio_to_tar": _data,
    "real_accuracy": _digits,
}


def facts(record: dict) -> list[Fact]:
    """What a record says; nothing where it is of a kind that nobody knows.  UserError where it
    lacks something.
    """
    bench = str(record.get("bench", ""))
    found = next((f for name, f in _BENCHES.items() if bench.startswith(name)), None)
    found = found or next((f for key, f in _KEYS.items() if key in record), None)
    try:
        return list(found(record)) if found else []
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a record of {bench or 'parity, data or digits'} lacks {error}") from None


def device_of(record: dict) -> str:
    """What a record was measured on, as it says; ``counted`` where nothing was."""
    steps = timed_steps(record) if str(record.get("bench")).startswith("roofline") else []
    if str(record.get("bench")).startswith("roofline") and not steps:
        return "counted"
    return steps[0]["device"] if steps else record.get("device") or record.get("machine") or "cpu"


def records(folder: Path) -> Iterator[tuple[Path, dict]]:
    """The records of a folder, by name.  UserError for one that is damaged."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a record: {error}") from None
        if isinstance(record, dict):
            yield path, record


def readme_table(results: Path) -> str:
    """The table of all records in the folders of ``results``, GPUs first."""
    newest: dict[tuple[str, bool], tuple] = {}
    for folder in sorted(
        (f for f in results.iterdir() if f.is_dir()), key=lambda f: (f.name[-10:], f.name)
    ):
        note = folder / "note.txt"
        for path, record in records(folder):
            device = device_of(record)
            gpu = "cuda" in record or device.startswith(("NVIDIA", "cuda"))
            place = f"[{folder.name}](docs/results/{folder.name})"
            place += f": {note.read_text().strip()}" if note.is_file() else ""
            for what, told in [] if path.name.startswith("before") else facts(record):
                newest[what, gpu] = (not gpu, what, told, device, place)
    return "\n".join(
        table(["measured", "result", "on", "record"], [row[1:] for row in sorted(newest.values())])
    )


def rewrite(readme: Path, results: Path) -> None:
    """The table between the two markers of README.md.  UserError where they are missing."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise UserError(f"{readme} must hold {BEGIN} once, and {END} after it")
    before, _, rest = text.partition(BEGIN)
    readme.write_text(
        f"{before}{BEGIN}\n{readme_table(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8"
    )


def summary(folder: Path) -> str:
    """A folder's ``summary.md``: how every command ended, the last lines of failing ones, the
    table, and what to do with it.
    """
    found = list(records(folder))
    about = next((record for _, record in found if "device" in record), {})
    versions = [f"{key} {about[key]}" for key in _VERSIONS if key in about]
    lines = [
        f"# {about.get('device', 'No record')}, {about.get('when', 'no date')[:10]}",
        "",
        ", ".join(versions),
        "",
    ]
    codes = sorted({record["code"] for _, record in found if "code" in record})
    lines += (
        [f"These records are of different code ({', '.join(codes)}).", ""] if len(codes) > 1 else []
    )
    ends = sorted((status for _, status in records(folder / "status")), key=lambda s: s["number"])
    lines += table(
        ["part", "command", "ended", "s", "limit s"],
        [[s["part"], s["item"], _end(s), s["seconds"], s["limit"]] for s in ends],
    )
    for status in ends:
        log = folder / f"{status['item']}.log"
        if status["rc"] and log.is_file():
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
            lines += ["", f"The last lines of {status['item']}:", "", "```", *said, "```"]
    rows = [[what, told, path.name] for path, record in found for what, told in facts(record)]
    lines += [
        "",
        *table(["measured", "result", "record"], rows),
        "",
        "The planner takes its figures from this folder or its archive by",
        "",
        "```",
        "python -m launcher plan --config configs/diffmoe_l_e16_flow.yaml --gpu h100 "
        f"--calibrate {folder.name} --write-hardware diffmoe/cost/hardware.yaml",
        "```",
        "",
        "(`--gpu` as diffmoe/cost/hardware.yaml names this one), README.md's table, once the folder is in `docs/results/`, by "
        "`python run.py bench results`.",
    ]
    return "\n".join(lines) + "\n"


def _end(status: dict) -> str:
    if status["rc"] is None:
        return "left out: no time"
    words = {0: "well", 124: "over its limit, ended", 137: "over its limit, killed"}
    return words.get(status["rc"], f"exit code {status['rc']}")


def main(arguments: list[str]) -> int:
    """The kind ``results``; returns the exit code."""
    parser = Parser(
        prog="bench results",
        description="README.md's table from docs/results, or a folder's summary.md.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="its summary.md (default: README.md's table)"
    )
    folder = parser.parse_args(arguments).folder
    if folder is None:
        rewrite(_ROOT / "README.md", _ROOT / "docs" / "results")
        return 0
    if not folder.is_dir():
        raise UserError(f"folder ({folder}) is not there")
    (folder / "summary.md").write_text(summary(folder), encoding="utf-8")
    return 0
