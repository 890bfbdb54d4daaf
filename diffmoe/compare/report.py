"""The table of a comparison: compare.json, compare.md, compare.png and confounds.png in its folder.

It is made of the runs that are trained; what is missing is said.  Numbers that depend on the
machine (time, memory) stand under ``machine``; all others are the same whenever the runs are made
again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diffmoe.compare.plan import Comparison, Plan, PlannedRun, parameters, settings
from diffmoe.compare.plots import draw_confounds, draw_routers
from diffmoe.compare.runs import card_of, check, codes, is_trained, state, verdict_of
from diffmoe.errors import UserError
from diffmoe.evaluation.card import read_card
from diffmoe.evaluation.scores import score_names
from diffmoe.files import write_text, writing
from diffmoe.markdown import table
from diffmoe.training.metrics import read_metrics
from diffmoe.training.validation import read_validations

_FRECHET = "frechet_distance"
_PARAMETERS = (
    "router|parameters|activated|of {}'s|without shared experts|of {}'s |activated as used|"
    "MFLOPs a sample|as used"
)
_EQUAL = 0.05  # activated parameters that differ by less are called equal


def write_report(plan: Plan) -> str:
    """Writes the files and returns the Markdown.  UserError for a folder that cannot be written."""
    found = collect(plan)
    text = to_markdown(plan, found)
    with writing(f"folder ({plan.folder})"):
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_text(plan.folder / "compare.json", json.dumps(found, indent=1) + "\n")
        write_text(plan.folder / "compare.md", text)
        if rows := found["routers"]:
            draw_routers(rows, plan.folder / "compare.png")
        if any(len(rows) > 1 for rows in found["confounds"].values()):
            draw_confounds(found["confounds"], plan.folder / "confounds.png")
    return text


def collect(plan: Plan) -> dict:
    """The whole table as JSON has it."""
    routers = [_row(plan, name, plan.comparison.seeds) for name in plan.comparison.routers]
    seeds = plan.comparison.confounds.seeds or plan.comparison.seeds
    confounds = {
        axis: [{"value": v, **row} for v, name in values if (row := _row(plan, name, seeds))]
        for axis, values in plan.axes.items()
    }
    missing = {run.name: state(run, plan.comparison) for run in plan.runs if not is_trained(run)}
    other = {run.name: _other_settings(run, plan.comparison) for run in plan.runs}
    rows = [row for row in routers if row is not None]
    for row in rows:
        _against(row, rows[0])
    return {
        "samples": plan.comparison.samples,
        "ranks": plan.comparison.ranks,
        "seeds": list(plan.comparison.seeds),
        "routers": rows,
        "confounds": confounds,
        "missing": missing,
        "other_settings": {name: told for name, told in other.items() if told},
        "code": sorted(set().union(*(codes(run) for run in plan.runs))),
    }


def _other_settings(run: PlannedRun, comparison: Comparison) -> str | None:
    """How a run that is there differs from what the YAML says now; it is shown all the same."""
    try:
        check(run, comparison)
    except UserError as error:
        return str(error).partition(": ")[2].rpartition("; ")[0]
    return None


def _row(plan: Plan, variant: str, seeds: Sequence[int]) -> dict | None:
    """What a variant's trained runs of these seeds say; None: there is none."""
    runs = [run for run in plan.of(variant) if run.seed in seeds and is_trained(run)]
    if not runs:
        return None
    curves = [read_validations(run.folder) for run in runs]
    last = [curve[-1] for curve in curves]
    config = runs[0].config
    used = spread_of([record["experts_per_token"] for record in last])
    counted = parameters(config)
    as_used = counted if used is None else parameters(config, used["mean"])
    return {
        "router": variant,
        "family": config.model.family,
        "seeds": [run.seed for run in runs],
        "steps": config.train.steps,
        "batch": config.train.batch,
        "parameters": counted.total,
        "activated": counted.activated,
        "activated_without_shared": counted.activated_unshared,
        "activated_as_used": as_used.activated,
        "flops": counted.flops,
        "flops_as_used": as_used.flops,
        "validation_loss": spread_of([record["loss"] for record in last]),
        "loss_by_time": _mean([record["loss_by_time"] for record in last]),
        "experts_per_token": used,
        "load": _balance([record["load"] for record in last]),
        "scores": _scores(runs),
        "judge": _judged(runs, plan.comparison),
        "curve": _curve(curves),
        "machine": _machine(runs),
    }


def spread_of(values: Sequence[float | None]) -> dict | None:
    """Mean and standard deviation (of a sample; None of one value), with the values themselves."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    spread = statistics.stdev(given) if len(given) > 1 else None
    return {"mean": statistics.fmean(given), "spread": spread, "each": given}


def _mean(lists: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Entry by entry; None where one has none."""
    return [
        None if any(value is None for value in entries) else statistics.fmean(entries)  # type: ignore[arg-type]
        for entries in zip(*lists)
    ]


def _balance(loads: Sequence[list | None]) -> dict | None:
    """Of the experts' shares [layers, tenths of time, experts], mean over seeds: how many times the
    mean expert's load the busiest has, by layer and by time, and experts per token by time.
    """
    if not loads or any(not load for load in loads):
        return None
    shares = np.array(loads, np.float64)  # [seeds, layers, tenths, experts]
    by_layer = _busiest(shares.mean(axis=2)).mean(axis=0)
    by_time = _busiest(shares).mean(axis=(0, 1))
    return {
        "busiest_by_layer": by_layer.tolist(),
        "busiest_by_time": by_time.tolist(),
        "experts_per_token_by_time": shares.sum(axis=3).mean(axis=(0, 1)).tolist(),
    }


def _busiest(shares: np.ndarray) -> np.ndarray:
    """The last axis's largest over its mean; 1 where nobody took anything."""
    mean = shares.mean(axis=-1)
    return np.divide(shares.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)


def _scores(runs: list[PlannedRun]) -> dict:
    """Scores of ``evaluate`` by field, their names, and how many images; where there are any."""
    paths = [card_of(run) for run in runs if run.config.score.reference]
    cards = [read_card(path) for path in paths if path.exists()]
    if not cards:
        return {}
    first = cards[0]
    names = {
        field: name
        for field, name in score_names(first.extractor, first.extractor_sha256).items()
        if getattr(first.scores, field) is not None
    }
    each = {field: spread_of([getattr(card.scores, field) for card in cards]) for field in names}
    return {"names": names, "count": first.count, **each}


def _judged(runs: list[PlannedRun], comparison: Comparison) -> dict:
    """The judge's numbers, of the runs that were judged."""
    paths = [verdict_of(run, comparison) for run in runs]
    reports = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not reports:
        return {}
    return {
        name: spread_of([report.get(name) for report in reports])
        for name, value in reports[0].items()
        if isinstance(value, float)
    }


def _curve(curves: list[list[dict]]) -> dict:
    """Validation loss over samples, where all seeds have it."""
    by_samples = [{record["samples"]: record["loss"] for record in curve} for curve in curves]
    samples = sorted(set.intersection(*(set(curve) for curve in by_samples)))
    return {"samples": samples, "each": [[curve[s] for s in samples] for curve in by_samples]}


def _machine(runs: list[PlannedRun]) -> dict:
    """Milliseconds a step (median of the lines of the metrics), and GiB at the peak."""
    records = [record for run in runs for record in read_metrics(run.folder / "metrics.jsonl")]
    records = [record for record in records if record.get("images_per_s")]
    batch = runs[0].config.train.batch
    times = [1e3 * batch / record["images_per_s"] for record in records]
    memory = [record["memory_gib"] for record in records]
    return {
        "ms_a_step": statistics.median(times) if times else None,
        "memory_gib": max(memory, default=None),
    }


def _against(row: dict, first: dict) -> None:
    """How a row differs from the first: seed by seed, since both were fed the same."""
    ours = dict(zip(row["seeds"], row["validation_loss"]["each"]))
    theirs = dict(zip(first["seeds"], first["validation_loss"]["each"]))
    both = [seed for seed in ours if seed in theirs]
    row["against"] = {
        "router": first["router"],
        **{name: row[name] / first[name] for name in ("activated", "activated_without_shared")},
        "loss": spread_of([ours[seed] - theirs[seed] for seed in both]),
    }


# -------------------------------------------------------------------------------------------------
# Markdown


def _shown(spread: dict | None, form: str = ".4f") -> str | None:
    if spread is None:
        return None
    text, more = f"{spread['mean']:{form}}", spread["spread"]
    return text if more is None else f"{text} ± {abs(more):{form.lstrip('+')}}"


def to_markdown(plan: Plan, found: dict) -> str:
    """``compare.md``."""
    comparison, rows = plan.comparison, found["routers"]
    seeds = ", ".join(map(str, comparison.seeds))
    lines = [
        "# Routers side by side",
        "",
        f"Recipe `{Path(comparison.base).name}`, {comparison.samples:,} samples a run on "
        f"{comparison.ranks} rank{'s' * (comparison.ranks > 1)}, seeds {seeds}. All runs of a seed "
        "were fed the same samples, noise, times and label drops; the validation loss of all runs "
        "is of the same held-out samples, times and noise, of the averaged weights. ± is the "
        "standard deviation over seeds.",
    ]
    if len(found["code"]) > 1:
        lines += ["", f"The runs are not all of one code: {', '.join(found['code'])}."]
    for name, told in _own_recipes(plan).items():
        lines += ["", f"{name} is trained with a recipe of its own: {told}."]
    others: dict[str, list[str]] = {}
    for name, told in found["other_settings"].items():
        others.setdefault(told, []).append(name)
    for told, names in others.items():
        lines += ["", f"Other settings than the YAML's: {', '.join(names)}, where {told}."]
    if missing := [f"{name} ({told})" for name, told in found["missing"].items()]:
        lines += ["", f"Missing: {', '.join(missing)}."]
    if rows:
        lines += ["", *_routers_table(rows), "", *_columns(rows, _PARAMETERS)]
        lines += ["", *_unequal(rows), *_load_tables(rows)]
        lines += [*_scores_table(rows, "scores"), *_scores_table(rows, "judge")]
    for axis, varied in found["confounds"].items():
        if varied:
            lines += ["", f"## {axis}, for {plan.comparison.confounds.router}", ""]
            lines += _confound_table(axis, varied)
    if any(found["confounds"].values()):
        lines += [
            "",
            "The number of samples is the same throughout; where the batch differs, warm-up and "
            "averages are as long in samples as the recipe's, and the learning rate stays.",
        ]
    return "\n".join(lines) + "\n"


def _own_recipes(plan: Plan) -> dict[str, str]:
    """Router -> where its ``train`` section differs from the first router's."""
    trained = {
        run.router: {k: v for k, v in settings(run.config).items() if k.startswith("train.")}
        for run in plan.runs
        if not run.axis
    }
    first = next(iter(trained.values()))
    told = {
        router: ", ".join(f"{k} {v}, not {first[k]}" for k, v in own.items() if v != first[k])
        for router, own in trained.items()
    }
    return {router: text for router, text in told.items() if text}


# Columns of the tables by their heads; the first router's name goes into {}.
_COLUMNS: dict[str, Callable[[dict], object]] = {
    "router": lambda row: row["router"],
    "seeds": lambda row: len(row["seeds"]),
    "steps": lambda row: row["steps"],
    "validation loss": lambda row: _shown(row["validation_loss"], ".5f"),
    "less {}'s, seed by seed": lambda row: (
        None
        if row["router"] == row["against"]["router"]
        else _shown(row["against"]["loss"], "+.5f")
    ),
    "judge: accuracy": lambda row: _shown(row["judge"].get("accuracy")),
    "experts a token, as used": lambda row: _shown(row["experts_per_token"], ".3f"),
    "busiest expert / mean": lambda row: (
        row["load"] and f"{statistics.fmean(row['load']['busiest_by_layer']):.2f}"
    ),
    "ms a step": lambda row: _number(row["machine"]["ms_a_step"], ".1f"),
    "peak GiB": lambda row: _number(row["machine"]["memory_gib"], ".2f"),
    "parameters": lambda row: f"{row['parameters']:,}",
    "activated": lambda row: f"{row['activated']:,}",
    "of {}'s": lambda row: f"{row['against']['activated']:.3f}",
    "without shared experts": lambda row: f"{row['activated_without_shared']:,}",
    "of {}'s ": lambda row: f"{row['against']['activated_without_shared']:.3f}",
    "activated as used": lambda row: f"{row['activated_as_used']:,}",
    "MFLOPs a sample": lambda row: f"{row['flops'] / 1e6:.1f}",
    "as used": lambda row: f"{row['flops_as_used'] / 1e6:.1f}",
}


def _columns(rows: list[dict], heads: str, **more: Callable[[dict], object]) -> list[str]:
    """The table of these columns, each named as in ``_COLUMNS`` or ``more``, with a | between."""
    found = _COLUMNS | more
    cells = [[found[head](row) for head in heads.split("|")] for row in rows]
    first = rows[0]["router"]
    return table([head.replace("{}", first).strip() for head in heads.split("|")], cells)


def _routers_table(rows: list[dict]) -> list[str]:
    scores, frechet = _frechet(rows)
    judged = "judge: accuracy|" if any(row["judge"] for row in rows) else ""
    return _columns(
        rows,
        f"router|seeds|validation loss|less {{}}'s, seed by seed|{scores}{judged}"
        "experts a token, as used|busiest expert / mean|ms a step|peak GiB",
        **frechet,
    )


def _frechet(rows: list[dict]) -> tuple[str, dict[str, Callable[[dict], object]]]:
    """The head of the Fréchet distance's column with its |, and the column; where there is one."""
    scored: dict = next((row["scores"] for row in rows if _FRECHET in row["scores"]), {})
    if not scored:
        return "", {}
    head = f"{scored['names'][_FRECHET]}, {scored['count']} images"
    return f"{head}|", {head: lambda row: _shown(row["scores"].get(_FRECHET))}


def _scores_table(rows: list[dict], kind: str) -> list[str]:
    """All numbers of ``evaluate`` or of the judge."""
    found: dict = next((row[kind] for row in rows if row[kind]), {})
    if not found:
        return []
    names = found.get("names") or {name: name.replace("_", " ") for name in found}
    cells = [(row["router"], *(_shown(row[kind].get(name)) for name in names)) for row in rows]
    title = f"Scores, {found['count']} images:" if kind == "scores" else "What the judge says:"
    return ["", title, "", *table(("router", *names.values()), cells)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


def _unequal(rows: list[dict]) -> list[str]:
    """A sentence on whether the routers activate equally many parameters."""
    first = rows[0]["router"]
    off = {row["router"]: row["against"]["activated"] - 1 for row in rows}
    most = max(map(abs, off.values()))
    if most <= _EQUAL:
        return [f"Activated parameters are equal to {first}'s within {most:.1%}."]
    told = ", ".join(f"{name} {share:+.1%}" for name, share in off.items() if abs(share) > _EQUAL)
    return [
        "Activated parameters, routers and predictors included, are NOT equal to "
        f"{first}'s: {told}."
    ]


def _load_tables(rows: list[dict]) -> list[str]:
    sparse = [row for row in rows if row["load"]]
    if not sparse:
        return []
    load = lambda key: [(row["router"], *row["load"][key]) for row in sparse]
    layers = {len(row["load"]["busiest_by_layer"]) for row in sparse}
    tenths = len(sparse[0]["load"]["busiest_by_time"])
    lines = ["", "The busiest expert's load over the mean, by MoE layer:", ""]
    if len(layers) == 1:
        head = ("router", *(f"layer {i}" for i in range(layers.pop())))
        lines += table(head, load("busiest_by_layer"), ".2f")
    head = ("router", *(f"t {i / tenths:.1f}" for i in range(tenths)))
    lines += ["", "The same by time (0 noise, 1 data), mean of layers:", ""]
    lines += table(head, load("busiest_by_time"), ".2f")
    lines += ["", "Experts a token by time, as used:", ""]
    lines += table(head, load("experts_per_token_by_time"), ".2f")
    lines += ["", "Validation loss by time:", ""]
    return lines + table(head, [(row["router"], *row["loss_by_time"]) for row in rows], ".4f")


def _confound_table(axis: str, rows: list[dict]) -> list[str]:
    field = axis.rpartition(".")[2]
    scores, frechet = _frechet(rows)
    return _columns(
        rows,
        f"{field}|seeds|steps|validation loss|{scores}experts a token, as used|"
        "busiest expert / mean|parameters|activated|ms a step",
        **{field: lambda row: row["value"], **frechet},
    )
