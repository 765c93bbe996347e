"""``gossamer info``: describes this installation."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices and which backend serves each primitive, to paste into a bug report."""
    from gossamer._environment import environment, served_by, tile_tables

    found = environment() | {"primitives": served_by(), "tiles": tile_tables()}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found["versions"].items():
        print(f"{key}: {value or 'not installed'}")
    print(f"commit: {found['commit'] or 'not a checkout'}")
    print(f"system: {found['system']}")
    print(f"cpu: {found['cpu']}, {found['cores']} cores, {found['threads']} threads")
    print(f"instructions: {' '.join(found['isa']) or 'unknown'}; native kernels use {found['native_isa'] or 'none'}")
    if missing := found["missing_isa"]:
        print(f"compiled without kernels for {missing}, the best instruction set of this processor: install it here")
    for gpu in found["gpus"]:
        print(f"gpu: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB")
    print(f"cuda: torch built for {found['cuda'] or 'none'}, {len(found['gpus'])} devices")
    for device, primitives in found["primitives"].items():
        for primitive, backends in primitives.items():
            print(f"{primitive} on {device}: {backends['serves']}")
    for line in dict.fromkeys(
        f"{name} on {device}: no, {reason}"
        for device, primitives in found["primitives"].items()
        for backends in primitives.values()
        for name, reason in backends["unavailable"].items()
    ):
        print(line)
    print(f"tiles: yours are kept in {found['tiles']['folder']}")
    for table in found["tiles"]["tables"]:
        state = f"ignored, {table['ignored']}" if table["ignored"] else f"{table['entries']} entries"
        print(f"tiles of {table['device']}: {table['path']}: {state}")
    served = {table["device"] for table in found["tiles"]["tables"] if not table["ignored"]}
    for name in dict.fromkeys(gpu["name"] for gpu in found["gpus"]):
        if name not in served:
            print(f"tiles of {name}: no table; chosen from shape and architecture")
