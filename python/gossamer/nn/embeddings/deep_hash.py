"""Embeddings without a table: a network over many hashes of an id."""

from __future__ import annotations

import math

import torch
from torch import nn

from gossamer._checks import check_index, check_positive, check_same_device, check_widths
from gossamer._parameters import factory_of
from gossamer.nn.embeddings.seeded import SeededMaps
from gossamer.nn.embeddings.table import Table, item_nbytes
from gossamer.ops.map_ids import IdMaps, map_ids

DISTRIBUTIONS = ("uniform", "normal")
NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
# Layers are Python objects: unlike one tensor that is too large, too many of them fill the memory without an error.
MAX_LAYERS = 1024


class DeepHashEmbedding(SeededMaps, Table):
    """DHE: ``e(x) = MLP(u(x))``, where the k numbers ``u(x)`` come from universal hashes ``h_j(x)`` in ``[0, m)``.

    ``u_j = 2·h_j/(m − 1) − 1``, or with ``distribution="normal"`` each two hashes give two standard normal numbers by
    the Box–Muller transform, ``√(−2 ln a)·cos 2πb`` and ``√(−2 ln a)·sin 2πb``, where a and b are ``(h + ½)/m`` of the
    two. Each hidden layer is a linear map, a norm and Mish. Size and cost do not depend on N, but every id costs one
    evaluation of the network: use it where memory is much scarcer than time. Ids may have 64 bits. A frozen table
    computes each distinct id of a call once.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        hidden_size: width of the hidden layers.
        num_hashes: k; even for ``"normal"``.
        num_layers: number of hidden layers, at most 1024.
        num_values: m.
        distribution: of the entries of ``u(x)``: ``"uniform"`` in [−1, 1] or ``"normal"``.
        norm: ``"batch"``, over all ids of a call with their repetitions, or ``"layer"``, with which a vector does not
            depend on the other ids of a call in training.
        seed: seed of the hashes; part of the state.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        layers: the network, with ordinary parameters.

    Raises:
        TypeError: a size or the seed is not an int.
        ValueError: a size is below 1, ``num_layers`` is above 1024, k is odd for ``"normal"``, or a name is unknown.

    Source: Kang et al., "Learning to Embed Categorical Features without Embedding Tables for Recommendation", KDD 2021.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        hidden_size: int,
        *,
        num_hashes: int = 1024,
        num_layers: int = 5,
        num_values: int = 1_000_000,
        distribution: str = "uniform",
        norm: str = "batch",
        seed: int = 0,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_widths(hidden_size=hidden_size, num_hashes=num_hashes)
        check_positive(num_layers=num_layers, num_values=num_values)
        if num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {num_layers}")
        if not 2 <= num_values < 2**62:
            raise ValueError(f"num_values must be in [2, 2**62), got {num_values}")
        for name, value, known in (("distribution", distribution, DISTRIBUTIONS), ("norm", norm, tuple(NORMS))):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if distribution == "normal" and num_hashes % 2:
            raise ValueError(f"num_hashes must be even for distribution='normal', got {num_hashes}")
        self.hidden_size, self.num_hashes = hidden_size, num_hashes
        self.num_values, self.distribution = num_values, distribution
        factory = factory_of(device, dtype)
        layers, inputs = [], num_hashes
        for _ in range(num_layers):
            layers += [nn.Linear(inputs, hidden_size, **factory), NORMS[norm](hidden_size, **factory), nn.Mish()]
            inputs = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, embedding_dim, **factory))
        self._keep_seed(seed, self.layers[0].weight.device)

    def _draw_maps(self, seed: int) -> None:
        self._maps = IdMaps.universal([self.num_values] * self.num_hashes, seed=seed)

    def reset_parameters(self) -> None:
        """Redraw the network's parameters."""
        self.seed.fill_(self._seed)
        for layer in self.layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """``u`` of ``ids (...)``, ``(..., k)`` in the dtype of the network."""
        return hash_features(map_ids(ids, self._maps), self.num_values, self.distribution).to(
            self.layers[0].weight.dtype
        )

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            ValueError: batch normalisation over a single id in training, or ``ids`` on another device.
        """
        check_index("ids", ids)
        check_same_device(**{"the parameters": self.layers[0].weight, "ids": ids})
        flat = ids.reshape(-1)
        if flat.numel() == 0:
            return self.layers[-1].weight.new_empty((*ids.shape, self.embedding_dim))
        if self.training and flat.numel() == 1 and isinstance(self.layers[1], nn.BatchNorm1d):
            raise ValueError("ids must be at least two in training with norm='batch', which averages over them, got 1")
        if self.frozen and not ids.is_meta and not torch.compiler.is_compiling():
            once, place = flat.unique(return_inverse=True)
            return self.layers(self.encode(once))[place].view(*ids.shape, self.embedding_dim)
        return self.layers(self.encode(flat)).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes, distribution and mode."""
        return self._repr(f"num_hashes={self.num_hashes}", f"distribution={self.distribution!r}")

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> DeepHashEmbedding:
        """The network with the widest hidden layers that fits ``nbytes`` bytes, at most the bytes of a dense table.

        ``num_hashes`` is a minimum: remaining bytes that do not suffice for wider layers go into more hashes. Raises
        the errors of :meth:`Table.from_budget`.
        """
        options |= cls._within(num_embeddings, embedding_dim, nbytes, **options)
        return cls(num_embeddings, embedding_dim, **options)

    @classmethod
    def size_within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> int:
        """As :meth:`Table.size_within`."""
        found = cls._within(num_embeddings, embedding_dim, nbytes, **options)
        return _network_nbytes(embedding_dim, found["hidden_size"], found["num_hashes"], options)

    @classmethod
    def _within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> dict[str, int]:
        """The ``hidden_size`` and ``num_hashes`` that fill a budget."""
        # The narrowest network checks the options.
        hashes = cls(num_embeddings, embedding_dim, 1, **options | {"device": "meta"}).num_hashes

        def size_of(width: int) -> int:
            return _network_nbytes(embedding_dim, width, hashes, options)

        sizes, widest = (num_embeddings, embedding_dim), max(1, math.isqrt(num_embeddings * embedding_dim))
        width = cls._largest(sizes, nbytes, (1, widest), size_of)
        if width < widest:
            # A hash is one input of the first layer; normal numbers come in pairs.
            more = (nbytes - size_of(width)) // (width * item_nbytes(options))
            hashes += more - (more % 2 if options.get("distribution") == "normal" else 0)
        return {"hidden_size": width, "num_hashes": hashes}


def _network_nbytes(embedding_dim: int, width: int, hashes: int, options: dict[str, object]) -> int:
    """Bytes of a network of hidden layers of one width with their norms, and of the seed."""
    layers = options.get("num_layers", 5)
    batch = options.get("norm", "batch") == "batch"
    # Weights, bias, and scale and shift of the norm, to which batch norms add a mean and a variance.
    numbers = (hashes + 1 + (layers - 1) * (width + 1) + layers * (4 if batch else 2)) * width
    numbers += embedding_dim * (width + 1)
    # Each batch norm counts batches in int64, the dtype of the seed.
    return numbers * item_nbytes(options) + 8 * (layers * batch + 1)


def hash_features(hashes: torch.Tensor, num_values: int, distribution: str) -> torch.Tensor:
    """Numbers of hashes ``(..., k)`` below m, in float32: see :class:`DeepHashEmbedding`."""
    if distribution == "uniform":
        return 2 * hashes.float() / (num_values - 1) - 1
    a, b = ((hashes.float() + 0.5) / num_values).unflatten(-1, (-1, 2)).unbind(-1)
    radius, angle = (-2 * a.log()).sqrt(), 2 * math.pi * b
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)
