"""The table of a comparison: compare.json, compare.md, compare.png and confounds.png in its folder.

It is made of the runs that are trained; what is missing is said.  Numbers that depend on the
machine (time, memory) stand under ``machine``; all others are the same whenever the runs are made
again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffmoe.compare.plan import Comparison, Plan, PlannedRun, parameters, settings
from diffmoe.compare.plots import draw_confounds, draw_routers
from diffmoe.compare.runs import card_of, check, codes, is_trained, state, verdict_of
from diffmoe.errors import UserError
from diffmoe.evaluation.card import read_card
from diffmoe.evaluation.scores import score_names
from diffmoe.files import replacing, writing
from diffmoe.markdown import table
from diffmoe.training.metrics import read_metrics
from diffmoe.training.validation import read_validations

_FRECHET = "frechet_distance"
_EQUAL = 0.05  # activated parameters that differ by less are called equal


def write_report(plan: Plan) -> str:
    """Writes the files and returns the Markdown.  UserError for a folder that cannot be written."""
    found = collect(plan)
    text = to_markdown(plan, found)
    with writing(f"folder ({plan.folder})"):
        plan.folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("compare.json", json.dumps(found, indent=1) + "\n"),
            ("compare.md", text),
        ):
            with replacing(plan.folder / name) as stream:
                stream.write(content.encode())
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
        "activated": row["activated"] / first["activated"],
        "activated_without_shared": row["activated_without_shared"]
        / first["activated_without_shared"],
        "loss": spread_of([ours[seed] - theirs[seed] for seed in both]),
    }


# -------------------------------------------------------------------------------------------------
# Markdown


def _shown(spread: dict | None, form: str = ".4f") -> str | None:
    if spread is None:
        return None
    text = f"{spread['mean']:{form}}"
    return (
        text if spread["spread"] is None else f"{text} ± {abs(spread['spread']):{form.lstrip('+')}}"
    )


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
        lines += ["", *_routers_table(rows), "", *_parameters_table(rows)]
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


def _routers_table(rows: list[dict]) -> list[str]:
    first = rows[0]["router"]
    head = ["router", "seeds", "validation loss", f"less {first}'s, seed by seed"]
    scored: dict = next((row["scores"] for row in rows if row["scores"]), {})
    judged: dict = next((row["judge"] for row in rows if row["judge"]), {})
    if _FRECHET in scored:
        head.append(_frechet(scored))
    if judged:
        head.append("judge: accuracy")
    head += ["experts a token, as used", "busiest expert / mean", "ms a step", "peak GiB"]
    cells = []
    for row in rows:
        load, machine = row["load"], row["machine"]
        cells.append(
            [
                row["router"],
                len(row["seeds"]),
                _shown(row["validation_loss"], ".5f"),
                None if row["router"] == first else _shown(row["against"]["loss"], "+.5f"),
                *([_shown(row["scores"].get(_FRECHET))] if _FRECHET in scored else []),
                *([_shown(row["judge"].get("accuracy"))] if judged else []),
                _shown(row["experts_per_token"], ".3f"),
                None if load is None else f"{statistics.fmean(load['busiest_by_layer']):.2f}",
                _number(machine["ms_a_step"], ".1f"),
                _number(machine["memory_gib"], ".2f"),
            ]
        )
    return table(head, cells)


def _frechet(scored: dict) -> str:
    return f"{scored['names'][_FRECHET]}, {scored['count']} images"


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


def _parameters_table(rows: list[dict]) -> list[str]:
    first = rows[0]["router"]
    head = (
        f"router|parameters|activated|of {first}'s|without shared experts|of {first}'s|"
        "activated as used|MFLOPs a sample|as used"
    )
    return table(
        head.split("|"),
        [
            (
                row["router"],
                f"{row['parameters']:,}",
                f"{row['activated']:,}",
                f"{row['against']['activated']:.3f}",
                f"{row['activated_without_shared']:,}",
                f"{row['against']['activated_without_shared']:.3f}",
                f"{row['activated_as_used']:,}",
                f"{row['flops'] / 1e6:.1f}",
                f"{row['flops_as_used'] / 1e6:.1f}",
            )
            for row in rows
        ],
    )


def _unequal(rows: list[dict]) -> list[str]:
    """A sentence on whether the routers activate equally many parameters."""
    first = rows[0]["router"]
    off = {
        row["router"]: row["against"]["activated"] - 1
        for row in rows
        if abs(row["against"]["activated"] - 1) > _EQUAL
    }
    if not off:
        most = max(abs(row["against"]["activated"] - 1) for row in rows)
        return [f"Activated parameters are equal to {first}'s within {most:.1%}."]
    told = ", ".join(f"{name} {share:+.1%}" for name, share in off.items())
    return [
        "Activated parameters, routers and predictors included, are NOT equal to "
        f"{first}'s: {told}."
    ]


def _load_tables(rows: list[dict]) -> list[str]:
    sparse = [row for row in rows if row["load"]]
    if not sparse:
        return []
    layers = len(sparse[0]["load"]["busiest_by_layer"])
    tenths = len(sparse[0]["load"]["busiest_by_time"])
    lines = ["", "The busiest expert's load over the mean, by MoE layer:", ""]
    if all(len(row["load"]["busiest_by_layer"]) == layers for row in sparse):
        head = ("router", *(f"layer {i}" for i in range(layers)))
        lines += table(
            head, [(row["router"], *row["load"]["busiest_by_layer"]) for row in sparse], ".2f"
        )
    head = ("router", *(f"t {i / tenths:.1f}" for i in range(tenths)))
    for title, key in (
        ("The same by time (0 noise, 1 data), mean of layers:", "busiest_by_time"),
        ("Experts a token by time, as used:", "experts_per_token_by_time"),
    ):
        lines += ["", title, ""]
        lines += table(head, [(row["router"], *row["load"][key]) for row in sparse], ".2f")
    lines += ["", "Validation loss by time:", ""]
    return lines + table(head, [(row["router"], *row["loss_by_time"]) for row in rows], ".4f")


def _confound_table(axis: str, rows: list[dict]) -> list[str]:
    field = axis.rpartition(".")[2]
    scored: dict = next((row["scores"] for row in rows if _FRECHET in row["scores"]), {})
    head = (
        field,
        "seeds",
        "steps",
        "validation loss",
        *([_frechet(scored)] if scored else []),
        "experts a token, as used",
        "busiest expert / mean",
        "parameters",
        "activated",
        "ms a step",
    )
    return table(
        head,
        [
            (
                row["value"],
                len(row["seeds"]),
                row["steps"],
                _shown(row["validation_loss"], ".5f"),
                *([_shown(row["scores"].get(_FRECHET))] if scored else []),
                _shown(row["experts_per_token"], ".3f"),
                row["load"] and f"{statistics.fmean(row['load']['busiest_by_layer']):.2f}",
                f"{row['parameters']:,}",
                f"{row['activated']:,}",
                _number(row["machine"]["ms_a_step"], ".1f"),
            )
            for row in rows
        ],
    )
