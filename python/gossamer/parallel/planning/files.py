"""Reads JSON files from elsewhere, and checks their values before anything is computed from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# A description of a model or of tables is a few kilobytes; a stored run with its samples is under a megabyte.
MOST_BYTES = 64 * 2**20


def read_object(path: Path) -> dict:
    """Read the object that a JSON file holds.

    Raises:
        ValueError: it cannot be read, is too large, is not JSON, or holds something else.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} must hold at most {MOST_BYTES // 2**20} MiB")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def integer(where: str, name: str, value: object, least: int, most: int) -> int:
    """Return ``value`` if it is an integer from ``least`` to ``most``; else raise, naming ``where`` and ``name``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{where}: {name} must be an integer from {least} to {most}, got {_short(value)}")
    return value


def number(where: str, name: str, value: object, least: float = 0.0) -> float:
    """Return ``value`` if it is a finite number above ``least``; else raise, naming ``where`` and ``name``."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (known and least < value <= sys.float_info.max):
        raise ValueError(f"{where}: {name} must be a finite number above {least:g}, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
