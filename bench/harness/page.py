"""A run as one self-contained HTML file: tables, figures, device and versions; no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from gossamer.bench.harness import plot
from gossamer.bench.harness.case import DENSE, OURS
from gossamer.bench.harness.compare import Change
from gossamer.bench.harness.text import digits

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --back: #ffffff; --panel: #f6f8fa; --line: #d9dee4;
  --grid: #d9dee4; --ours: #2f81f7; --bar: #2f81f733; --bad: #c4432b; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --back: #0d1117; --panel: #161b22;
  --line: #30363d; --grid: #30363d; --bar: #2f81f755; --bad: #ff7b6b; --good: #4cc366; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; } p { margin: .4rem 0; } .soft, figcaption { color: var(--soft); }
.lead { font-size: 1.05rem; border-left: 4px solid var(--ours); padding: .1rem 0 .1rem .8rem; margin: 1rem 0; }
section.case { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.1rem;
  margin: 0 0 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .85em; } th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; } tr.ours td { font-weight: 600; } tr.ours td:first-child { color: var(--ours); }
td.time { position: relative; min-width: 11rem; } td.time span { position: relative; }
td.time i { position: absolute; left: 0; top: 15%; bottom: 15%; background: var(--bar); border-radius: 3px; }
.wrong, .slower { color: var(--bad); } .faster { color: var(--good); } ul { margin: .5rem 0 0; padding-left: 1.1rem; }
figure { margin: 0 0 1.4rem; } figure svg { display: block; width: 100%; height: auto; max-width: 60rem; }
table.facts { width: auto; } table.facts td, table.facts th { text-align: left; white-space: normal; }
table.facts tr:last-child th { border-bottom: 0; }
"""
CAPTIONS = {
    "roofline": "What each variant reached, under the roofline of this run: a large product in the dtype, and the "
    "faster of a copy and a read. A mark above the line beat torch's own product.",
    "against-dense": "Speed over the dense baseline's, by the median ratio of the rounds.",
    "scaling": "Cost against size: medians, with the range from the 20th to the 80th percentile.",
}


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _interval(variant: dict) -> str:
    """The ends of the ratio's interval, if the results have one and it is wider than a point."""
    low, high = variant.get("ratio_interval") or (1.0, 1.0)
    return "" if low == high else f' <span class="soft">({low:.2f}–{high:.2f})</span>'


def _row(case: dict, variant: dict, slowest: float) -> str:
    error = "" if variant["error"] is None else f"{variant['error']:.1e}"
    kind = ' class="ours"' if variant["role"] == OURS else ""
    name = f"<td>{escape(variant['name'])}</td>"
    if not variant["seconds"]:
        status = f'<td class="wrong">{escape(variant["status"])}</td>'
        return f"<tr{kind}>{name}{status}{'<td></td>' * 5}<td>{error}</td></tr>"
    low, middle, high = (digits(1e3 * variant[q]) for q in ("p20", "median", "p80"))
    rate = variant["flops_per_second"] / 1e12 if case["flops"] else variant["bytes_per_second"] / 1e9
    ratio, host, peak = variant["ratio_to_dense"], variant["host_seconds"], variant["peak_bytes"]
    cells = [
        digits(rate),
        f"{100 * variant['fraction_of_ceiling']:.0f}%",
        "" if ratio is None else f"{ratio:.2f}{_interval(variant)}",
        "" if host is None else digits(1e3 * host),
        "" if peak is None else digits(peak / 2**20),
        error,
    ]
    bar = f'<i style="width:{100 * variant["median"] / slowest:.1f}%"></i>'
    time = f'<td class="time">{bar}<span>{middle} <span class="soft">({low}–{high})</span></span></td>'
    return f"<tr{kind}>{name}{time}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _names(case: dict, method: str) -> str:
    return ", ".join(v["name"] for v in case["variants"] if v["seconds"] and v["timed_by"] == method)


def _case(case: dict) -> str:
    rate = "TFLOP/s" if case["flops"] else "GB/s"
    head = ("variant", "ms (p20–p80)", rate, "attainable", "×dense (90%)", "host ms", "peak MiB", "error")
    slowest = max((v["median"] for v in case["variants"] if v["seconds"]), default=1.0)
    notes = [f"{v['name']}: {v['message']}" for v in case["variants"] if v["message"]]
    for reason in dict.fromkeys(case["skipped"].values()):
        names = ", ".join(name for name, why in case["skipped"].items() if why == reason)
        notes.append(f"skipped {names}: {reason}")
    notes.append(f"checked against float64: {case['checked']}")
    methods = dict.fromkeys(v["timed_by"] for v in case["variants"] if v["seconds"])
    notes += [f"timed by {method}{': ' + _names(case, method) if len(methods) > 1 else ''}" for method in methods]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    table = _table(head, [_row(case, v, slowest) for v in case["variants"]])
    return f'<section class="case"><h3>{escape(case["title"])}</h3>{table}<ul class="soft">{listed}</ul></section>'


def _changes(changes: list[Change], differences: list[str], earlier: str) -> str:
    rows = [
        f"<tr><td>{escape(c.case)}</td><td>{escape(c.variant)}</td><td>{digits(1e3 * c.then[1])}</td>"
        f"<td>{digits(1e3 * c.now[1])}</td><td>{100 * (c.ratio - 1):+.1f}%</td>"
        f'<td class="{c.verdict}">{c.verdict}</td></tr>'
        for c in changes
    ]
    table = _table(("case", "variant", "ms then", "ms now", "change", ""), rows) if rows else "<p>No row in common.</p>"
    warned = "".join(f"<li>{escape(line)}</li>" for line in differences)
    warning = f'<p class="wrong">Measured under different conditions:</p><ul>{warned}</ul>' if warned else ""
    return f"<h2>Against {escape(earlier)}</h2>{warning}{table}"


def _facts(record: dict) -> str:
    env, ceilings = record["environment"], record["ceilings"]
    facts = {
        "device": ", ".join(dict.fromkeys(case["device"] for case in record["cases"])),
        "processor": f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads",
        "instructions": " ".join(env["isa"]),
        "GPUs": "; ".join(f"{g['name']}, {g['memory_bytes'] / 2**30:.0f} GiB" for g in env["gpus"]) or "none",
        "system": env["system"],
        "versions": ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version),
        "large product": ", ".join(f"{d} {rate / 1e12:.3g} TFLOP/s" for d, rate in ceilings["gemm"].items()),
        "copy": f"{ceilings['copy'] / 1e9:.3g} GB/s",
        "read": f"{ceilings['read'] / 1e9:.3g} GB/s" if ceilings["read"] else "",
        "measured": env["date"],
    }
    rows = "".join(f"<tr><th>{key}</th><td>{escape(str(value))}</td></tr>" for key, value in facts.items() if value)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def render(
    record: dict,
    sentence: str,
    *,
    changes: list[Change] | None = None,
    differences: Iterable[str] = (),
    earlier: str = "",
) -> str:
    """The page.

    Args:
        record: the run, as :meth:`gossamer.bench.harness.record.Results.as_json` gives it.
        sentence: the result of the run, in words.
        changes: changes since an earlier run; None without one.
        differences: the conditions in which the two runs differed.
        earlier: name of the earlier run.
    """
    families = ", ".join(dict.fromkeys(case["family"] for case in record["cases"]))
    sweep = f", sweep over {record['sweep']['dimension']}" if record["sweep"] else ""
    figures = []
    for name in ("scaling", "against-dense", "roofline"):
        figure = plot.FIGURES[name](record)
        if figure:
            caption = escape(CAPTIONS[name])
            figures.append(f"<figure>{plot.inline_svg(figure, name)}<figcaption>{caption}</figcaption></figure>")
    baselines = dict.fromkeys(v["name"] for case in record["cases"] for v in case["variants"] if v["role"] == DENSE)
    heading = escape(f"gossamer bench {families}{sweep}")
    parts = [
        f"<h1>{heading}</h1>",
        f'<p class="soft">{escape(record["environment"]["cpu"])} · {escape(record["environment"]["date"])}</p>',
        f'<p class="lead">{escape(sentence)}</p>' if sentence else "",
        "<h2>Figures</h2>" if figures else "",
        *figures,
        "" if changes is None else _changes(changes, list(differences), earlier),
        "<h2>Cases</h2>",
        *map(_case, record["cases"]),
        f'<p class="soft">“×dense” is the time over that of {escape(" or ".join(baselines) or "a baseline")}. '
        "“attainable” is the least time that the ceilings allow over the time taken. “host ms” is what issuing a "
        "call costs: on the CPU, a call with next to no work. “error” is the largest relative RMS error.</p>",
        "<h2>Measured on</h2>",
        _facts(record),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )
