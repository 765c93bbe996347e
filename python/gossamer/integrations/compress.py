"""Compress the embedding layers of any model to a common budget in bytes."""

from __future__ import annotations

import decimal
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gossamer._checks import check_flag, check_number, check_shape, check_sizes
from gossamer.integrations import surgery
from gossamer.integrations._report import CompressedTable, Compression
from gossamer.integrations.compressed_layers import SeparateTables, TableBags, TableLookup
from gossamer.nn import (
    ClusteredEmbedding,
    CompositionalEmbedding,
    DeduplicatedEmbedding,
    DeepHashEmbedding,
    DoubleHashEmbedding,
    Embedding,
    EmbeddingBag,
    FrequencyEmbedding,
    FusedTable,
    HashEmbedding,
    MaskedEmbedding,
    MixedDimensionEmbedding,
    ProductQuantizedEmbedding,
    PrunedEmbedding,
    QuantizedEmbedding,
    RandomBlockEmbedding,
    SearchedDimensionEmbedding,
    SemanticIdEmbedding,
    Table,
    TableBatchedEmbeddingBags,
    TensorTrainEmbedding,
)
from gossamer.nn.embeddings.table import check_finite

ADAPTER = "compress"
# Unused fraction of the budget at which bisecting the share of each table stops.
_SLACK = 1e-4


@dataclass(frozen=True)
class Method:
    """How an embedding layer is turned into a table.

    Attributes:
        kind: its class.
        from_table: constructor from trained weights, ``(weight, nbytes=..., **options)``; None if the table starts from
            new values.
        needs: names of required options; ``frequencies`` are looked up by the table's name.
        sized: whether ``kind.size_within`` gives the size for a budget. Otherwise the weights decide: every table gets
            the same share of its bytes, or what it needs at least.
        starting: names of options of ``from_table`` that ``kind`` does not have.
        sizing: names of options that fix a size which the budget sets otherwise, and that ``kind`` does not have.
        note: what a user has to do after the conversion, for the report.
    """

    kind: type[Table]
    from_table: Callable[..., Table] | None = None
    needs: tuple[str, ...] = ()
    sized: bool = True
    starting: tuple[str, ...] = ()
    sizing: tuple[str, ...] = ()
    note: str = ""

    @functools.cached_property
    def options(self) -> set[str]:
        """Names of the options that it takes."""
        made = [self.kind.__init__, self.kind.from_budget, *([] if self.from_table is None else [self.from_table])]
        parameters = [p for call in made for p in inspect.signature(call).parameters.values()]
        taken = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.default is not p.empty} - {"nbytes"}
        if issubclass(self.kind, FusedTable):
            taken.add("optimizer")
        return taken | {"mode", "include_last_offset", "device", "dtype", *self.needs, *self.sizing}


METHODS = {
    "clustered": Method(ClusteredEmbedding, needs=("clusters",)),
    "compositional": Method(CompositionalEmbedding),
    "deduplicated": Method(DeduplicatedEmbedding, DeduplicatedEmbedding.from_table, sized=False),
    "deep_hash": Method(DeepHashEmbedding),
    "double_hash": Method(DoubleHashEmbedding),
    "frequency": Method(FrequencyEmbedding, needs=("frequencies",)),
    "hash": Method(HashEmbedding),
    "masked": Method(MaskedEmbedding, MaskedEmbedding.from_table),
    "mixed_dimension": Method(MixedDimensionEmbedding),
    "product_quantized": Method(
        ProductQuantizedEmbedding, ProductQuantizedEmbedding.from_table, starting=("steps", "seed")
    ),
    "pruned": Method(
        PrunedEmbedding,
        PrunedEmbedding.from_table,
        note="tables are dense until sparsify() or freeze() prunes them; call sparsify() and train on before serving",
    ),
    "quantized": Method(
        QuantizedEmbedding,
        QuantizedEmbedding.from_table,
        note="codes are trained only by an optimizer in the table: pass optimizer=, unless the layers have one",
    ),
    "random_block": Method(RandomBlockEmbedding),
    "searched_dimension": Method(
        SearchedDimensionEmbedding,
        note="train alpha on validation batches, then gossamer.nn.choose_widths(tables) keeps the widths to serve",
    ),
    "semantic_id": Method(
        SemanticIdEmbedding, SemanticIdEmbedding.from_table, starting=("steps", "seed"), sizing=("codes", "num_levels")
    ),
    "tensor_train": Method(TensorTrainEmbedding),
}


def _separate(model: nn.Module) -> dict[str, tuple[nn.Module, SeparateTables]]:
    """Each group of tables that can be separated, by its path, and its separate tables; the model is not changed."""
    return {
        name: (layer, SeparateTables(layer))
        for name, layer in model.named_modules()
        if type(layer) is TableBatchedEmbeddingBags and _group_obstacle(name, layer) is None
    }


def _group_obstacle(name: str, layer: TableBatchedEmbeddingBags) -> str | None:
    if surgery.hooked(layer):
        return "it has hooks or a forward of its own"
    if not name:
        return "it is the model itself, where no table can be put in its place"
    if layer.bounds != "raise":
        return f"it has bounds={layer.bounds!r}, which tables do not compute"
    if any(rows == 0 for rows, _ in layer.layout.specs):
        return "it has a table without rows"
    return surgery.tensor_obstacle("its weights", layer.weights)


def _named_by_torch(model: nn.Module) -> set[nn.Module]:
    """Bags of TorchRec's EmbeddingBagCollection, which calls them by the names of torch.nn.EmbeddingBag's arguments."""
    collections = [
        module
        for module in model.modules()
        if any(kind.__name__ == "EmbeddingBagCollection" for kind in type(module).__mro__)
    ]
    return {bag for module in collections for bag in getattr(module, "embedding_bags", nn.ModuleDict()).values()}


def _obstacle(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a layer cannot become another table, or None when it can."""
    if isinstance(module, TableBatchedEmbeddingBags):
        return _group_obstacle(name, module) or f"{type(module).__name__} may compute something else than its base"
    if surgery.hooked(module):
        return "it has hooks or a forward of its own"
    if not name:
        return "it is the model itself, where no table can be put in its place"
    if type(module) not in (nn.Embedding, nn.EmbeddingBag, Embedding, EmbeddingBag):
        return f"{type(module).__name__} may compute something else than {type(module).__mro__[1].__name__}"
    if reason := surgery.tensor_obstacle("its weight", module.weight):
        return reason
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    holders = {id(owner) for owner in model.modules() if module.weight in set(owner._parameters.values())}
    if len(holders) > 1:
        return "its weight is shared with another module"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"it has {option}={getattr(module, option)}, which tables do not compute"
    return None


@dataclass(eq=False)
class _Field:
    """An embedding layer that becomes a table."""

    name: str
    module: nn.Module
    how: Method
    options: dict

    @property
    def nbytes(self) -> int:
        """Bytes of its weight."""
        return _weight_nbytes(self.module)

    def table(self, nbytes: int) -> Table:
        """The table that a budget gives."""
        weight = self.module.weight
        options = {"device": weight.device, "dtype": weight.dtype} | self.options
        if self.how.from_table is not None:
            return self.how.from_table(weight.detach(), nbytes=nbytes, **options)
        return self.how.kind.from_budget(*weight.shape, nbytes, **options)

    def within(self, nbytes: int) -> int:
        """Bytes that the table for a budget serves."""
        weight = self.module.weight
        options = {name: value for name, value in self.options.items() if name not in self.how.starting}
        return self.how.kind.size_within(*weight.shape, nbytes, **{"dtype": weight.dtype} | options)

    @functools.cached_property
    def smallest(self) -> int:
        """Bytes of the smallest table, taken from the error for a smaller budget."""
        try:
            return self.within(1)
        except ValueError as refusal:
            if (size := _least(refusal)) is None:
                raise
            return size

    def size(self, share: float) -> int:
        """Bytes for a share of its own bytes, at least the smallest table and at most its own bytes."""
        nbytes = max(int(share * self.nbytes), self.smallest)
        if nbytes >= self.nbytes:
            return self.nbytes
        return min(self.nbytes, self.within(nbytes))


def _least(refusal: ValueError) -> int | None:
    """The number of bytes that an error about a budget names."""
    size = re.search(r"nbytes must be at least (\d+)", str(refusal))
    return None if size is None else int(size[1])


def compress_embeddings(
    model: nn.Module,
    method: str,
    budget: float,
    *,
    frequencies: Mapping[str, torch.Tensor] | None = None,
    min_rows: int = 200,
    field_options: Mapping[str, Mapping[str, object]] | None = None,
    keep_original: bool = False,
    **options: object,
) -> Compression:
    """Replace a model's embedding layers, in place, by tables that together take ``budget`` of their bytes when served.

    Layers with fewer than ``min_rows`` rows, and those that the method would not make smaller, stay unchanged and count
    in full. All others get the same share of their bytes, the largest share with which everything fits the budget. A
    ``TableBatchedEmbeddingBags`` is taken apart into its tables, whose paths end in ``.tables.0`` and so on.

    Args:
        model: any module with ``torch.nn.Embedding`` or ``EmbeddingBag`` layers, gossamer's, or unsharded TorchRec
            collections of them.
        method: a name of ``gossamer.integrations.compress.METHODS``.
        budget: bytes of all tables when served, codes and maps included, over those of the layers now; in ``(0, 1]``.
        frequencies: number of occurrences of each id, ``(N,)``, by the layer's path in the model; for methods that need
            it.
        min_rows: layers with fewer rows are left unchanged.
        field_options: options of the class by the layer's path, such as ``clusters``.
        keep_original: whether to keep the original layers in memory, for :func:`gossamer.restore`.
        **options: of the table's class, for all layers.

    Returns:
        Bytes before, in training and when served, by layer and in all; ``print`` it.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or the method has no such option.
        ValueError: the method is unknown or lacks an option; ``budget`` is not in ``(0, 1]``, or is less than the
            method can reach (the message gives the smallest budget); ``frequencies`` do not fit; there is no layer to
            compress; the method starts from a layer's weight, and it is not finite. Nothing is changed then.
    """
    surgery.check_model(model)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_number("budget", budget)
    check_sizes(min_rows=min_rows)
    check_flag("keep_original", keep_original)
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget}")
    how = METHODS[method]
    groups = _separate(model)
    found = surgery.survey(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            or (isinstance(module, TableBatchedEmbeddingBags) and name not in groups)
        ),
        functools.partial(_obstacle, model),
    )
    layers = dict(found.chosen)
    for name, (_, apart) in groups.items():
        layers |= {f"{name}.tables.{number}": table for number, table in enumerate(apart.tables)}
    _check_names("frequencies", frequencies, layers)
    _check_names("field_options", field_options, layers)
    _check_options("options", method, options)
    for name, own in (field_options or {}).items():
        _check_options(f"field_options[{name!r}]", method, own)
    fields, left = [], []
    for name, module in layers.items():
        if module.num_embeddings < min_rows:
            left.append((name, module))
            continue
        if how.from_table is not None:
            check_finite(f"the weight of {name}", module.weight)
        own = dict(options) | dict((field_options or {}).get(name, {}))
        if "frequencies" in how.needs and name in (frequencies or {}):
            own["frequencies"] = frequencies[name]
            check_shape(f"frequencies[{name!r}]", frequencies[name], (module.num_embeddings,), "(N,)")
        if missing := [need for need in how.needs if need not in own]:
            where = "frequencies" if "frequencies" in missing else "field_options"
            raise ValueError(f"method {method!r} needs {', '.join(missing)} for {name!r}, by {where}")
        if isinstance(module, nn.EmbeddingBag):
            # A wrapper that removes padding passes all offsets to the table.
            last = module.include_last_offset or module.padding_idx is not None
            own |= {"mode": module.mode, "include_last_offset": last}
        optimizer = getattr(module, "optimizer", None)
        if optimizer is not None and issubclass(how.kind, FusedTable):
            own["optimizer"] = optimizer
        fields.append(_Field(name, module, how, own))
    if not fields:
        why = surgery.reasons(found.skipped)
        raise ValueError(
            f"model must hold embedding layers of at least min_rows={min_rows} rows, got none in "
            f"{type(model).__name__}{': ' + why if why else ''}"
        )
    small = sum(_weight_nbytes(module) for _, module in left)
    before = sum(field.nbytes for field in fields) + small
    wanted = int(budget * before) - small
    if how.sized:
        allotted = _allot(fields, wanted)
        least = before - sum(field.nbytes - field.size(0.0) for field in fields) if allotted is None else 0
        tables = None if allotted is None else {field: field.table(nbytes) for field, nbytes in allotted.items()}
    else:
        tables, least = _made_in_turn(fields, wanted)
        least += small
    if tables is None:
        least = _least_budget(least, before)
        raise ValueError(f"budget must be at least {least} for method {method!r} in this model, got {budget}")
    left += [(field.name, field.module) for field in fields if field not in tables]
    return _swap(model, method, int(budget * before), tables, left, found.skipped, keep_original, list(groups.values()))


def _check_names(argument: str, given: Mapping | None, layers: Mapping[str, nn.Module]) -> None:
    if unknown := set(given or {}) - set(layers):
        raise ValueError(f"{argument} must be of layers {', '.join(layers)}, got {', '.join(sorted(unknown))}")


def _check_options(argument: str, method: str, given: Mapping[str, object]) -> None:
    if unknown := set(given) - METHODS[method].options:
        known = ", ".join(sorted(METHODS[method].options))
        raise TypeError(f"{argument} of method {method!r} must be of {known}, got {', '.join(sorted(unknown))}")


def _least_budget(least: int, before: int) -> float:
    """A budget that gives ``least`` of ``before`` bytes, of six digits, rounded up so that it is enough."""
    context = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING)
    found = context.divide(least, before)
    # The share of bytes is cut to an integer, and so may be one short of an exact quotient.
    return float(found if int(float(found) * before) >= least else context.divide(least + 1, before))


def _weight_nbytes(module: nn.Module) -> int:
    return module.weight.numel() * module.weight.element_size()


def _allot(fields: list[_Field], wanted: int) -> dict[_Field, int] | None:
    """Bytes of each table that becomes smaller, for ``wanted`` in total; None if even the smallest tables exceed it."""

    def total(share: float) -> int:
        return sum(field.size(share) for field in fields)

    low, high = 0.0, 1.0
    if total(low) > wanted:
        return None
    while high - low > _SLACK * max(wanted, 1) / sum(field.nbytes for field in fields):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= wanted else (low, middle)
    sizes = {field: field.size(low) for field in fields}
    spare = wanted - sum(sizes.values())
    allotted = {}
    for field, nbytes in sorted(sizes.items(), key=lambda item: -item[0].nbytes):
        if nbytes < field.nbytes:
            # The remainder of rounding goes to the largest tables first.
            allotted[field] = min(nbytes + spare, field.nbytes - 1)
            spare -= field.within(allotted[field]) - nbytes
    return allotted


def _made_in_turn(fields: list[_Field], wanted: int) -> tuple[dict[_Field, Table] | None, int]:
    """Tables whose sizes are known only once they are made; or None and the least bytes that all fields need.

    If fields need more than their share, the others share the rest. Layers that would not become smaller are left out.
    """
    needed: dict[_Field, int] = {}
    while sum(needed.values()) <= wanted or len(needed) < len(fields):
        rest = wanted - sum(needed.values())
        whole = sum(field.nbytes for field in fields if field not in needed)
        tables = {}
        for field in fields:
            if needed.get(field) == field.nbytes:
                continue
            share = needed[field] if field in needed else max(rest * field.nbytes // whole, 1)
            try:
                tables[field] = field.table(share)
            except ValueError as refusal:
                if field in needed or (least := _least(refusal)) is None:
                    raise
                needed[field] = min(least, field.nbytes)
                break
        else:
            return tables, 0
    return None, sum(needed.values())


def _placed(module: nn.Module, table: Table, named: set[nn.Module]) -> nn.Module:
    """The replacement of a layer: the table itself if it has the same call as the layer, else a wrapper."""
    if not isinstance(module, nn.EmbeddingBag):
        return TableLookup(table, module.padding_idx)
    if module.padding_idx is None and module not in named:
        return table
    return TableBags(table, module.padding_idx, module.include_last_offset)


def _swap(model, method, budget, tables, left, skipped, keep_original, groups) -> Compression:
    new, rows, named = {}, [], _named_by_torch(model)
    inside = {table for _, apart in groups for table in apart.tables}
    for field, table in tables.items():
        module = field.module
        taken = _placed(module, table, named)
        taken.train(module.training)
        if module not in inside:
            surgery.mark(taken, ADAPTER, module if keep_original else None)
        new[module] = taken
        rows.append(
            CompressedTable(field.name, type(table).__name__, field.nbytes, table.nbytes(), table.inference_nbytes())
        )
    for name, module in left:
        nbytes = _weight_nbytes(module)
        rows.append(CompressedTable(name, type(module).__name__, nbytes, nbytes, nbytes))
    for layer, apart in groups:
        if any(table in new for table in apart.tables):
            surgery.substitute(apart, new)
            apart.own()
            apart.train(layer.training)
            surgery.mark(apart, ADAPTER, layer if keep_original else None)
            new[layer] = apart
    surgery.substitute(model, new)
    return Compression(method, tuple(rows), skipped, budget, METHODS[method].note)


def undo_obstacle(module: nn.Module, before: nn.Module | None) -> str | None:
    """Why a table cannot become the layer again."""
    return "was compressed without keep_original=True, so its table is gone" if before is None else None


def undo(module: nn.Module, before: nn.Module) -> nn.Module:
    """The layer that the table replaced."""
    return before
