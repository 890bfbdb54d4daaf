"""``run.py bench results [FOLDER]``: records as a table, the one in README.md or a folder's
``summary.md``.  No torch.

README.md's is of all records in docs/results/*/: of records of the same thing on the same kind of
device the newest, by the date at the end of the folder's name; not files that begin with
``before``.  ``note.txt`` in a folder is one line, a footnote to its figures.  A folder of
``scripts/bench_gpu.sh`` also has ``status/ITEM.json``, how each command ended, and ``ITEM.log``,
what it said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from diffmoe.code_version import ROOT
from diffmoe.commands.common import Parser
from diffmoe.cost.calibration import timed_steps
from diffmoe.errors import UserError
from diffmoe.markdown import table

BEGIN, END = "<!-- made by: python run.py bench results -->", "<!-- end -->"
_LINES = 15  # of the log of what failed
_VERSIONS = ("python", "torch", "cuda", "nccl", "driver", "deepspeed", "commit", "code")
_NEXT = """

The planner takes its figures from this folder or its archive by

```
python -m launcher plan --config configs/diffmoe_l_e16_flow.yaml --gpu h100 --calibrate {folder} \\
    --write-hardware diffmoe/cost/hardware.yaml
```

(`--gpu` as diffmoe/cost/hardware.yaml names this one), README.md's table, once the folder is in
`docs/results/`, by `python run.py bench results`.
"""
Fact = tuple[str, str]  # what was measured, and what came of it


def _name(record: dict) -> str:
    return f"{record['model'].upper()}-E{record['experts']}"


def _short(config: str) -> str:
    """A configuration's file name as people say it."""
    name = config.removeprefix("diffmoe_").removesuffix("_flow").replace("_", "-")
    return name.upper() if config.islower() else config


def _parity(r: dict) -> Iterator[Fact]:
    compiled = ", compiled" * all(row["case"].get("compiled", False) for row in r["rows"])
    few = ", a few cases" * (r.get("table") == "quick")
    for precision in ("fp32", "bf16"):
        rows = [row for row in r["rows"] if row["case"]["precision"] == precision]
        if not rows:
            continue
        columns, bounds = rows[0]["differences"], f"bound {r['bound']:.0e}"
        if precision == "bf16":  # not every column has a bound
            columns = r["bf16_bounds"]
            bounds = f"bounds to {max(columns.values()):.0e}"
        largest = max(float(row["differences"].get(c, 0)) for row in rows for c in columns)
        good = sum(row["ok"] for row in rows)
        yield (
            f"training over ranks beside one plain process, {precision}{compiled}{few}",
            f"{good} of {len(rows)} cases within bounds; largest relative difference {largest:.1e} "
            f"({bounds})",
        )


def _layer(r: dict) -> Iterator[Fact]:
    time, memory = r["time_over_dense"], r["activation_memory_over_dense"]
    told = f"{time:.2f} x dense's time, {memory:.2f} x its activations"
    if "loop_time_over_ours" in r:
        told += f"; {r['loop_time_over_ours']:.2f} x as fast as the textbook loop"
    if "deepspeed_time_over_ours" in r:
        told += f", DeepSpeed's layer {r['deepspeed_time_over_ours']:.2f} x our time"
    if (same := "deepspeed_with_predictor_time_over_ours") in r:
        told += f", with a predictor beside it {r[same]:.2f} x"
    yield f"MoE layer of {_name(r)}, {r['tokens']:,} tokens, {r['dtype']}, training pass", told


def _step(r: dict) -> Iterator[Fact]:
    for name, share in r["mfu"].items():
        if name not in ("dense", "compiled-dense", "loop"):
            dense = r["seconds"]["compiled-dense" if name == "compiled" else "dense"]
            yield (
                f"step of {_name(r)}, {r['accumulation']} x {r['samples']} samples, {r['dtype']}, "
                f"{'eager' if name == 'ours' else name}",
                f"{r['images_per_second'][name]:.4g} images/s, {share:.0%} of the matmul ceiling, "
                f"{r['seconds'][name] / dense:.2f} x dense's time",
            )


def _sampling(r: dict) -> Iterator[Fact]:
    for capacity, share in r["mixtures_over_first"].items():
        if share != 1:
            yield (
                f"sampling of {_name(r)} at capacity {capacity}, {r['samples']} images, "
                f"{r['dtype']}",
                f"{share:.2f} x the MoE layers' time at 1, {r['pass_over_first'][capacity]:.2f} x "
                f"a pass's; {r['images_per_second'][capacity]:.4g} images/s",
            )


def _roofline(r: dict) -> Iterator[Fact]:
    for title, case in r["cases"].items():
        for way, c in case.get("model", {}).items():
            told = f"predicted {1e3 * c['predicted_s']:.0f} ms, MFU {c['mfu']:.1%}"
            if c.get("measured"):
                seconds = c["measured"]["seconds"]
                mfu = c["mfu"] * c["predicted_s"] / seconds
                told += f"; measured {1e3 * seconds:.0f} ms, MFU {mfu:.1%}"
            yield f"step of {_short(title)}, {way}, as counted and priced for {r['gpu']}", told


def _machine(r: dict) -> Iterator[Fact]:
    products = [f"{name} {flops / 1e12:.3g}" for name, flops in r["matmul_flops"].items()]
    copies = [f"{name} {size / 1e9:.4g}" for name, size in r["copy_bytes_s"].items()]
    yield "bf16 matrix products", f"{', '.join(products)} TFLOP/s"
    yield "copies, read and written", f"{', '.join(copies)} GB/s"
    for each in r["attention"].values():
        kernels = ", ".join(each["kernels"])[:80]
        told = f"{each['flops'] / 1e12:.3g} TFLOP/s by {kernels}"
        yield f"attention, head dimension {each['head']}", told
    yield "a launch, a read by the host", f"{r['launch_us']:.3g} and {r['read_us']:.3g} µs"


def _experts(r: dict) -> Iterator[Fact]:
    told = "; ".join(r["wrong"]) or f"{len(r['cases'])} cases right"
    yield "experts without rows, every arrangement", told


def _groups(r: dict) -> Iterator[Fact]:
    told = "; ".join(r["wrong"]) or f"right; start {r['ms']['start']:.0f} ms"
    yield f"new groups of {r['backend']} in a world of one", told


def _train(r: dict) -> Iterator[Fact]:
    yield (
        f"training of {_short(r['config'])}, {r['engine']}, {r['steps']:,} steps, stopped and "
        f"resumed at {r['stopped_at']}",
        "; ".join(r["wrong"])
        or f"loss {r['loss'][0]:.3g} to {r['loss'][1]:.3g}, {r['images_per_second']:.4g} images/s, "
        f"{r['memory_gib'][1]:.3g} GiB at most, as after the first steps",
    )


def _checkpoint(r: dict) -> Iterator[Fact]:
    stalls = ", ".join(f"{each['stall_s']:.2g} s ({way})" for way, each in r["medians"].items())
    save = f"a save of {r['bytes'] / 1e9:.2g} GB, {r['ranks']} ranks"
    yield save, f"training stands still for {stalls}"


def _data(r: dict) -> Iterator[Fact]:
    speed, tar = r["samples_per_second"]["loader"], r["ratio_to_tar"]["loader"]
    yield (
        "loader on ImageNet-sized moments, one core",
        f"{speed:,.0f} samples/s: {tar:.2f} x plain tar reading, {r['ratio_to_webdataset']:.1f} x "
        f"webdataset, {r['ratio_to_npz']:.1f} x one npz an image",
    )


def _digits(r: dict) -> Iterator[Fact]:
    yield (
        f"{r.get('what', 'digits')} asked of the demo's model",
        f"{r['accuracy']:.1%} of {r['count']} are what was asked (of real ones "
        f"{r['real_accuracy']:.1%}); precision {r['precision']:.2f}, recall {r['recall']:.2f}",
    )


# What a record is of: by the beginning of its name, or a key that only such a record has.
_BENCHES: dict[str, Callable[[dict], Iterator[Fact]]] = {
    "probe_machine": _machine,
    "probe_experts": _experts,
    "probe_nccl": _groups,
    "moe_layer": _layer,
    "step": _step,
    "sampling": _sampling,
    "roofline": _roofline,
    "train": _train,
    "checkpoint": _checkpoint,
}
_KEYS = {"bound": _parity, "ratio_to_tar": _data, "real_accuracy": _digits}


def facts(record: dict) -> list[Fact]:
    """What a record says; nothing of an unknown kind.  UserError where it lacks something."""
    bench = str(record.get("bench", ""))
    found = next((f for name, f in _BENCHES.items() if bench.startswith(name)), None)
    found = found or next((f for key, f in _KEYS.items() if key in record), None)
    try:
        return list(found(record)) if found else []
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a record of {bench or 'parity, data or digits'} lacks {error}") from None


def device_of(record: dict) -> str:
    """What a record was measured on, as it says; ``counted`` where nothing was."""
    if str(record.get("bench")).startswith("roofline"):
        steps = timed_steps(record)
        return steps[0]["device"] if steps else "counted"
    return record.get("device") or record.get("machine") or "cpu"


def records(folder: Path) -> Iterator[tuple[Path, dict]]:
    """The records of a folder, by name.  UserError for one that is not JSON."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a record: {error}") from None
        if isinstance(record, dict):
            yield path, record


def readme_table(results: Path) -> str:
    """The table of all records in the folders of ``results``, GPUs first, and their footnotes."""
    newest: dict[tuple[str, bool], tuple] = {}
    folders = (folder for folder in results.iterdir() if folder.is_dir())
    for folder in sorted(folders, key=lambda f: (f.name[-10:], f.name)):
        place = f"[{folder.name}](docs/results/{folder.name})"
        note = folder / "note.txt"
        said = note.read_text().strip() if note.is_file() else ""
        for path, record in records(folder):
            device = device_of(record)
            gpu = "cuda" in record or device.startswith(("NVIDIA", "cuda"))
            for what, told in [] if path.name.startswith("before") else facts(record):
                newest[what, gpu] = (not gpu, what, told, device, place, said)
    rows, notes = [], {"": ""}
    for _, *row, said in sorted(newest.values()):
        mark = notes.setdefault(said, f" [{len(notes)}]")
        rows.append([*row[:-1], row[-1] + mark])
    lines = table(["measured", "result", "on", "record"], rows)
    footnotes = [f"{mark.strip()} {said}" for said, mark in notes.items() if said]
    return "\n".join([*lines, "", *footnotes] if footnotes else lines)


def rewrite(readme: Path, results: Path) -> None:
    """The table between the two markers of README.md.  UserError where they are missing."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise UserError(f"{readme} must hold {BEGIN} once, and {END} after it")
    before, _, rest = text.partition(BEGIN)
    made = f"{BEGIN}\n{readme_table(results)}\n{END}"
    readme.write_text(before + made + rest.partition(END)[2], encoding="utf-8")


def summary(folder: Path) -> str:
    """A folder's ``summary.md``: how commands ended, the table, and what to do with it."""
    found = list(records(folder))
    about = next((record for _, record in found if "device" in record), {})
    versions = ", ".join(f"{key} {about[key]}" for key in _VERSIONS if key in about)
    title = f"# {about.get('device', 'No record')}, {about.get('when', 'no date')[:10]}"
    lines = [title, "", versions, ""]
    codes = sorted({record["code"] for _, record in found if "code" in record})
    if len(codes) > 1:
        lines += [f"These records are of different code ({', '.join(codes)}).", ""]
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
    lines += ["", *table(["measured", "result", "record"], rows)]
    return "\n".join(lines) + _NEXT.format(folder=folder.name)


def _end(status: dict) -> str:
    if status["rc"] is None:
        return "left out: no time"
    words = {0: "well", 124: "over its limit, ended", 137: "over its limit, killed"}
    return words.get(status["rc"], f"exit code {status['rc']}")


def main(arguments: list[str]) -> int:
    """The kind ``results``; returns the exit code."""
    parser = Parser(
        "bench results", "README.md's table from docs/results, or one folder's summary."
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="its summary.md (default: README.md's table)"
    )
    folder = parser.parse_args(arguments).folder
    if folder is None:
        rewrite(ROOT / "README.md", ROOT / "docs" / "results")
        return 0
    if not folder.is_dir():
        raise UserError(f"folder ({folder}) is not there")
    (folder / "summary.md").write_text(summary(folder), encoding="utf-8")
    return 0
