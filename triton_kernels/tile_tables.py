"""Tables of measured tiles: JSON that ships for measured cards, or that ``gossamer tune`` writes for the user's card.

A table is read once per device and process. It affects the speed of a launch but never its validity. An entry is used
only on the device that it was measured on, and a user's table only with the versions that it was measured with.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from gossamer._environment import version
from gossamer.triton_kernels.tiles import FORMS, ITEM_BYTES, Problem, Tile, fault, row_bucket, shared_limit

SCHEMA = 1
SHIPPED = Path(__file__).parent / "measured_tiles"
MOST_BYTES = 4 << 20
# A user's table is valid for these versions of the kernels and of Triton.
PINNED = ("gossamer", "triton")
_HEAD = ("schema", "device", "capability", "date", "versions", "commit", "command", "entries")
_SIZES = ("rows", "experts", "n", "c")
_TIMES = ("milliseconds", "default_milliseconds")


@dataclass(frozen=True)
class Device:
    """The identity of a card, by which tables are told apart.

    Attributes:
        name: its name according to the driver.
        arch: compute capability, ``10·major + minor``.
        shared: bytes of shared memory that one program may have.
    """

    name: str
    arch: int
    shared: int

    @property
    def file_name(self) -> str:
        """The name of its table."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".json"


# The device that stands for Triton's interpreter, under which launches look for no table.
INTERPRETER = Device("Triton interpreter", 80, shared_limit(80))


@dataclass(frozen=True)
class Entry:
    """A measured tile.

    Attributes:
        problem: the problem, with ``mean_rows`` rounded to its bucket.
        tile: the fastest tile.
        milliseconds: time with the tile.
        default_milliseconds: time with the tile that would be chosen without the entry, in the same run.
        source: where the figures come from, if ``gossamer tune`` did not make the table; may be empty.
    """

    problem: Problem
    tile: Tile
    milliseconds: float
    default_milliseconds: float
    source: str = ""

    def as_json(self) -> dict:
        """The entry as plain values."""
        problem = asdict(self.problem)
        problem["rows"] = int(problem.pop("mean_rows"))
        times = {name: getattr(self, name) for name in _TIMES}
        return {**problem, "tile": asdict(self.tile), **times, **({"source": self.source} if self.source else {})}


@dataclass(frozen=True)
class Source:
    """One file that may serve a device: the number of its entries, or the reason why it is ignored."""

    path: Path
    entries: tuple[Entry, ...] = ()
    fault: str | None = None


def cache_folder() -> Path:
    """The folder of the user's tables: ``$XDG_CACHE_HOME/gossamer/tiles``, or ``~/.cache/gossamer/tiles``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # By the specification a relative path there is invalid and to be ignored.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~"), ".cache")
    return root / "gossamer" / "tiles"


def cuda_device(index: int) -> Device:
    """The identity of a CUDA device."""
    found = torch.cuda.get_device_properties(index)
    arch = 10 * found.major + found.minor
    return Device(found.name, arch, getattr(found, "shared_memory_per_block_optin", 0) or shared_limit(arch))


def _source(path: Path, device: Device, pinned: bool) -> list[Source]:
    try:
        return [Source(path, tuple(read(path, device, pinned)))] if path.exists() else []
    except (OSError, ValueError) as error:
        return [Source(path, fault=str(error))]


def shipped(device: Device) -> list[Source]:
    """The table shipped for a device, or None."""
    return _source(SHIPPED / device.file_name, device, pinned=False)


def sources(device: Device) -> list[Source]:
    """The tables that exist for a device: first the one that ships, then the user's; a faulty one says why."""
    return shipped(device) + _source(cache_folder() / device.file_name, device, pinned=True)


def _warn(source: Source) -> None:
    warnings.warn(f"gossamer ignores the table of tiles {source.path}: {source.fault}", stacklevel=3)


def read_if_valid(path: Path, device: Device) -> list[Entry]:
    """The entries that a new table takes over from an old one; none, with a warning, if the old one is faulty."""
    entries = []
    for source in _source(path, device, pinned=True):
        if source.fault:
            _warn(source)
        entries += source.entries
    return entries


def table_of(device: Device) -> dict[tuple, Tile]:
    """:attr:`Problem.key` -> tile for a device; the user's entries take precedence over those that ship.

    A table that cannot be used is ignored with a warning that names the file.
    """
    table = {}
    for source in sources(device):
        if source.fault:
            _warn(source)
        table |= {entry.problem.key: entry.tile for entry in source.entries}
    return table


@functools.cache
def device_table(index: int) -> dict[tuple, Tile]:
    """The table of a CUDA device, read on first use."""
    return table_of(cuda_device(index))


def read(path: Path, device: Device, pinned: bool) -> list[Entry]:
    """Read and check a table.

    Args:
        path: the file.
        device: the device that it must have been measured on.
        pinned: whether it must have been measured with the versions that are installed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table, is for another device or other versions, or holds an invalid tile.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"its {size} bytes are more than {MOST_BYTES}")
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    _check_fields("it", stored, _HEAD)
    if stored["schema"] != SCHEMA:
        raise ValueError(f"its schema is {stored['schema']!r}, not {SCHEMA}")
    capability = f"{device.arch // 10}.{device.arch % 10}"
    if (stored["device"], stored["capability"]) != (device.name, capability):
        of = f"{stored['device']!r} of capability {stored['capability']!r}"
        raise ValueError(f"it was measured on {of}, not on {device.name!r} of capability {capability!r}")
    if not isinstance(stored["versions"], dict) or not isinstance(stored["entries"], list):
        raise ValueError("its versions must be an object and its entries a list")
    for package in PINNED if pinned else ():
        if stored["versions"].get(package) != version(package):
            then, now = stored["versions"].get(package), version(package)
            raise ValueError(f"it was measured with {package} {then}, not {now}: run gossamer tune again")
    return [_entry(f"entry {i}", value, device.shared) for i, value in enumerate(stored["entries"])]


def _check_fields(what: str, value: object, names: Iterable[str]) -> None:
    if not isinstance(value, dict) or value.keys() != set(names):
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} must have the fields {', '.join(sorted(names))}, and has {found}")


def _entry(what: str, value: object, shared: int) -> Entry:
    optional = ("source",) if isinstance(value, dict) and "source" in value else ()
    _check_fields(what, value, ("kernel", "form", "precision", *_SIZES, "tile", *_TIMES, *optional))
    kernel, form, precision = value["kernel"], value["form"], value["precision"]
    if not isinstance(kernel, str) or form not in FORMS.get(kernel, ()):
        raise ValueError(f"{what}: there is no kernel {kernel!r} of form {form!r}")
    if not isinstance(precision, str) or precision not in ITEM_BYTES:
        raise ValueError(f"{what}: precision must be one of {', '.join(ITEM_BYTES)}, got {precision!r}")
    for name in _SIZES:
        if type(value[name]) is not int or not 0 < value[name] < 2**31:
            raise ValueError(f"{what}: {name} must be a positive integer, got {value[name]!r}")
    if value["rows"] != row_bucket(value["rows"]):
        raise ValueError(f"{what}: rows must be a power of two from 16 on, got {value['rows']}")
    for name in _TIMES:
        if type(value[name]) not in (int, float) or not 0 < value[name] < math.inf:
            raise ValueError(f"{what}: {name} must be a positive number, got {value[name]!r}")
    if not isinstance(value.get("source", ""), str):
        raise ValueError(f"{what}: source must be a string, got {value['source']!r}")
    problem = Problem(kernel, form, precision, value["rows"], value["experts"], value["n"], value["c"])
    tile = _tile(what, value["tile"])
    if reason := fault(problem, tile, shared):
        raise ValueError(f"{what}: {reason}")
    return Entry(problem, tile, *(value[name] for name in _TIMES), value.get("source", ""))


def _tile(what: str, value: object) -> Tile:
    _check_fields(f"{what}: tile", value, [f.name for f in fields(Tile)])
    for name, number in value.items():
        kind = bool if name == "persistent" else int
        if type(number) is not kind:
            raise ValueError(f"{what}: tile: {name} must be of type {kind.__name__}, got {number!r}")
    return Tile(**value)


def as_json(device: Device, entries: Iterable[Entry], provenance: dict) -> dict:
    """A table as plain values.

    Args:
        device: the device measured.
        entries: the entries found.
        provenance: the fields ``date``, ``versions``, ``commit`` and ``command``.
    """
    head = {"schema": SCHEMA, "device": device.name, "capability": f"{device.arch // 10}.{device.arch % 10}"}
    return {**head, **provenance, "entries": [entry.as_json() for entry in entries]}


def check_writable(path: Path) -> None:
    """Check that :func:`write` can write; creates the folder.

    Raises:
        OSError: it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write(path: Path, table: dict) -> None:
    """Write a table atomically: a reader finds either the old file or the new one.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(table, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
