"""``run.py bench roofline``: a training step counted without a GPU and priced for one, beside dense
of equal activated width.

A micro-batch's kernels are counted on CUDA tensors without memory, eager and compiled
(:mod:`diffmoe.bench.kernels`), the weights' traffic and host reads in the engine's own step
(:mod:`diffmoe.bench.counted`), messages by the planner's formulas.  A kernel takes the longer of
its bytes and its FLOPs at the rates that ``diffmoe/cost/hardware.yaml`` says are reached; of
messages a step is longer by what the planner says is exposed, the rest is hidden.  ``ideal``: the
compiled graphs with all kernels between the same products or library calls that hand data on to
each other, or read the same, made one, which reads its inputs and writes its outputs once.  MFU: 6
FLOPs for each multiply-add of the model's forward pass, recompute not counted, over the dense
matmul peak of the precision.

Where a GPU is at hand, one rank's step is also timed and taken apart by kernel, and stands beside
the prediction.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffmoe.bench import measure
from diffmoe.bench.fake_cuda import counted
from diffmoe.bench.options import bench_parser, count
from diffmoe.bench.planner_counts import planner_counts
from diffmoe.bench.step import FixedTraining, Variant
from diffmoe.config import Config, config_to_tree, load_config, override
from diffmoe.cost.hardware import Hardware, choose, read_table
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.cost.step_time import COUNTED, StepTime, muon_seconds, peak_flops, rates, step_time
from diffmoe.deepspeed_json import check_shards, read_deepspeed, zero_stage
from diffmoe.device import local_device, set_fp32_precision
from diffmoe.layout import Layout, over_hosts, resolve_layout
from diffmoe.models.count import count as count_model

_PARTS = {"product": "products", "attention": "attention", "memory": "elementwise"}


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

    @cached_property
    def layout(self) -> Layout:
        layout, here = resolve_layout(self.config, self.ranks), self.hardware.gpus_per_node
        return over_hosts(layout, self.config.parallel.exchange, [here])

    @cached_property
    def rates(self) -> dict[str, float]:
        """FLOP/s of products and attention, bytes/s of memory."""
        return rates(self.config, self.hardware, engine_facts(self.deepspeed))

    @cached_property
    def planned(self) -> StepTime:
        """The planner's step: what of its messages is exposed and what is hidden."""
        facts, hardware = engine_facts(self.deepspeed), self.hardware
        return step_time(self.config, self.layout, facts, hardware, hardware.gpus_per_node)

    @cached_property
    def ideal(self) -> Counted | None:
        """With the ideal fusion, where something is compiled."""
        micro = {**self.micro, "kernels": self.micro["ideal"], "ideal": []}
        return dataclasses.replace(self, micro=micro) if micro["kernels"] else None

    @property
    def launches(self) -> int:
        """Of a micro-batch."""
        return sum(k[5] for k in self.micro["kernels"])

    @property
    def elementwise(self) -> int:
        """Bytes of a micro-batch beside products and attention."""
        return sum(k[2] * k[5] for k in self.micro["kernels"] if k[0] == "memory")

    @property
    def flops(self) -> int:
        """Of a micro-batch's products and attention."""
        return sum(k[3] * k[5] for k in self.micro["kernels"])

    def kinds(self) -> dict[str, list[float]]:
        """[ms, kernels] of a step by kind of kernel."""
        parts, launches = self.parts(), dict.fromkeys(_PARTS, 0)
        launches["memory"] = sum(k[5] for k in self.engine["kernels"])
        for kernel in self.micro["kernels"]:
            launches[kernel[0]] += kernel[5] * self.layout.accumulation
        return {
            "products": [1e3 * parts["products"], launches["product"]],
            "attention": [1e3 * parts["attention"], launches["attention"]],
            "memory": [1e3 * (parts["elementwise"] + parts["weights"]), launches["memory"]],
        }

    def sources(self) -> dict[str, float]:
        """Bytes a parameter and step of the weights' traffic, by source, largest first."""
        found: dict[str, float] = {}
        for kind, _, size, _, source, times in self.engine["kernels"]:
            if kind == "product":  # Muon's, see parts
                continue
            found[source] = found.get(source, 0.0) + size * times / self.engine["parameters"]
        ordered = sorted(found.items(), key=lambda item: -item[1])
        return {source: size for source, size in ordered if size >= 0.05}

    def _seconds(self, kernel: list) -> float:
        """Of a step."""
        kind, _, size, flops, _, times = kernel
        each = max(size / self.rates["memory"], flops / self.rates[kind] if flops else 0.0)
        return times * each * self.layout.accumulation

    def parts(self) -> dict[str, float]:
        """Seconds of a step by what takes them."""
        found = dict.fromkeys(_PARTS.values(), 0.0)
        for kernel in self.micro["kernels"]:
            found[_PARTS[kernel[0]]] += self._seconds(kernel)
        hardware = self.hardware
        weights = sum(self.sources().values()) * self.micro["parameters"]
        found["weights"] = weights / self.rates["memory"] + muon_seconds(
            self.config, self.layout, engine_facts(self.deepspeed), hardware
        )
        found["exposed messages"] = self.planned.all_to_all + self.planned.reduction
        launches = self.launches * self.layout.accumulation
        launches += sum(k[5] for k in self.engine["kernels"])
        # The host runs ahead of the device, until it reads.
        reads = 1e-6 * hardware.read_us * sum(self.engine["reads"].values())
        host = 1e-6 * hardware.operator_us * launches + reads
        found["host"] = max(reads, host - sum(found.values()))
        return found

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    def mfu(self, seconds: float) -> float:
        peak = peak_flops(self.config, self.hardware, engine_facts(self.deepspeed))
        samples = self.layout.micro_batch * self.layout.accumulation
        macs = count_model(self.config.model, self.config.moe).forward_macs
        return 6 * macs * samples / seconds / peak

    def most_expensive(self) -> list[list]:
        """[operators, launches, GB of a micro-batch, ms of a step] of kernels that do the same."""
        found: dict[str, list] = {}
        for kernel in self.micro["kernels"]:
            entry = found.setdefault(kernel[1], [kernel[1][:70], 0, 0.0, 0.0])
            entry[1] += kernel[5]
            entry[2] += kernel[2] * kernel[5] / 1e9
            entry[3] += 1e3 * self._seconds(kernel)
        return sorted(found.values(), key=lambda entry: -entry[3])[:10]

    def record(self, way: str, measured: dict | None) -> dict[str, Any]:
        """Also what calibrates the planner (``cost.calibration``), of a measured step."""
        parts, taken = self.parts(), None
        seconds = sum(parts.values())
        if measured:
            compiled = str(way == "compiled").lower()
            taken = {
                **measured,
                "config": config_to_tree(override(self.config, [f"train.compile={compiled}"])),
                "deepspeed": self.deepspeed,
                "layout": dataclasses.asdict(self.layout),
            }
        return {
            "kernels": self.launches,
            "elementwise_bytes": self.elementwise,
            "flops": self.flops,
            "kept_bytes": self.micro["kept"],
            "ideal_bytes": self.ideal and self.ideal.elementwise,
            "seconds": parts,
            "hidden_messages_s": self.planned.hidden,
            "predicted_s": seconds,
            "measured": taken,
            "mfu": self.mfu(seconds),
            "kinds": self.kinds(),
            "images_per_second": self.layout.batch / seconds,
            "bytes_a_parameter": self.sources(),
            "reads": self.engine["reads"],
            "collectives": {**self.micro["collectives"], **self.engine["collectives"]},
            "dearest": self.most_expensive(),
        }


Cases = dict[tuple[str, str], Counted]  # (model | dense, eager | compiled) -> counts
_DENSE = ["model.family=dense", "parallel.ep=1", "parallel.exchange=auto", "parallel.overlap=none"]


def models_of(config: Config) -> dict[str, Config]:
    """model, and beside an MoE model the dense one of equal activated width, on as many ranks."""
    if config.model.family == "dense":
        return {"model": config}
    return {"model": config, "dense": override(config, _DENSE)}


def compare(
    config: Config, ranks: int, deepspeed: str, hardware: Hardware, ways: list[str]
) -> Cases:
    """Counts of the model and of the dense one beside it."""
    tree, models = read_deepspeed(deepspeed), models_of(config)
    check_shards(tree, config, ranks)
    # Engines last: DeepSpeed, once imported, has torch ask the driver whether there is a GPU.
    cases = [(name, part) for part in (*ways, "engine") for name in models]
    given = [(models[name], deepspeed, part) for name, part in cases]
    answers = counted(given, ranks, hardware.gpus_per_node)
    found = dict(zip(cases, answers))
    return {
        (name, way): Counted(each, ranks, tree, hardware, found[name, way], found[name, "engine"])
        for name, each in models.items()
        for way in ways
    }


def timed(
    models: dict[str, Config], tree: dict, ways: list[str], repeats: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """(model, eager | compiled) -> a step of one rank on this machine, in the family and under the
    DeepSpeed JSON that are priced: ``seconds``, median of several; of a traced one ``kinds``, [ms,
    launches] by kind of kernel, the most expensive ``kernels`` as [name, launches, ms], and on a
    GPU the most bytes that tensors took.  Compiled at ZeRO 3, which no training is, is left out.
    """
    device, found = local_device(0, 1), {}
    cuda, about = device.type == "cuda", measure.surroundings(device)
    measure.world_of_one(device)
    if zero_stage(tree) == 3:
        ways = [way for way in ways if way != "compiled"]
    for name, config in models.items():  # one after another: each has the memory to itself
        training, recompute = FixedTraining(config, tree, device), config.parallel.recompute
        steps = {way: Variant(training, recompute, way == "compiled").step for way in ways}
        seconds = measure.interleaved(steps, repeats, device, warm_up=2)
        for way, step in steps.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            events = measure.traced(step, device)
            peak = torch.cuda.max_memory_allocated(device) if cuda else 0
            kinds = {kind: [0.0, 0] for kind in ("products", "attention", "memory", "messages")}
            for key, ms, calls in events:
                kind = kinds[measure.kind_of(key)]
                kind[:] = kind[0] + ms, kind[1] + calls
            found[name, way] = {
                "seconds": seconds[way],
                "kinds": kinds,
                "kernels": [[key[:100], calls, ms] for key, ms, calls in events[:16]],
                "peak_bytes": peak,
                "device": about["device"],
            }
            took = f"{1e3 * seconds[way]:.4g} ms a step"
            print(f"measured: {name}, {way}: {took}", file=sys.stderr, flush=True)
        training.engine.engine.destroy()  # hooks on parameters hold it
        del training, steps, step
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return found


def tables(title: str, cases: Cases, measured: dict[tuple[str, str], dict]) -> str:
    """Everything that is known of a case, as Markdown."""
    one = next(iter(cases.values()))
    layout, hardware, speed = one.layout, one.hardware, one.rates
    origin = f"from {hardware.calibrated}" if hardware.calibrated else "assumed"
    text = (
        f"## {title}\n\n{layout.ranks} ranks, EP {layout.ep}"
        f"{' over two levels' if layout.per_host else ''}, {layout.accumulation} x "
        f"{layout.micro_batch} samples a rank, pool of {layout.pool}, recompute "
        f"{one.config.parallel.recompute}.  {hardware.name}; rates {origin}: products "
        f"{speed['product'] / 1e12:.0f} and attention {speed['attention'] / 1e12:.0f} TFLOP/s, "
        f"memory {speed['memory'] / 1e12:.2f} TB/s, {hardware.operator_us} µs a launch, "
        f"{hardware.read_us} µs a read."
    )
    micro, steps, outside = [], [], []
    for (name, way), each in cases.items():
        dense = cases.get(("dense", way), each)
        kept, reads, sources = each.micro["kept"], each.engine["reads"], each.sources()
        size, collectives = each.elementwise, sum(each.micro["collectives"].values())
        fused = each.ideal.elementwise / 1e9 if each.ideal else None
        sizes = [each.launches, size / 1e9, size / dense.elementwise, fused]
        sizes += [each.flops / 1e12, kept / 2**30, kept / dense.micro["kept"], collectives]
        micro.append([f"{name}, {way}", *sizes])
        for form, case in ((way, each), ("ideal", each.ideal)):
            if case is None:
                continue
            seconds, took = case.seconds, measured.get((name, form), {}).get("seconds")
            hidden = case.planned.hidden
            ms = [1e3 * part for part in (*case.parts().values(), hidden, seconds)]
            mfu = f"{case.mfu(seconds):.1%}"
            last = [1e3 * took, f"{case.mfu(took):.1%}"] if took else [None, None]
            steps.append([f"{name}, {form}", *ms, layout.batch / seconds, mfu, *last])
        row = [reads.get(place, 0) for place in ("forward", "backward", "outside")]
        by_source = ", ".join(f"{source} {size:.3g}" for source, size in sources.items())
        outside.append([name, *row, sum(sources.values()), by_source])
    head = "a micro-batch|kernels|elementwise GB|of dense|ideal GB|TFLOP|kept GiB|of dense|"
    text += _table(f"{head}collectives", micro)
    head = f"a step, ms|{'|'.join(one.parts())}|hidden messages|predicted|images/s|MFU|"
    text += _table(f"{head}measured|MFU ", steps)
    head = "outside of the model, a step|reads in forward|in backward|elsewhere|"
    ways = len({way for _, way in cases})
    text += _table(f"{head}bytes a parameter|by source", outside[::ways])
    for (name, way), each in cases.items():
        if name == "model":
            text += f"\n\nMost expensive, {way}:"
            text += _table("operators of a kernel|launches|GB|ms a step", each.most_expensive())
    return text + (_beside(cases, measured) if measured else "")


def _table(head: str, rows: list) -> str:
    return "\n\n" + measure.table(head.split("|"), rows)


def _beside(cases: Cases, measured: dict[tuple[str, str], dict]) -> str:
    """Predicted and measured by kernel."""
    kinds, memory, kernels = [], [], ""
    for (name, way), took in measured.items():
        each, predicted = cases[name, way], cases[name, way].kinds()
        for kind, (ms, launches) in took["kinds"].items():
            wanted = predicted.get(kind, [0.0, 0])
            ratio = ms / wanted[0] if wanted[0] else None
            kinds.append([f"{name}, {way}", kind, *wanted, ms, launches, ratio])
        plan = rank_memory(each.config, each.layout, engine_facts(each.deepspeed))
        memory.append([f"{name}, {way}", plan.peak / 2**30, took["peak_bytes"] / 2**30])
        kernels += f"\n\nMeasured, {name}, {way}:"
        kernels += _table("kernel|launches|ms", took["kernels"])
    head = "a step|kind|predicted ms|kernels|measured ms|kernels |of predicted"
    text = f"\n\nMeasured on {took['device']}:{_table(head, kinds)}"
    if took["peak_bytes"]:
        text += _table("peak|planned GiB|measured GiB", memory)
    return text + kernels


def main(arguments: list[str]) -> int:
    """The kind ``roofline``; returns the exit code.  UserError for bad input."""
    parser = bench_parser(
        "roofline", "A training step counted without a GPU and priced for one.", of="config"
    )
    add = parser.add_argument
    add("--ranks", type=count, default=1, help="GPUs of the layout (default 1)")
    add("--samples", type=count, default=64, help="of a rank's micro-batch (default 64)")
    add("--accumulation", type=count, default=4, help="micro-batches of a step (default 4)")
    forms = ["none", "block", "selective"]
    add("--recompute", choices=forms, help="default: the configuration's")
    add("--gpu", default="h100", help="machine of the hardware table (default h100)")
    add("--hardware", type=Path, help="another table than diffmoe/cost/hardware.yaml")
    add("--eager", action="store_true", help="only eager, not compiled")
    anew = "count what launcher plan's times are made of anew, into diffmoe/cost/counted.json"
    add("--planner", action="store_true", help=anew)
    add("--time", action="store_true", help="time one rank's step also where there is no GPU")
    add("--repeats", type=count, default=7, help="timed steps (default 7)")
    options = parser.parse_args(arguments)
    if options.planner:
        COUNTED.write_text(json.dumps(planner_counts(), indent=1) + "\n")
        print(f"wrote {COUNTED}")
        return 0
    ways = ["eager"] if options.eager else ["eager", "compiled"]
    hardware, ranks = choose(read_table(options.hardware), options.gpu), options.ranks
    changes = [
        f"train.micro_batch={options.samples}",
        f"train.batch={options.samples * ranks * options.accumulation}",
        "train.accumulation=null",
    ]
    if ranks == 1:
        changes += ["parallel.ep=1", "parallel.overlap=none"]
        if load_config(options.config).model.family == "diffmoe":
            changes.append("moe.pool=rank")
    if options.recompute:
        changes.append(f"parallel.recompute={options.recompute}")
    config = load_config(options.config, changes + options.set)
    set_fp32_precision(config.run.fp32_precision)
    about, measured = measure.surroundings(local_device(0, 1)), {}
    # First: on a borrowed GPU it is what cannot be done later.
    if ranks == 1 and (options.time or torch.cuda.is_available()):
        tree = read_deepspeed(options.deepspeed_config)
        measured = timed(models_of(config), tree, ways, options.repeats)
    cases = compare(config, ranks, options.deepspeed_config, hardware, ways)
    record: dict[str, dict[str, Any]] = {}
    for (name, way), each in cases.items():
        record.setdefault(name, {})[way] = each.record(way, measured.get((name, way)))
    title = Path(options.config).stem
    facts = {
        "cases": {title: record},
        "gpu": options.gpu,
        **about,
    }
    text = tables(title, cases, measured)
    bars = {f"{title}: {name}, {way}": 1e3 * c.seconds for (name, way), c in cases.items()}
    return measure.report(f"roofline_{title}", facts, text, bars, "ms a step, predicted", options)
