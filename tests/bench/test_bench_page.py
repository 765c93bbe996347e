"""The HTML report and the figures: what they hold, that nothing leaves the file, and that a browser shows it.

The browser is Debian's: ``apt-get install chromium chromium-driver``. Without it that test is skipped by name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from gossamer.bench.harness import compare, page, plot

HOSTILE = "<script>alert('peer & co')</script> $\\frac{1}{2}$"


def variant(name, role, median, flops=1e9):
    timed = {
        "seconds": [median] * 3, "median": median, "p20": 0.9 * median, "p80": 1.2 * median,
        "flops_per_second": flops / median, "bytes_per_second": 1e6 / median, "fraction_of_ceiling": 1e-3 / median,
        "ratio_to_dense": median / 0.01, "ratio_interval": (90 * median, 125 * median), "timed_by": "wall clock",
    }  # fmt: skip
    rest = {"status": "ok", "error": 1e-7, "message": "", "peak_bytes": 2**20, "host_seconds": 2e-5}
    return {"name": name, "role": role} | rest | timed


def case(sizes, dtype="fp32", direction="forward", flops=1e9, skew="uniform"):
    wrong = variant("wrong one", "peer", 1.0) | {"seconds": [], "status": "wrong", "error": 0.5, "message": "y: off"}
    wrong = {key: value for key, value in wrong.items() if key not in ("median", "p20", "p80")}
    rows = [
        variant("gossamer", "ours", 0.012, flops),
        variant("equal-FLOP dense", "dense", 0.01, flops),
        variant(HOSTILE, "peer", 0.02, flops),
        wrong,
    ]
    title = f"moe {dtype} {direction} {sizes}"
    return {
        "family": "moe", "title": title, "shape": "small", "sizes": sizes, "dtype": dtype, "device": "cpu",
        "direction": direction, "routing": "even", "skew": skew, "flops": flops, "bytes": 1e7, "floor_seconds": 1e-3,
        "checked": "all", "skipped": {"Liger": "liger-kernel is not installed"}, "variants": rows,
    }  # fmt: skip


def record(sweep=None, flops=1e9):
    cases = [
        case({"T": t}, dtype, direction, flops)
        for t in (64, 128)
        for dtype in ("fp32", "bf16")
        for direction in ("forward", "both")
    ]
    environment = {
        "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13", "triton": None}, "system": "Linux",
        "cpu": "A & B", "isa": ["avx2"], "cores": 2, "threads": 2, "gpus": [],
    }  # fmt: skip
    ceilings = {"gemm": {"fp32": 2e11, "bf16": 1e11}, "copy": 1e10, "read": 2e10, "bandwidth": 2e10}
    return {"schema": 1, "environment": environment, "ceilings": ceilings, "sweep": sweep, "cases": cases}


SWEEP = {"dimension": "tokens", "symbol": "T", "values": (64, 128)}


class Elements(HTMLParser):
    """Counts elements and keeps attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def test_page_holds_tables_figures_device_and_versions_as_escaped_text():
    change = compare.Change("moe <case>", "gossamer", (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    text = page.render(
        record(), f"All of {HOSTILE}.", changes=[change], differences=["cpu: <X> then, Y now"], earlier="<old>.json"
    )
    found = Elements(text)
    words = " ".join(found.text)
    assert found.tags["script"] == found.tags["img"] == found.tags["link"] == 0
    assert found.tags["table"] == 8 + 1 + 1 and found.tags["svg"] == found.tags["figure"] == 2
    for shown in (
        HOSTILE, "A & B, 2 cores, 2 threads", "torch 2.13", "<old>.json", "cpu: <X> then, Y now", "moe <case>",
        "+100.0%", "skipped Liger: liger-kernel is not installed", "wrong one: y: off", "20 GB/s",
    ):  # fmt: skip
        assert shown in words
    assert "triton" not in words
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert references and set(references) <= set(ids)
    outside = [v for n, v in found.attributes if re.match(r"(https?:)?//", v or "") and not n.startswith("xmlns")]
    assert outside == []


def test_sweeps_draw_cost_against_size():
    text = page.render(record(SWEEP), "")
    assert Elements(text).tags["svg"] == 2 and "sweep over tokens" in text
    figure = plot.scaling(record(SWEEP))
    assert [axis.get_title() for axis in figure.axes] == [
        f"{dtype} {words}" for dtype in ("fp32", "bf16") for words in ("forward", "forward+backward")
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["gossamer"].get_xdata()) == [64, 128]
    assert list(lines["gossamer"].get_ydata()) == pytest.approx([12, 12])
    skewed = record({"dimension": "skew", "symbol": "skew", "values": ("uniform", "one")})
    for number, one in enumerate(skewed["cases"]):
        one["skew"] = ("uniform", "one")[number // 4]
    labels = [label.get_text() for label in plot.scaling(skewed).axes[0].get_xticklabels()]
    assert labels == ["uniform", "one"]
    assert plot.scaling(record()) is None


def test_roofline_is_drawn_from_the_ceilings_of_the_run():
    figure = plot.roofline(record())
    fp32, bf16 = figure.axes
    assert (fp32.get_title(), bf16.get_title()) == ("fp32", "bf16")
    roof = fp32.lines[0]
    assert max(roof.get_ydata()) == pytest.approx(200)
    x, y = roof.get_xdata()[0], roof.get_ydata()[0]
    assert y == pytest.approx(20 * x)  # 20 GB/s, the faster of copy and read
    mark = fp32.lines[1]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == pytest.approx((100, 1 / 0.012))
    assert plot.roofline(record(flops=0.0)) is None
    bars = plot.against_dense(record()).axes[0].patches
    assert [bar.get_width() for bar in bars[:2]] == pytest.approx([0.01 / 0.012, 0.5])


def test_figures_are_written_as_files(tmp_path):
    written = plot.save(record(), tmp_path)
    assert [path.name for path in written] == [
        f"{name}.{kind}" for name in ("roofline", "against-dense") for kind in ("png", "svg")
    ]
    assert all(path.stat().st_size > 1000 for path in written)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Run by the browser in a copy of the page: what it laid out, in which colours, and what it asked the network for.
PROBE = """<script>addEventListener("load", () => {
  const size = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const body = getComputedStyle(document.body);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const found = {
    dark, ink: body.color, back: body.backgroundColor, width: innerWidth, content: document.body.scrollWidth,
    figures: [...document.querySelectorAll("figure svg")].map(size),
    tables: [...document.querySelectorAll("table")].map(size),
    axis: getComputedStyle(document.querySelector("figure svg text")).fill,
    requests: performance.getEntriesByType("resource").length,
  };
  document.body.dataset.found = JSON.stringify(found);
});</script></body>"""


def luminance(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, by the rule of WCAG 2."""
    parts = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed: apt-get install chromium chromium-driver")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_from_disk(tmp_path, dark):
    text = page.render(record(SWEEP), "Said in words.")
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", text).group()
    assert "default-src 'none'" in policy
    path = tmp_path / "report.html"
    path.write_text(text.replace(policy, "").replace("</body>", PROBE), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=1000,900 --dump-dom"
    ).split()
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [BROWSER, *flags, scheme, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    document = Elements(done.stdout)
    (found,) = (json.loads(value) for name, value in document.attributes if name == "data-found")
    assert found["dark"] == dark
    assert len(found["figures"]) == 2 and len(found["tables"]) == 9
    for width, height in found["figures"]:
        assert width > 400 and height > 150
    for width, height in found["tables"]:
        assert width > 200 and height > 50
    assert found["content"] <= found["width"] and found["requests"] == 0
    assert "Said in words." in document.text and "GFLOP/s" in " ".join(document.text)
    back = luminance(found["back"])
    assert (back < 0.1) == dark
    for color in (found["ink"], found["axis"]):
        high, low = sorted((luminance(color), back), reverse=True)
        assert (high + 0.05) / (low + 0.05) > 7
