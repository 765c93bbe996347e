"""Layers over compressed tables that replace torch's embeddings and batched tables, with the same call and result."""

from __future__ import annotations

import torch
from torch import nn
from torch.compiler import is_compiling

from gossamer.nn import EmbeddingBag, Table, TableBatchedEmbeddingBags
from gossamer.nn.embeddings.table_batched import feature_lists
from gossamer.ops.gather_reduce import check_offsets


class InPlace(nn.Module):
    """A table that replaces another layer and has its sizes.

    It has the methods of every table. Methods of a single kind, such as ``sparsify``, are called on :attr:`table`.
    """

    table: Table
    padding_idx: int | None

    @property
    def num_embeddings(self) -> int:
        """N."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.table.embedding_dim

    @property
    def frozen(self) -> bool:
        """Whether :meth:`freeze` was called."""
        return self.table.frozen

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``; that of ``padding_idx`` is zero."""
        rows = self.table.lookup(ids)
        if self.padding_idx is None:
            return rows
        return rows.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)

    def nbytes(self) -> int:
        """Bytes that the table holds now, optimizer state included."""
        return self.table.nbytes()

    def inference_nbytes(self) -> int:
        """Bytes that the table holds once :meth:`freeze` was called."""
        return self.table.inference_nbytes()

    def freeze(self) -> InPlace:
        """Freeze the table, in place, and return this layer around it: padding and pooling stay."""
        self.table = self.table.freeze()
        return self.eval()


class TableLookup(InPlace):
    """A table that replaces ``torch.nn.Embedding``: calling it looks up ids.

    Args:
        table: any :class:`gossamer.nn.Table`.
        padding_idx: an id whose vector is zero and gets no gradient.
    """

    def __init__(self, table: Table, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table, self.padding_idx = table, padding_idx

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The vectors ``(*input.shape, D)``."""
        return self.lookup(input)


class TableBags(InPlace):
    """A table that replaces ``torch.nn.EmbeddingBag``, with the same argument names and padding.

    Args:
        table: any :class:`gossamer.nn.Table`; with ``padding_idx`` one with ``include_last_offset``.
        padding_idx: an id that adds nothing to a bag, does not count in a mean, and gets no gradient.
        include_last_offset: whether offsets hold the end of the last bag too.
    """

    def __init__(self, table: Table, padding_idx: int | None = None, include_last_offset: bool = False) -> None:
        super().__init__()
        self.table, self.padding_idx, self.include_last_offset = table, padding_idx, include_last_offset

    @property
    def mode(self) -> str:
        """How bags are pooled."""
        return self.table.mode

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bags ``(B, D)``, as in the replaced layer."""
        if self.padding_idx is None:
            return self.table(input, offsets, per_sample_weights)
        if input.dim() == 2:
            offsets = torch.arange(0, input.numel() + 1, max(input.shape[1], 1), device=input.device)[: len(input) + 1]
        elif not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), input.shape[0])])
        ids = input.reshape(-1)
        if ids.is_cpu and not is_compiling():
            check_offsets(ids, offsets)
        # Padding is moved after the last bag, so that no size depends on its amount.
        padding = ids == self.padding_idx
        order = padding.to(torch.uint8).argsort(stable=True)
        before = torch.cat([offsets.new_zeros(1), (~padding).cumsum(0).to(offsets.dtype)])
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)[order]
        return self.table(ids[order], before[offsets.long()], weights)


class SeparateTables(nn.Module):
    """Separate tables that replace a :class:`gossamer.nn.TableBatchedEmbeddingBags`, with the same call and result.

    If offsets are on a GPU, a call reads F+1 of them on the host.

    Args:
        layer: the layer to replace.

    Attributes:
        tables: a bag for each table of the layer.
    """

    def __init__(self, layer: TableBatchedEmbeddingBags) -> None:
        super().__init__()
        self.layout, self.feature_names, self.output_dtype = layer.layout, layer.feature_names, layer.output_dtype
        options = {"include_last_offset": True, "optimizer": layer.optimizer}
        self.tables = nn.ModuleList(
            EmbeddingBag(*weight.shape, mode=pooling, _weight=weight, **options)
            for weight, pooling in zip(layer.split_embedding_weights(), self.layout.pooling, strict=True)
        )

    def own(self) -> None:
        """Give the bags that are still dense their own weights, so that the layer's storage can be freed."""
        for table in self.tables:
            if isinstance(table, EmbeddingBag):
                table.weight.data = table.weight.data.clone()

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bags of every feature ``(B, ΣD_f)``, as the layer gives them."""
        indices, offsets, per_sample_weights = feature_lists(self, indices, offsets, per_sample_weights)
        features = self.layout.num_features
        if offsets.dim() != 1 or offsets.shape[0] % features != 1 % features:
            raise ValueError(f"offsets must have shape (F·B+1,) with F={features}, got {tuple(offsets.shape)}")
        batch = (offsets.shape[0] - 1) // features
        bounds = offsets[:: max(batch, 1)].tolist() if batch else [0] * (features + 1)
        pooled = []
        for f, table in enumerate(self.layout.feature_table_map):
            part, ends = slice(bounds[f], bounds[f + 1]), offsets[f * batch : (f + 1) * batch + 1] - bounds[f]
            weights = None if per_sample_weights is None else per_sample_weights[part]
            pooled.append(self.tables[table](indices[part], ends, weights))
        result = torch.cat(pooled, 1)
        return result if self.output_dtype is None else result.to(self.output_dtype)
