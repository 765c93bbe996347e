"""Tables that learn a representation by codes of a few shared pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gossamer import _backend
from gossamer._checks import check_index, check_number, check_positive, check_seed
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.codes import CodedRowsTable, code_bits, packed_width
from gossamer.nn.embeddings.codeword_mixture import with_mixture_gradient
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.residual_quantizer import kmeans, sampled
from gossamer.nn.embeddings.table import check_budget, item_nbytes
from gossamer.ops.embedding import graft, with_loss
from gossamer.ops.product_key_topk import product_key_search
from gossamer.optim import Optimizer

VARIANTS = ("vq", "sx")
# Maximum number of responses held at a time, and of codewords chosen for a budget, since each id is compared with all
# codewords.
_RESPONSES, _MOST_CODES = 1 << 22, 1 << 12


class ProductQuantizedEmbedding(FusedTable):
    """DPQ: a vector consists of P pieces, each one of K shared codewords; the choice of codewords is trained too.

    Training uses a dense table of queries, whose pieces ``q^p`` choose codewords ``V^p_c``:

    - ``"vq"``: the nearest, ``c = argmin_k ‖q^p − V^p_k‖²``. The query gets the gradient of the output unchanged, and
      the codewords the gradient of ``regularization·mean‖V^p_c − sg(q^p)‖²``, sg being stop-gradient, which a backward
      pass through the table adds automatically.
    - ``"sx"``: ``c = argmax_k ⟨q^p, K^p_k⟩`` with separate keys; the gradient is that of the mixture ``Σ_k
      softmax_k(⟨q^p, K^p_k⟩)·V^p_k``.

    :meth:`freeze` keeps codes, of ``⌈log2 K⌉`` bits each, and codewords, which give the same vectors bit for bit. With
    ``frequent``, ids below it choose among all K codewords and the others among the first ``rare_codes``, in fewer bits
    (MGQE); ids must then be sorted by descending frequency.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        num_codes: K.
        num_parts: P, a divisor of D.
        variant: ``"vq"`` or ``"sx"``.
        frequent: number of ids that choose among all codewords; None for all.
        rare_codes: number of codewords for the other ids.
        regularization: of ``"vq"``.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the parameters.
        dtype: of the parameters.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step on the queries into the backward pass. Codewords and
            keys are ordinary parameters.

    Attributes:
        weight: ``(N, D)``, the queries, a parameter in training only. It starts uniform in ``±1/√N``.
        codewords: ``(P, K, D/P)``, a parameter, which starts as the queries do.
        keys: ``(P, K, D/P)``, a parameter with ``"sx"`` in training.
        served: the table of codes once it is frozen, else None.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, D is not a multiple of P, K is above 65,536, ``frequent`` or ``rare_codes`` do
            not fit, or the variant or mode is unknown.

    Source: Chen et al., "Differentiable Product Quantization for End-to-End Embedding Compression", ICML 2020; Kang et
    al., "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical Features", WWW 2020.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_codes: int = 256,
        num_parts: int = 4,
        *,
        variant: str = "vq",
        frequent: int | None = None,
        rare_codes: int | None = None,
        regularization: float = 1.0,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_positive(num_codes=num_codes, num_parts=num_parts)
        if embedding_dim % num_parts:
            raise ValueError(f"embedding_dim must be a multiple of num_parts, {num_parts}, got {embedding_dim}")
        if num_codes > 2**16:
            raise ValueError(f"num_codes must be at most 65536, got {num_codes}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
        if (frequent is None) != (rare_codes is None):
            raise ValueError(f"frequent and rare_codes go together, got {frequent} and {rare_codes}")
        if frequent is not None:
            check_positive(rare_codes=rare_codes)
            if not 0 <= frequent <= num_embeddings:
                raise ValueError(f"frequent must be in [0, N] with N={num_embeddings}, got {frequent}")
            if rare_codes > num_codes:
                raise ValueError(f"rare_codes must be at most num_codes, {num_codes}, got {rare_codes}")
        check_number("regularization", regularization, least=0)
        self.num_codes, self.num_parts, self.variant = num_codes, num_parts, variant
        self.frequent, self.rare_codes, self.regularization = frequent, rare_codes, regularization
        factory = factory_of(device, dtype)
        books = (num_parts, num_codes, embedding_dim // num_parts)
        self.weight = new_parameter(num_embeddings, embedding_dim, **factory)
        self.codewords = new_parameter(*books, **factory)
        self.register_parameter("keys", new_parameter(*books, **factory) if variant == "sx" else None)
        self.served: CodedRowsTable | None = None
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Redraw the parameters and reset the optimizer."""
        bound = self.num_embeddings**-0.5
        for parameter in (self.weight, self.codewords, self.keys):
            if parameter is not None:
                torch.nn.init.uniform_(parameter, -bound, bound)
        self._reset_state()

    def _pieces(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, self.num_parts, self.embedding_dim // self.num_parts)

    def _responses(self, pieces: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The score of each codeword for each piece, ``(L, P, K)``; −∞ for codewords that an id may not choose."""
        if self.variant == "sx":
            found = torch.einsum("lpd,pkd->lpk", pieces, self.keys)
        else:
            # ‖q‖² is the same for all codewords.
            words = self.codewords
            found = 2 * torch.einsum("lpd,pkd->lpk", pieces, words) - words.square().sum(-1)
        if self.frequent is None:
            return found
        beyond = torch.arange(self.num_codes, device=ids.device) >= self.rare_codes
        return found.masked_fill((ids >= self.frequent).view(-1, 1, 1) & beyond, -torch.inf)

    def _best(self, pieces: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The codes ``(L, P)`` of the codewords with the best scores, for a part of the ids at a time to bound
        memory.
        """
        if self.frequent is None and self._searches(pieces):
            try:
                return self._searched(pieces)
            except ValueError:
                pass  # a score is not finite
        size = max(1, _RESPONSES // (self.num_parts * self.num_codes))
        if torch.compiler.is_compiling() or len(ids) <= size:
            return self._responses(pieces, ids).argmax(-1)
        parts = zip(pieces.split(size), ids.split(size), strict=True)
        return torch.cat([self._responses(some, of).argmax(-1) for some, of in parts])

    @staticmethod
    def _searches(pieces: torch.Tensor) -> bool:
        """Whether a native kernel searches for the best codewords of these pieces."""
        if torch.compiler.is_compiling() or pieces.dtype != torch.float32 or not len(pieces):
            return False
        return _backend.resolve("product_key_topk", pieces) == "native" and not pieces.is_meta

    def _searched(self, pieces: torch.Tensor) -> torch.Tensor:
        """:meth:`_best` by native searches, each over the sums of two parts' scores, which store no scores."""
        count, parts, width = pieces.shape
        keys = self.keys
        if self.variant == "vq":
            # ⟨q, V⟩ − ‖V‖²/2, as products of one more column.
            keys = torch.cat([self.codewords, self.codewords.square().sum(-1, keepdim=True) / -2], -1)
            pieces = torch.nn.functional.pad(pieces, (0, 1), value=1.0)
            width += 1
        if parts % 2:
            pieces, keys = torch.cat([pieces, pieces[:, -1:]], 1), torch.cat([keys, keys[-1:]])
        pairs = (parts + 1) // 2
        with torch.no_grad():
            _, found = product_key_search(
                pieces.reshape(count * pairs, 2 * width), keys.view(pairs, 2, self.num_codes, width), 1
            )
        codes = torch.cat([found // self.num_codes, found % self.num_codes], 1)
        return codes.view(count, 2 * pairs)[:, :parts]

    def _with_mixture_gradient(self, words: torch.Tensor, pieces: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``words (L, P, D/P)`` with the gradient of ``Σ_k softmax_k(score)·V_k``."""
        if self.frequent is None and pieces.is_cpu and len(ids):
            return with_mixture_gradient(words, pieces, self.keys, self.codewords)
        weights = self._responses(pieces, ids).softmax(-1)
        return graft(words, torch.einsum("lpk,pkd->lpd", weights, self.codewords))

    def _words(self, codes: torch.Tensor) -> torch.Tensor:
        """The codewords ``(L, P, D/P)`` of ``codes (L, P)``."""
        return self.codewords[torch.arange(self.num_parts, device=codes.device), codes]

    @torch.no_grad()
    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """The current codes ``(*ids.shape, P)`` of ``ids``."""
        if self.served is not None:
            first = torch.arange(self.num_parts, device=ids.device) * self.num_codes
            return self.served.addresses(ids).view(*ids.shape, self.num_parts) - first
        flat = ids.reshape(-1)
        pieces = self._pieces(torch.nn.functional.embedding(flat, self.weight))
        return self._best(pieces, flat).view(*ids.shape, self.num_parts)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        check_index("ids", ids)
        if self.served is not None:
            return self.served.lookup(ids)
        flat = ids.reshape(-1)
        pieces = self._pieces(self.rows("weight", flat))
        with torch.no_grad():
            codes = self._best(pieces, flat)
        words = self._words(codes)
        if self.variant == "vq":
            out = graft(words.detach(), pieces)
            if self.regularization and torch.is_grad_enabled() and words.requires_grad and flat.numel():
                distance = (words - pieces.detach()).square().sum(-1).mean()
                out = with_loss(out, self.regularization * distance)
        elif torch.is_grad_enabled():
            out = self._with_mixture_gradient(words.detach(), pieces, flat)
        else:
            out = words
        return out.reshape(*ids.shape, self.embedding_dim)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Once frozen, bags are pooled as codes are read."""
        return super()._pool(ids, *lists, **how) if self.served is None else self.served(ids, *lists)

    def inference_nbytes(self) -> int:
        """Bytes of codewords and packed codes."""
        if self.served is not None:
            return self.nbytes()
        often = self.num_embeddings if self.frequent is None else self.frequent
        codes = often * packed_width(self.num_parts, code_bits(self.num_codes))
        if often < self.num_embeddings:
            codes += (self.num_embeddings - often) * packed_width(self.num_parts, code_bits(self.rare_codes))
        return self.codewords.numel() * self.codewords.element_size() + codes

    def freeze(self) -> ProductQuantizedEmbedding:
        """Keep only codes and codewords."""
        if self.served is None:
            n, chunk = self.num_embeddings, 1 << 16
            ids = torch.arange(n, device=self.weight.device)
            codes = torch.cat([self.choose(part) for part in ids.split(chunk)])
            served = CodedRowsTable(
                n,
                self.embedding_dim,
                codes,
                [self.num_codes] * self.num_parts,
                operation="concat",
                frequent=self.frequent,
                rare_codes=self.rare_codes,
                mode=self.mode,
                include_last_offset=self.include_last_offset,
                device=self.weight.device,
                dtype=self.weight.dtype,
            )
            with torch.no_grad():
                served.weight.copy_(self.codewords.flatten(0, 1))
            self.detach_optimizer()
            self.tables = ()
            self.weight = self.codewords = self.keys = None
            self.served = served
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> ProductQuantizedEmbedding:
        """The table with the longest codes among those that fill 99 % of a budget, with up to 4096 codes per part.

        Among equally long codes, those closest to 8 bits per part are taken. Unless ``frequent`` is given, the first
        ids may get wider codes than the others, so that the table fills the budget. ``num_parts`` may be given. Raises
        the errors of :meth:`Table.from_budget`.
        """
        check_budget(nbytes)
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        given = options.pop("num_parts", None)
        splits = [given] if given else [p for p in range(1, embedding_dim + 1) if embedding_dim % p == 0]
        often, rare = options.get("frequent"), options.get("rare_codes") or 1
        word = embedding_dim * item_nbytes(options)
        best, smallest = None, math.inf
        for parts in splits:
            for bits in range(1, code_bits(_MOST_CODES) + 1):
                for served, found in _fillings(num_embeddings, nbytes, word, parts, bits, often, rare):
                    if served > nbytes:
                        smallest = min(smallest, served)
                        continue
                    order = min(served, 0.99 * nbytes), parts * bits, -abs(bits - 8), served
                    if best is None or order > best[0]:
                        best = order, found
        if best is None:
            cls._check_fits((num_embeddings, embedding_dim), nbytes, smallest)
        return cls(num_embeddings, embedding_dim, **options | best[1])

    @classmethod
    def from_table(
        cls, weight: torch.Tensor, *, nbytes: int, steps: int = 10, seed: int = 0, **options: object
    ) -> ProductQuantizedEmbedding:
        """The table for a budget, with trained weights ``(N, D)`` as queries and codewords from k-means.

        k-means uses at most 256 rows per codeword, and at most 50,000 in all.

        Args:
            weight: ``(N, D)``.
            nbytes: the budget.
            steps: number of k-means steps.
            seed: seed of the initial centroids.
            **options: of the class.

        Raises:
            ValueError: as :meth:`from_budget`.
        """
        check_positive(steps=steps)
        check_seed(seed)
        made = cls._fit_weights(weight, nbytes, options)
        with torch.no_grad():
            made.weight.copy_(weight)
            pieces = made._pieces(weight.float())
            sample = sampled(len(pieces), made.num_codes, 256, seed)
            for part in range(made.num_parts):
                points = pieces[sample.to(pieces.device), part]
                made.codewords[part] = kmeans(points, made.num_codes, steps=steps, seed=seed)[0].to(weight.dtype)
            if made.keys is not None:
                # With keys equal to the codewords, ⟨q, k⟩ chooses by direction; the nearest would need the offset
                # −‖k‖²/2.
                made.keys.copy_(made.codewords)
        return made


def _fillings(
    n: int, nbytes: int, word: int, parts: int, bits: int, often: int | None, rare: int
) -> Iterator[tuple[int, dict[str, int]]]:
    """Bytes and options of tables with ``bits`` per part and as many codewords as fit a budget, or the fewest possible.

    ``often`` is the number of ids with these codes; if it is None, tables whose first ids have wider codes follow.
    """
    wide = packed_width(parts, bits)
    frequent = n if often is None else often
    codes = frequent * wide + (n - frequent) * packed_width(parts, code_bits(rare))
    least, most = max(2 ** (bits - 1) + 1, rare), min(2**bits, max(n, 2))
    if most < least:
        return
    count = min(most, max(least, (nbytes - codes) // word))
    yield codes + count * word, {"num_parts": parts, "num_codes": count}
    if often is not None:
        return
    # Wider codes use up remaining bytes only if they take more bytes per id.
    more = next((m for m in range(bits + 1, code_bits(_MOST_CODES) + 1) if packed_width(parts, m) > wide), None)
    if more is None:
        return
    step = packed_width(parts, more) - wide
    for count in {2**more, 3 * 2**more // 4, 2 ** (more - 1) + 1}:
        left = nbytes - n * wide - count * word
        frequent = min(n - 1, left // step)
        if frequent >= 1 and max(count, 2**bits) <= n:
            served = n * wide + count * word + frequent * step
            yield served, {"num_parts": parts, "num_codes": count, "frequent": frequent, "rare_codes": 2**bits}
