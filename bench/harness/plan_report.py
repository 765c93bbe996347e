"""Shows plans of layouts, as plain values for JSON and on the terminal."""

from __future__ import annotations

from dataclasses import asdict

import rich.console

from gossamer.bench.harness.report import say
from gossamer.bench.harness.text import digits, named_table
from gossamer.parallel.planning import layouts, models, tables
from gossamer.parallel.planning.exchanges import Cluster
from gossamer.parallel.planning.rates import MEANING, Rate, Rates

GIB = 2**30


def of_model(where: str, values: dict, cluster: Cluster, rates: Rates, **work: object) -> dict:
    """The plan of a model from the values of its config; ``work`` is that of :class:`layouts.Workload`."""
    model, load = models.model_of(where, values), layouts.Workload(**work)
    found = layouts.ModelRates.of(rates, model, load)
    costs = layouts.plan(model, cluster, load, found)
    named = {"experts": found.experts, "dense": found.dense, "memory": found.memory}
    described = asdict(model) | {"parameters": model.parameters, "expert_parameters_total": model.expert_total}
    grown = layouts.growth(model, cluster, load, found)
    return _record("model", where, described, cluster, asdict(load), rates.device, named, costs, grown)


def of_tables(where: str, values: dict, cluster: Cluster, rates: Rates, **work: object) -> dict:
    """The plan of tables from their description; ``work`` is that of :class:`tables.Lookups`."""
    described, load = tables.tables_of(where, values), tables.Lookups(**work)
    rate = load.rate(rates)
    costs = tables.plan(described, cluster, load, rate)
    grown = tables.growth(described, cluster, load, rate)
    plain = {"tables": [asdict(table) for table in described]}
    record = _record("tables", where, plain, cluster, asdict(load), rates.device, {"tables": rate}, costs, grown)
    for layout, cost in zip(record["layouts"], costs, strict=True):
        layout["where"] = dict(zip(cost.layout.tables, cost.layout.where, strict=True))
    return record


def _record(
    kind: str,
    where: str,
    described: dict,
    cluster: Cluster,
    work: dict,
    device: str,
    rates: dict[str, Rate | None],
    costs: list[layouts.Cost],
    grown: list[dict],
) -> dict:
    return {
        "plan": kind,
        "config": where,
        kind: described,
        "cluster": asdict(cluster),
        "work": work,
        "device": device,
        "rates": {name: asdict(rate) for name, rate in rates.items() if rate is not None},
        "layouts": [layouts.as_json(cost) | {"fits": cost.fits(cluster)} for cost in costs],
        "growth": grown,
    }


def print_plan(console: rich.console.Console, record: dict, top: int) -> None:
    """Print the best layouts and the sources of their numbers."""
    chosen = record["layouts"][:top]
    parts = list(dict.fromkeys(part for layout in chosen for part in layout["seconds"]))
    limited = record["cluster"]["memory"] is not None
    table = named_table("layout", "step ms", *parts, "GiB", *(["fits"] if limited else []), least=12, most=40)
    for layout in chosen:
        cells = [layout["layout"], digits(1e3 * layout["step_seconds"])]
        cells += [digits(1e3 * layout["seconds"][part]) if part in layout["seconds"] else "-" for part in parts]
        cells += [digits(layout["memory_bytes"] / GIB)]
        cells += [("yes" if layout["fits"] else "no")] * limited
        table.add_row(*cells)
    console.print(table)
    for line in notes(record, len(chosen)):
        say(console, line)


def notes(record: dict, shown: int) -> list[str]:
    """The notes under the table: the problem, the cluster, the source of each rate, and the costs left out."""
    cluster, work = record["cluster"], record["work"]
    if record["plan"] == "model":
        model = record["model"]
        what = (
            f"{model['model_type']}, {model['parameters']:,} parameters, {model['expert_parameters_total']:,} of them "
            f"in {model['moe_layers']} layers of {model['experts']} experts; {work['tokens']} tokens a device"
        )
    else:
        sizes = record["tables"]["tables"]
        rows = sum(table["rows"] for table in sizes)
        what = f"{len(sizes)} tables with {rows:,} rows; {work['batch']} samples a device"
    lines = [f"{what}, {work['dtype']}, {'a training step' if work['direction'] == 'both' else 'forward'}."]
    links = [f"{_link(cluster['intra'])} within a node"]
    if cluster["inter"] is not None:
        links.append(f"{_link(cluster['inter'])} between nodes")
    limit, source = cluster["memory"], record["memory_source"]
    each = "" if limit is None else f", {digits(limit / GIB)} GiB each"
    each += f", the memory of {record['device']}" if source == "--device" else ""
    lines.append(
        f"{cluster['devices']} devices on nodes of {cluster['per_node']}{each}; a device sends {', '.join(links)}."
    )
    for name, rate in record["rates"].items():
        meaning, unit, scale, _ = MEANING[name]
        lines.append(f"{meaning}: {digits(rate['value'] / scale)} {unit} ({rate['source']}).")
    if record["plan"] == "model" and "memory" not in record["rates"]:
        lines.append("Weights take no time to read: --memory-rate was neither given nor measured.")
    fitting = sum(layout["fits"] for layout in record["layouts"])
    total = len(record["layouts"])
    if limit is None:
        lines.append("No memory limit was given: a layout may need more than a device has; --memory sets one.")
    elif not fitting:
        least = min(layout["memory_bytes"] for layout in record["layouts"])
        lines.append(
            f"No layout fits: the smallest needs {digits(least / GIB)} GiB on a device of {digits(limit / GIB)}."
        )
    count = f"{total} layouts" if limit is None else f"{fitting} of {total} layouts fit"
    lines.append(f"{count}; {shown} shown, the quickest first. Nothing overlaps in these times.")
    return lines


def _link(link: dict) -> str:
    return f"{digits(link['bandwidth'] / 1e9)} GB/s after {digits(1e6 * link['latency'])} us"
