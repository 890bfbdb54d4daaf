"""``run.py bench roofline``: a training step counted without a GPU and priced for one, beside dense
of equal activated width.

A micro-batch's kernels are counted on CUDA tensors without memory, eager and compiled
(:mod:`diffmoe.bench.kernels`), the weights' traffic and host reads in the engine's own step
(:mod:`diffmoe.bench.counted`), messages by the planner's formulas.  A kernel takes the longer of
its bytes and its FLOPs at the rates that ``diffmoe/cost/hardware.yaml`` says are reached, a message
what the planner says; nothing overlaps.  ``ideal``: the compiled graphs with all kernels between
the same products and library calls that hand data on to each other, or read the same, made one,
which reads its inputs and writes its outputs once.  MFU: 6 FLOPs for each multiply-add of the
model's forward pass, recompute not counted, over the dense matmul peak of the precision.

Where a GPU is at hand, one rank's step is also timed and taken apart (:mod:`diffmoe.bench.timed`),
and stands beside the prediction.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe.bench import fake_cuda, measure
from diffmoe.bench.timed import Timed, timed
from diffmoe.commands.common import Parser
from diffmoe.config import Config, config_to_tree, load_config, override
from diffmoe.cost.hardware import Hardware, choose, read_table
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.cost.step_time import COUNTED, exchange_seconds, peak_flops, rates, terms
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.device import local_device
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.models.count import count

_WAYS = ("eager", "compiled")
_TOP = 10
_SHARDED = ("Adam", "weights in bf16")  # sources that touch what ZeRO leaves a rank
# What the record of a tree shows: 4 micro-batches of 64 samples on one GPU, and a pool over eight.
_RECORD = [
    ("L-E16", "diffmoe_l_e16_flow", 1, []),
    ("XL-E8", "diffmoe_xl_e8_flow", 1, ["parallel.recompute=none"]),
    (
        "L-E16, pool over EP 8, selective",
        "diffmoe_l_e16_flow",
        8,
        ["parallel.ep=8", "moe.pool=group", "parallel.recompute=selective"],
    ),
]


@dataclass(frozen=True)
class Counted:
    """What :mod:`diffmoe.bench.counted` says of a case, and what it costs on ``hardware``.

    ``micro``: of a micro-batch; ``engine``: of a whole step outside of the model.  Bytes, FLOPs,
    seconds.
    """

    config: Config
    ranks: int
    deepspeed: dict
    hardware: Hardware
    micro: dict[str, Any]
    engine: dict[str, Any]

    @property
    def layout(self):
        return resolve_layout(self.config, self.ranks)

    def kernels(self, ideal: bool = False) -> int:
        return sum(k[5] for k in self.micro["ideal" if ideal else "kernels"])

    def elementwise(self, ideal: bool = False) -> int:
        """Bytes of a micro-batch beside products and attention."""
        return sum(
            k[2] * k[5] for k in self.micro["ideal" if ideal else "kernels"] if k[0] == "memory"
        )

    def kinds(self) -> dict[str, list[float]]:
        """[ms, kernels] of a step by kind of kernel."""
        parts, launches = self.parts(), Counter()
        for kernel in self.micro["kernels"]:
            launches[kernel[0]] += kernel[5] * self.layout.accumulation
        launches["memory"] += sum(k[5] for k in self.engine["kernels"])
        return {
            "products": [1e3 * parts["products"], launches["product"]],
            "attention": [1e3 * parts["attention"], launches["attention"]],
            "memory": [1e3 * (parts["elementwise"] + parts["weights"]), launches["memory"]],
        }

    def flops(self) -> int:
        """Of a micro-batch's products and attention."""
        return sum(k[3] * k[5] for k in self.micro["kernels"])

    def sources(self) -> dict[str, float]:
        """Bytes a parameter and step of the weights' traffic, by source, largest first."""
        found: Counter[str] = Counter()
        for _, _, size, _, source, times in self.engine["kernels"]:
            found[source] += size * times / self.engine["parameters"]
        return {source: size for source, size in found.most_common() if size >= 0.05}

    def _seconds(self, kernel: list) -> float:
        kind, _, size, flops, _, times = kernel
        speed = rates(self.config, self.hardware, engine_facts(self.deepspeed))
        return times * max(size / speed["memory"], flops / speed[kind] if flops else 0.0)

    def parts(self, ideal: bool = False) -> dict[str, float]:
        """Seconds of a step by what takes them."""
        found = Counter({"products": 0.0, "attention": 0.0, "elementwise": 0.0})
        names = {"product": "products", "attention": "attention", "memory": "elementwise"}
        for kernel in self.micro["ideal" if ideal else "kernels"]:
            found[names[kernel[0]]] += self._seconds(kernel) * self.layout.accumulation
        facts, layout = engine_facts(self.deepspeed), self.layout
        weights = sum(self.sources().values()) * self.micro["parameters"]
        found["weights"] = weights / rates(self.config, self.hardware, facts)["memory"]
        found["messages"] = exchange_seconds(
            self.config, layout, facts, self.hardware, self.hardware.gpus_per_node
        )
        launches = self.kernels(ideal) * layout.accumulation + sum(
            k[5] for k in self.engine["kernels"]
        )
        host = 1e-6 * (
            self.hardware.operator_us * launches
            + self.hardware.read_us * sum(self.engine["reads"].values())
        )
        # The host runs ahead of the device, until it reads.
        reads = 1e-6 * self.hardware.read_us * sum(self.engine["reads"].values())
        found["host"] = max(reads, host - sum(found.values()))
        return dict(found)

    def seconds(self, ideal: bool = False) -> float:
        return sum(self.parts(ideal).values())

    def mfu(self, seconds: float) -> float:
        peak = peak_flops(self.config, self.hardware, engine_facts(self.deepspeed))
        samples = self.layout.micro_batch * self.layout.accumulation
        return 6 * count(self.config.model, self.config.moe).forward_macs * samples / seconds / peak

    def dearest(self) -> list[list]:
        """[operators, launches, GB of a micro-batch, ms of a step] of the most expensive kernels of
        a kind.
        """
        found: dict[str, list] = {}
        for kernel in self.micro["kernels"]:
            entry = found.setdefault(kernel[1], [kernel[1][:70], 0, 0.0, 0.0])
            entry[1] += kernel[5]
            entry[2] += kernel[2] * kernel[5] / 1e9
            entry[3] += 1e3 * self._seconds(kernel) * self.layout.accumulation
        return sorted(found.values(), key=lambda entry: -entry[3])[:_TOP]


def counted(config: Config, ranks: int, deepspeed: str, part: str) -> dict[str, Any]:
    """``part``: eager, compiled or engine.  Counted in a process of its own."""
    return counted_all([(config, deepspeed, part)], ranks)[0]


def counted_all(cases: list[tuple[Config, str, str]], ranks: int) -> list[dict[str, Any]]:
    """(configuration, DeepSpeed JSON, part) of as many ranks, one after another in one process."""
    requests = [
        {"config": config_to_tree(config), "deepspeed": deepspeed, "ranks": ranks, "part": part}
        for config, deepspeed, part in cases
    ]
    run = fake_cuda.run(
        "diffmoe.bench.counted",
        [json.dumps(requests)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"counting failed:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def dense_of(config: Config) -> Config:
    """The dense model of equal activated width, on as many ranks."""
    return override(config, ["model.family=dense", "parallel.ep=1"])


def models_of(config: Config) -> dict[str, Config]:
    """model, and beside a mixture dense."""
    return (
        {"model": config}
        if config.model.family == "dense"
        else {"model": config, "dense": dense_of(config)}
    )


def compare(
    config: Config, ranks: int, deepspeed: str, hardware: Hardware, ways: tuple[str, ...]
) -> dict[str, dict[str, Counted]]:
    """model | dense -> way -> counts."""
    tree, models = read_deepspeed(deepspeed), models_of(config)
    # Engines last: DeepSpeed, once imported, has torch ask the driver whether there is a GPU.
    cases = [(name, part) for part in (*ways, "engine") for name in models]
    counts = dict(
        zip(cases, counted_all([(models[name], deepspeed, part) for name, part in cases], ranks))
    )
    return {
        name: {
            way: Counted(each, ranks, tree, hardware, counts[name, way], counts[name, "engine"])
            for way in ways
        }
        for name, each in models.items()
    }


def tables(
    title: str, found: dict[str, dict[str, Counted]], measured: dict[tuple[str, str], Timed]
) -> str:
    """Everything that is known of a case, as Markdown."""
    cases = [(name, way, each) for name, ways in found.items() for way, each in ways.items()]
    one, reference = cases[0][2], found.get("dense", found["model"])
    layout, images = one.layout, one.layout.batch
    speed = rates(one.config, one.hardware, engine_facts(one.deepspeed))
    origin = f"from {one.hardware.calibrated}" if one.hardware.calibrated else "assumed"
    text = (
        f"## {title}\n\n{layout.ranks} ranks, EP {layout.ep}, {layout.accumulation} x {layout.micro_batch} samples a rank, pool of "
        f"{layout.pool}, recompute {one.config.parallel.recompute}.  {one.hardware.name}; "
        f"rates {origin}: products "
        f"{speed['product'] / 1e12:.0f} and attention {speed['attention'] / 1e12:.0f} TFLOP/s, memory {speed['memory'] / 1e12:.2f} TB/s, "
        f"{one.hardware.operator_us} µs a launch, {one.hardware.read_us} µs a read.\n\n"
    )
    text += measure.table(
        [
            "a micro-batch",
            "kernels",
            "elementwise GB",
            "of dense",
            "ideal GB",
            "TFLOP",
            "kept GiB",
            "of dense",
            "collectives",
        ],
        [
            [
                f"{name}, {way}",
                each.kernels(),
                each.elementwise() / 1e9,
                each.elementwise() / reference[way].elementwise(),
                each.elementwise(True) / 1e9 if each.micro["ideal"] else "-",
                each.flops() / 1e12,
                each.micro["kept"] / 2**30,
                each.micro["kept"] / reference[way].micro["kept"],
                sum(each.micro["collectives"].values()),
            ]
            for name, way, each in cases
        ],
    )
    rows = []
    for name, way, each in cases:
        for ideal in (False, True)[: 1 + bool(each.micro["ideal"])]:
            seconds, parts = each.seconds(ideal), each.parts(ideal)
            timed = measured[name, way].seconds if not ideal and (name, way) in measured else None
            rows.append(
                [
                    f"{name}, {'ideal' if ideal else way}",
                    *(1e3 * parts[part] for part in parts),
                    1e3 * seconds,
                    images / seconds,
                    f"{each.mfu(seconds):.1%}",
                    "-" if timed is None else 1e3 * timed,
                    "-" if timed is None else f"{each.mfu(timed):.1%}",
                ]
            )
    text += "\n\n" + measure.table(
        ["a step, ms", *one.parts(), "predicted", "images/s", "MFU", "measured", "MFU "], rows
    )
    text += "\n\n" + measure.table(
        [
            "outside of the model, a step",
            "reads in forward",
            "in backward",
            "elsewhere",
            "bytes a parameter",
            "by source",
        ],
        [
            [
                name,
                *(
                    ways_[0].engine["reads"].get(place, 0)
                    for place in ("forward", "backward", "outside")
                ),
                sum(ways_[0].sources().values()),
                ", ".join(f"{s} {b:.3g}" for s, b in ways_[0].sources().items()),
            ]
            for name, ways_ in ((name, list(ways.values())) for name, ways in found.items())
        ],
    )
    for way, each in found["model"].items():
        text += f"\n\nMost expensive, {way}:\n\n" + measure.table(
            ["operators of a kernel", "launches", "GB", "ms a step"], each.dearest()
        )
    return text + _beside(found, measured)


def _beside(found: dict[str, dict[str, Counted]], measured: dict[tuple[str, str], Timed]) -> str:
    """Predicted and measured by kernel; nothing where nothing was measured."""
    if not measured:
        return ""
    rows = [
        [
            f"{name}, {way}",
            kind,
            *found[name][way].kinds().get(kind, [0.0, 0]),
            *took,
            took[0] / predicted[0]
            if (predicted := found[name][way].kinds().get(kind)) and predicted[0]
            else "-",
        ]
        for (name, way), each in measured.items()
        for kind, took in each.kinds.items()
    ]
    text = f"\n\nMeasured on {next(iter(measured.values())).device}:\n\n" + measure.table(
        ["a step", "kind", "predicted ms", "kernels", "measured ms", "kernels ", "of predicted"],
        rows,
    )
    memory = [
        [
            f"{name}, {way}",
            rank_memory((c := found[name][way]).config, c.layout, engine_facts(c.deepspeed)).peak
            / 2**30,
            each.peak_bytes / 2**30,
        ]
        for (name, way), each in measured.items()
        if each.peak_bytes
    ]
    if memory:
        text += "\n\n" + measure.table(["peak", "planned GiB", "measured GiB"], memory)
    for (name, way), each in measured.items():
        text += f"\n\nMeasured, {name}, {way}:\n\n" + measure.table(
            ["kernel", "launches", "ms"], each.kernels
        )
    return text


def facts_of(
    found: dict[str, dict[str, Counted]], measured: dict[tuple[str, str], Timed]
) -> dict[str, Any]:
    """The same for a record; of a measured step also what calibrates the planner
    (``cost.calibration``).
    """

    def taken(name: str, way: str, c: Counted) -> dict[str, Any]:
        config = override(c.config, [f"train.compile={str(way == 'compiled').lower()}"])
        return {
            **measured[name, way].record(),
            "config": config_to_tree(config),
            "deepspeed": c.deepspeed,
            "layout": dataclasses.asdict(c.layout),
        }

    return {
        name: {
            way: {
                "kernels": c.kernels(),
                "elementwise_bytes": c.elementwise(),
                "flops": c.flops(),
                "kept_bytes": c.micro["kept"],
                "ideal_bytes": c.elementwise(True) if c.micro["ideal"] else None,
                "seconds": c.parts(),
                "predicted_s": c.seconds(),
                "measured": taken(name, way, c) if (name, way) in measured else None,
                "mfu": c.mfu(c.seconds()),
                "kinds": c.kinds(),
                "images_per_second": c.layout.batch / c.seconds(),
                "bytes_a_parameter": c.sources(),
                "reads": c.engine["reads"],
                "collectives": {**c.micro["collectives"], **c.engine["collectives"]},
                "dearest": c.dearest(),
            }
            for way, c in ways.items()
        }
        for name, ways in found.items()
    }


def planner_counts(
    ways: tuple[str, ...] = _WAYS, recomputes: tuple[str, ...] = ("none", "block", "selective")
) -> dict[str, Any]:
    """The coefficients of ``diffmoe/cost/counted.json``: what a small model's counts are linear in,
    in bf16 (``cost.step_time``).
    """
    path, bf16 = "configs/diffmoe_l_e16_flow.yaml", "ds_configs/zero1_bf16.json"
    small = load_config(
        path,
        [
            "parallel.ep=1",
            "moe.pool=rank",
            "train.batch=32",
            "train.micro_batch=32",
            "model.width=512",
            "model.heads=8",
            "model.depth=2",
        ],
    )
    changes = [
        ["model.family=dense"],
        ["model.family=dense", "model.depth=4"],
        ["model.family=dense", "model.mlp_ratio=2"],
        ["moe.experts=8"],
        ["moe.experts=32"],
    ]
    cases = [override(small, change) for change in changes]
    found: dict[str, Any] = {}
    for way in ways:
        found[way] = {}
        for recompute in recomputes:
            each = counted_all(
                [
                    (override(case, [f"parallel.recompute={recompute}"]), bf16, way)
                    for case in cases
                ],
                1,
            )
            counts = [
                (
                    sum(k[2] * k[5] for k in micro["kernels"] if k[0] == "memory")
                    / (2 * 32 * small.model.tokens),
                    sum(k[5] for k in micro["kernels"]),
                )
                for micro in each
            ]
            found[way][recompute] = _solved(cases, counts)
    found["weights"] = {
        "bf16": _weights_of(small, bf16),
        "fp32": _weights_of(small, "ds_configs/zero0_fp32.json"),
    }
    return found


def _solved(cases: list[Config], counts: list[tuple[float, int]]) -> dict[str, dict[str, float]]:
    import numpy as np

    by_term = [terms(case) for case in cases]
    elements = np.linalg.solve([list(t.values()) for t in by_term], [c[0] for c in counts])
    (one, two, _, mixed, _), depth = (c[1] for c in counts), cases[0].model.depth
    block = (two - one) / depth
    return {
        "elements": {name: round(float(value), 3) for name, value in zip(by_term[0], elements)},
        "kernels": {"outside": one - depth * block, "block": block, "mixture": mixed - one},
    }


def _weights_of(config: Config, deepspeed: str) -> dict[str, float]:
    """From steps of one and of three micro-batches."""
    found = []
    batches = [config.train.micro_batch, 3 * config.train.micro_batch]
    for engine in counted_all(
        [(override(config, [f"train.batch={batch}"]), deepspeed, "engine") for batch in batches], 1
    ):
        sizes: Counter[str] = Counter()
        for _, _, size, _, source, times in engine["kernels"]:
            sizes[source if source in ("EMA", *_SHARDED) else "parameter"] += (
                size * times / engine["parameters"]
            )
        found.append((sizes, sum(k[5] for k in engine["kernels"]) / engine["tensors"]))
    (one, kernels_of_one), (three, kernels_of_three) = found
    each, kernels = (
        (three["parameter"] - one["parameter"]) / 2,
        (kernels_of_three - kernels_of_one) / 2,
    )
    values = {
        "micro_batch": each,
        "step": one["parameter"] - each,
        "shard": sum(one[s] for s in _SHARDED),
        "ema": one["EMA"],
        "kernels_micro_batch": kernels,
        "kernels_step": kernels_of_one - kernels,
    }
    return {name: round(value, 3) for name, value in values.items()}


def main(arguments: list[str]) -> int:
    """The kind ``roofline``; returns the exit code."""
    parser = Parser(
        prog="bench roofline",
        description="A training step counted without a GPU and priced for one.",
    )
    parser.add_argument(
        "--config", default="configs/diffmoe_l_e16_flow.yaml", help="default: L-E16"
    )
    parser.add_argument(
        "--deepspeed_config", default="ds_configs/zero1_bf16.json", help="default: ZeRO 1 in bf16"
    )
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the layout (default 1)")
    parser.add_argument(
        "--samples", type=int, default=64, help="samples of a rank's micro-batch (default 64)"
    )
    parser.add_argument(
        "--accumulation", type=int, default=4, help="micro-batches of a step (default 4)"
    )
    parser.add_argument(
        "--recompute", choices=["none", "block", "selective"], help="default: the configuration's"
    )
    parser.add_argument(
        "--gpu", default="h100", help="machine of the hardware table (default h100)"
    )
    parser.add_argument(
        "--hardware", type=Path, help="another table than diffmoe/cost/hardware.yaml"
    )
    only = parser.add_mutually_exclusive_group()
    for way in _WAYS:
        only.add_argument(f"--{way}", action="store_true", help=f"only {way}")
    parser.add_argument(
        "--record",
        metavar="FOLDER",
        help="the tables of L-E16, XL-E8 and a pool over EP 8, kept in this folder",
    )
    parser.add_argument(
        "--planner",
        action="store_true",
        help="count anew what launcher plan's times are made of, into diffmoe/cost/counted.json",
    )
    parser.add_argument(
        "--time", action="store_true", help="also time the step of one rank where there is no GPU"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed steps (default 7)")
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON in place of the tables"
    )
    parser.add_argument("--out", help="folder that keeps table, JSON and plot")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="changes to the configuration",
    )
    options = parser.parse_args(arguments)
    for name in ("ranks", "samples", "accumulation", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} ({getattr(options, name)}) must be at least 1")
    if options.planner:
        COUNTED.write_text(json.dumps(planner_counts(), indent=1) + "\n")
        print(f"wrote {COUNTED}")
        return 0
    ways = tuple(way for way in _WAYS if getattr(options, way)) or _WAYS
    hardware = choose(read_table(options.hardware), options.gpu)
    recompute = [f"parallel.recompute={options.recompute}"] if options.recompute else []
    cases = [
        (
            Path(options.config).stem,
            options.config,
            options.ranks,
            ["parallel.ep=1", "moe.pool=rank"] * (options.ranks == 1),
        )
    ]
    if options.record:
        cases = [
            (
                title,
                f"configs/{name}.yaml",
                ranks,
                ["parallel.ep=1", "moe.pool=rank"] * (ranks == 1) + more,
            )
            for title, name, ranks, more in _RECORD
        ]
    facts, texts, bars = {}, [], {}
    for title, path, ranks, changes in cases:
        if load_config(path).model.family != "diffmoe":
            changes = [c for c in changes if not c.startswith("moe.pool")]
        batch = [
            f"train.micro_batch={options.samples}",
            f"train.batch={options.samples * ranks * options.accumulation}",
        ]
        config = load_config(
            path, changes + batch + ["train.accumulation=null"] + recompute + options.set
        )
        found = compare(config, ranks, options.deepspeed_config, hardware, ways)
        measured = {}
        if ranks == 1 and (options.time or torch.cuda.is_available()):
            measured = timed(
                models_of(config), read_deepspeed(options.deepspeed_config), ways, options.repeats
            )
        if options.record and ranks == 1:
            once = override(config, [f"train.batch={options.samples}"])
            alone = counted(once, 1, options.deepspeed_config, "engine")
            single = dataclasses.replace(
                next(iter(found["model"].values())), config=once, engine=alone
            )
            facts[f"{title}, one micro-batch a step"] = {"bytes_a_parameter": single.sources()}
        texts.append(tables(title, found, measured))
        if options.record and ranks == 1:
            texts.append(
                f"With one micro-batch a step: {sum(single.sources().values()):.3g} bytes a parameter."
            )
        facts[title] = facts_of(found, measured)
        bars |= {
            f"{title}: {name}, {way}": 1e3 * c.seconds()
            for name, of in found.items()
            for way, c in of.items()
        }
    options.out, name = (
        (options.record, "roofline") if options.record else (options.out, f"roofline_{cases[0][0]}")
    )
    return measure.report(
        name,
        {"cases": facts, "gpu": options.gpu, **measure.surroundings(local_device(0, 1))},
        "\n\n".join(texts),
        bars,
        "ms a step, predicted",
        options,
    )
