"""Files of dynamic embeddings: safetensors that are written atomically and verified before use."""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from gossamer._checks import check_path


def _need_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("files of a DynamicEmbedding need the package safetensors: pip install 'gossamer[embedding]'")


def check_info(info: object) -> None:
    """``info`` must be None or a mapping that JSON can hold."""
    if info is not None and not isinstance(info, Mapping):
        raise TypeError(f"info must be a mapping or None, got {type(info).__name__}")
    try:
        json.dumps(dict(info or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"info must be representable in JSON: {error}") from None


def write(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], header: Mapping[str, object]) -> dict:
    """Replace a file atomically: the old one stays readable until the new one is complete on the disk.

    Returns:
        The header as :func:`read` will give it, with the tensors' checksums.
    """
    _need_safetensors()
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: _checksum(tensor) for name, tensor in plain.items()}
    full = json.loads(json.dumps(dict(header) | {"crc32": sums}))
    with replacing(path) as part:
        save_file(plain, part, {"gossamer": json.dumps(full | {"header_crc32": _header_checksum(full)})})
    return full


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; once the file is on disk, it replaces ``path``."""
    check_path("path", path)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _header_checksum(header: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def _checksum(tensor: torch.Tensor) -> int:
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:
        # A single element is contiguous with any stride, but can be viewed as bytes only with stride 1.
        flat = flat.clone(memory_format=torch.contiguous_format)
    return zlib.crc32(flat.view(torch.uint8).numpy())


def sync(path: Path) -> None:
    """Return once a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read tensors and header of a file of this ``kind`` that :func:`write` made.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is truncated, corrupt, or of another kind.
    """
    _need_safetensors()
    from safetensors import SafetensorError, safe_open

    check_path("path", path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("gossamer", "null"))
            if not isinstance(header, dict) or header.get("kind") != kind:
                got = header.get("kind") if isinstance(header, dict) else None
                raise ValueError(f"{path} is not a {kind} of a gossamer.nn.DynamicEmbedding (its kind is {got!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    if header.pop("header_crc32", None) != _header_checksum(header):
        raise ValueError(f"{path} is corrupt: the checksum of its header does not match")
    sums = header.get("crc32")
    wrong = [
        name for name, tensor in tensors.items() if not isinstance(sums, dict) or sums.get(name) != _checksum(tensor)
    ]
    if wrong:
        raise ValueError(f"{path} is corrupt: the checksum of {wrong[0]!r} does not match")
    return tensors, header


def check_header(header: Mapping[str, object], wanted: Mapping[str, object], what: str) -> None:
    """Check that the header has each wanted entry with the same value."""
    for name, value in wanted.items():
        if header.get(name) != value:
            raise ValueError(f"{what} is of {name}={header.get(name)!r}, but this layer has {name}={value!r}")
