"""References and other people's systems: found by import, and listed as skipped if they are absent."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from gossamer.bench.harness.case import DTYPES, PEER, Request, Variant


class Unavailable(Exception):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A reference or another system, as a family lists it in its ``peers``.

    Attributes:
        name: its name in tables; ``--peers`` takes the name, or its first words, in lower case with hyphens.
        module: the module whose import shows that it is installed; None if it needs no other package.
        package: the distribution to install.
        adapt: makes the variant of the given name and role from the arguments that the family's ``build`` passes to
            :func:`gather`; raises :class:`Unavailable` if the installed version or the shape does not serve.
        role: ``"peer"`` or ``"reference"``.
        cuda_only: whether it runs on CUDA only.
        half_only: whether it computes in 16 bits only.
    """

    name: str
    module: str | None
    package: str
    adapt: Callable[..., Variant]
    role: str = PEER
    cuda_only: bool = False
    half_only: bool = False

    @property
    def slug(self) -> str:
        """The name that ``--peers`` takes."""
        return slug(self.name)

    def unavailable(self, device: torch.device, dtype: str) -> str | None:
        """The reason why it cannot run in ``dtype`` on ``device``, or None when it can."""
        if self.module is not None:
            try:
                import_module(self.module, self.package)
            except Unavailable as reason:
                return str(reason)
        if self.cuda_only and device.type != "cuda":
            return f"{self.package} runs on CUDA only"
        if self.half_only and DTYPES.get(dtype) not in (torch.float16, torch.bfloat16):
            return f"{self.package} computes in 16 bits only"
        return None


def slug(name: str) -> str:
    """``"SonicMoE + its router"`` as ``"sonicmoe-its-router"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def import_module(name: str, package: str) -> object:
    """Import a module of another distribution.

    Raises:
        Unavailable: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        # Another package may raise any exception at import, and the rest of the run does not need it.
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == name.split(".")[0]
        raise Unavailable(
            f"{package} is not installed" if missing else f"{package} does not import: {error}"
        ) from error


def attribute(module: object, name: str, package: str) -> object:
    """An attribute of an imported module.

    Raises:
        Unavailable: this version has none.
    """
    if not hasattr(module, name):
        raise Unavailable(f"the installed {package} has no {name}")
    return getattr(module, name)


def gather(peers: Iterable[Peer], request: Request, *arguments: object) -> tuple[list[Variant], dict[str, str]]:
    """The variants of the peers that are both requested and available, and why each other one is not.

    Args:
        peers: the family's.
        request: the request that the case is built from.
        arguments: passed to each peer's ``adapt`` after its name and role.
    """
    variants, skipped = [], {}
    for peer in peers:
        if request.peers is not None and peer.name not in request.peers:
            continue
        try:
            if reason := peer.unavailable(request.device, request.dtype):
                raise Unavailable(reason)
            variants.append(replace(peer.adapt(peer.name, peer.role, *arguments), package=peer.package))
        except Unavailable as reason:
            skipped[peer.name] = str(reason)
    return variants, skipped


def choose(peers: tuple[Peer, ...], wanted: str) -> tuple[str, ...] | None:
    """The names of the peers that ``--peers`` asks for; None for all that are installed.

    Args:
        peers: the family's.
        wanted: ``"all"``, ``"none"``, or slugs between commas; ``"transformers"`` means each peer whose slug begins
            with it.

    Raises:
        ValueError: the family has no peer of that name.
    """
    if wanted == "all":
        return None
    if wanted == "none":
        return ()
    names: list[str] = []
    for word in map(slug, wanted.split(",")):
        found = [p.name for p in peers if word and f"{p.slug}-".startswith(f"{word}-")]
        if not found:
            known = ", ".join(["all", "none", *(p.slug for p in peers)])
            raise ValueError(f"--peers must be one of {known}, or several between commas, got {word!r}")
        names += found
    return tuple(dict.fromkeys(names))


def require(peers: tuple[Peer, ...], requests: Iterable[Request]) -> None:
    """Check that every peer requested by name can run in at least one of the cases.

    Raises:
        ValueError: one of them cannot.
    """
    requests = list(requests)
    for peer in peers:
        reasons = [peer.unavailable(r.device, r.dtype) for r in requests if r.peers and peer.name in r.peers]
        if reasons and all(reasons):
            raise ValueError(f"--peers {peer.slug}: {reasons[0]}")
