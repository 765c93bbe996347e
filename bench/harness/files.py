"""Writes results as JSON and CSV, and checks beforehand that a path can be written."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

CASE_COLUMNS = ("family", "shape", "dtype", "device", "direction", "routing", "flops", "bytes", "floor_seconds")
VARIANT_COLUMNS = (
    "name", "role", "status", "error", "median", "p20", "p80", "host_seconds", "timed_by", "flops_per_second",
    "bytes_per_second", "fraction_of_ceiling", "ratio_to_dense", "peak_bytes", "message",
)  # fmt: skip


def check_file(option: str, path: Path) -> None:
    """Make sure that a file can be written, without changing it.

    Raises:
        ValueError: it cannot.
    """
    try:
        new = not path.exists()
        with path.open("a"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror or error}") from None


def check_folder(option: str, path: Path) -> None:
    """Make a folder if it is missing, and make sure that files can be written into it.

    Raises:
        ValueError: it cannot be made, or is not a folder, or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror or error}") from None
    check_file(option, path / ".gossamer")


def write_json(record: dict, path: Path) -> None:
    """Write every sample of a run. A reader sees either the old file or the whole new one."""
    text = json.dumps(record, indent=1) + "\n"
    if path.exists() and not path.is_file():  # such as /dev/stdout, which nothing can replace
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    os.replace(written, path)


def write_csv(record: dict, path: Path) -> None:
    """Write a line for each variant of each case, with a column per size."""
    symbols = list(dict.fromkeys(symbol for case in record["cases"] for symbol in case["sizes"]))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*CASE_COLUMNS, *symbols, *VARIANT_COLUMNS, "samples", "threads"])
        for case in record["cases"]:
            for variant in case["variants"]:
                writer.writerow(
                    [case[column] for column in CASE_COLUMNS]
                    + [case["sizes"].get(symbol) for symbol in symbols]
                    + [variant.get(column) for column in VARIANT_COLUMNS]
                    + [len(variant["seconds"]), record["environment"]["threads"]]
                )
