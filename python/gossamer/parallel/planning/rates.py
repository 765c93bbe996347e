"""How fast a device computes, from stored runs of ``gossamer bench --json`` on it or as given by the caller."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gossamer.parallel.planning.files import number, read_object

EXPERTS, DENSE, MEMORY, TABLES = "experts", "dense", "memory", "tables"
# For each rate: its meaning, its unit, one unit in FLOP/s or bytes/s, and the option that gives it.
MEANING = {
    EXPERTS: ("expert layers", "TFLOP/s", 1e12, "--expert-rate"),
    DENSE: ("dense products", "TFLOP/s", 1e12, "--dense-rate"),
    MEMORY: ("copies in memory", "GB/s", 1e9, "--memory-rate"),
    TABLES: ("embedding tables", "GB/s", 1e9, "--table-rate"),
}
# Memory in GB by data sheet; drivers report the same number in GiB, to within a hundredth. A GPU sold with several
# sizes of memory is not listed: its size is read from its name, such as "A100-SXM4-80GB".
SHEET_MEMORY = {
    "H100 NVL": 94, "H100": 80, "H200": 141, "B200": 180, "MI300X": 192, "MI325X": 256, "MI355X": 288,
}  # fmt: skip
WORDS = {"both": "forward and backward", "forward": "forward"}


@dataclass(frozen=True)
class Rate:
    """A speed and where it comes from.

    Attributes:
        value: FLOP/s or bytes/s.
        source: the file and the device that it was measured on, or the option that gave it.
    """

    value: float
    source: str


@dataclass(frozen=True)
class _Run:
    """One stored file that names the device.

    Attributes:
        name: name of the file.
        record: contents of the file.
        kind: the type of device whose cases count, ``"cpu"`` or ``"cuda"``.
        isa: the instruction set of a processor's kernels; ``"unknown"`` if the file does not say, ``""`` for a GPU.
    """

    name: str
    record: dict
    kind: str
    isa: str


@dataclass(frozen=True)
class _Found:
    """A rate that a run measured, with its variant and sizes."""

    run: _Run
    words: str
    sizes: dict[str, int]
    value: float


class Rates:
    """The rates of one device: those given, else those measured in a folder of stored runs.

    Args:
        folder: folder of files of ``gossamer bench --json`` and of kernel timings.
        device: part of the name of a processor or GPU in the files, in upper or lower case; ``NAME:ISA``, such as
            ``"AMD EPYC:avx2"``, takes only the runs with one instruction set.
        given: rates that replace measured ones, by name, in FLOP/s or bytes/s.

    Raises:
        ValueError: a given rate is not finite and above 0.
    """

    def __init__(self, folder: Path, device: str, given: dict[str, float] | None = None) -> None:
        self.folder, self.device = folder, device
        self.given = given or {}
        for name, value in self.given.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{MEANING[name][3]} must be finite and above 0, got {value:g}")
        self._runs: list[_Run] | None = None

    def get(
        self,
        name: str,
        *,
        dtype: str,
        direction: str,
        sizes: dict[str, int] | None = None,
        variant: str | None = None,
    ) -> Rate:
        """The rate called ``name``.

        If there are runs of several shapes, the one whose ratio to ``sizes`` is nearest to 1 counts. A large product
        and a copy are limits of the device, so for these the fastest run counts.

        Args:
            name: a key of :data:`MEANING`.
            dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
            direction: ``"forward"`` or ``"both"``.
            sizes: symbol -> size.
            variant: one of our variants, such as ``"gossamer SGD"``; by default the first.

        Raises:
            ValueError: the rate is neither given nor measured, the device has runs with several instruction sets, or a
                file holds something other than results.
        """
        meaning, unit, _, option = MEANING[name]
        if name in self.given:
            return Rate(self.given[name], option)
        found = self._found(name, dtype, direction, variant)
        if not found:
            what = {EXPERTS: f"{meaning} in {dtype}, {WORDS[direction]}", DENSE: f"{meaning} in {dtype}"}
            what[TABLES] = what[EXPERTS] + (f", of {variant}" if variant else "")
            raise ValueError(
                f"{option} must be given in {unit}: no run in {self.folder} measured {what.get(name, meaning)} "
                f"on {self.device!r}"
            )

        def distance(rate: _Found) -> float:
            return sum(
                abs(math.log(rate.sizes[key] / size)) for key, size in (sizes or {}).items() if key in rate.sizes
            )

        best = min(found, key=lambda rate: (distance(rate), -rate.value, rate.run.name))
        return Rate(best.value, f"{best.run.name}: {best.words}")

    def has(self, name: str, *, dtype: str, direction: str) -> bool:
        """Whether :meth:`get` has a rate of that name."""
        return name in self.given or bool(self._found(name, dtype, direction, None))

    def _found(self, name: str, dtype: str, direction: str, variant: str | None) -> list[_Found]:
        """The values of a rate that the device's runs measured."""
        found: list[_Found] = []
        for run in self._device_runs():
            try:
                found += _measured(run, name, dtype, direction, variant)
            except (KeyError, TypeError, AttributeError, StopIteration, IndexError, ZeroDivisionError) as error:
                raise ValueError(f"{self.folder / run.name} holds no results that can be read: {error!r}") from None
        return found

    def _device_runs(self) -> list[_Run]:
        if self._runs is not None:
            return self._runs
        wanted, _, isa = self.device.partition(":")
        runs = []
        for path in sorted(self.folder.glob("*.json")):
            record = read_object(path)
            where = record.get("environment", record)
            if not isinstance(where, dict):
                continue
            gpus = [gpu.get("name") for gpu in where.get("gpus") or [] if isinstance(gpu, dict)]
            its_isa = where.get("native_isa") or "unknown"
            if any(_named(wanted, name) for name in (*gpus, where.get("device"))):
                runs.append(_Run(path.name, record, "cuda", ""))
            elif _named(wanted, where.get("cpu")) and isa in ("", its_isa):
                runs.append(_Run(path.name, record, "cpu", its_isa))
        isas = sorted({run.isa for run in runs})
        if len(isas) > 1:
            choices = " or ".join(repr(f"{wanted}:{name}") for name in isas)
            raise ValueError(f"--device {self.device!r} fits runs with several instruction sets: choose {choices}")
        self._runs = runs
        return runs


def _named(wanted: str, name: object) -> bool:
    return isinstance(name, str) and bool(wanted) and wanted.lower() in name.lower()


def device_memory(device: str) -> float | None:
    """GiB of memory of the device of that name by its data sheet; None if it is unknown, as that of a processor."""
    words = re.findall(r"[A-Z0-9]+", device.upper())
    if "MIG" in words:
        return None
    for name, size in SHEET_MEMORY.items():
        if set(name.split()) <= set(words):
            return float(size)
    sizes = [word.removesuffix("GB") for word in words if re.fullmatch(r"[1-9][0-9]*GB", word)]
    return float(sizes[0]) if len(sizes) == 1 else None


def _measured(run: _Run, name: str, dtype: str, direction: str, chosen: str | None) -> Iterator[_Found]:
    """The values of a rate that one run measured."""
    if "kernels" in run.record:
        if dtype == "bf16":
            yield from _of_kernels(run, name, direction)
        return
    cases = [case for case in run.record.get("cases", ()) if str(case.get("device", "")).startswith(run.kind)]
    if cases and name in (DENSE, MEMORY):
        ceilings = run.record.get("ceilings") or {}
        value = ceilings.get("gemm", {}).get(dtype) if name == DENSE else ceilings.get("copy")
        if value is not None:
            words = f"a large {dtype} product" if name == DENSE else "a copy"
            yield _Found(run, words, {}, number(run.name, "ceilings", value))
        return
    for case in cases:
        wanted = ({EXPERTS: "moe", TABLES: "embedding"}[name], dtype, direction, "uniform")
        if (case["family"], case["dtype"], case["direction"], case.get("skew", "uniform")) != wanted:
            continue
        for variant in case["variants"]:
            if variant["role"] == "ours" and variant["status"] == "ok" and chosen in (None, variant["name"]):
                words = f"{case['family']} {case['shape']} {dtype}, {WORDS[direction]}, {variant['name']}"
                work = case["flops"] if name == EXPERTS else looked_up_bytes(case["sizes"])
                seconds = number(run.name, "median", variant["median"])
                yield _Found(run, words, case["sizes"], number(run.name, "rate", work / seconds))
                break


def looked_up_bytes(sizes: dict[str, int]) -> float:
    """Bytes of the rows that an embedding benchmark in fp32 looks up; a row counts as often as it is looked up."""
    return sizes["B"] * sizes["J"] * sizes.get("T", 1) * sizes["D"] * 4.0


# Kernel -> multiply-adds over R * H * I, by direction.
_FORWARD = {"up": 2, "down": 1}
_BACKWARD = {"dA": 1, "dX": 2, "dW2": 1, "dW1": 2}


def _of_kernels(run: _Run, name: str, direction: str) -> Iterator[_Found]:
    """The rates in a file of kernel timings: of the expert kernels it quotes, in sequence, and of the dense product."""
    record = run.record
    for shape, numbers in record["shapes_T_H_I_E_K"].items():
        sizes = dict(zip(("T", "H", "I", "E", "K"), numbers, strict=True))
        product = 2.0 * sizes["T"] * sizes["K"] * sizes["H"] * sizes["I"]
        if name == EXPERTS:
            kernels = _FORWARD | (_BACKWARD if direction == "both" else {})
            seconds = 0.0
            for kernel in kernels:
                quoted = record["quoted"][kernel][shape]
                timed = next(r for r in record["runs"] if r["run"] == quoted["run"])
                seconds += 1e-3 * statistics.median(timed["ms"][shape][quoted["variant"]])
            words = f"expert kernels of {shape} in a row, {WORDS[direction]}"
            yield _Found(run, words, sizes, sum(kernels.values()) * product / number(run.name, shape, seconds))
        elif name == DENSE:
            times = [t for r in record["runs"] for t in r["ms"].get(shape, {}).get("cublas", ())]
            if times:
                seconds = number(run.name, shape, 1e-3 * statistics.median(times))
                yield _Found(run, f"cuBLAS product of {shape}", sizes, 2 * product / seconds)
