"""ScatterMoE's parallel linear layer over :func:`gossamer.grouped_matmul` and :func:`gossamer.gather_reduce`."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import (
    check_flags,
    check_floating,
    check_index,
    check_same_device,
    check_shape,
    check_widths,
)
from gossamer.integrations.scattermoe.kernels.ops import sorted_dispatch
from gossamer.ops.dispatch import dispatch
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul


def flatten_sort_count(expert_idxs: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the slots of ``expert_idxs`` by expert, stably: :func:`gossamer.dispatch` in ScatterMoE's form.

    Args:
        expert_idxs: int32 or int64 of any shape, such as ``(T, k)``; R elements. Ids of ``num_experts`` and more sort
            last and belong to no expert.
        num_experts: E.

    Returns:
        ``sorted_expert_idxs (R,)`` in the dtype of ``expert_idxs``; ``sorted_scattered_idxs (R,)`` int64, the flat slot
        of each sorted row; and ``expert_offsets (E,)`` int64, the rows up to the end of each expert.

    Raises:
        TypeError: ``expert_idxs`` holds something else.
        ValueError: ``num_experts < 1``, or (on the CPU) an id is negative.
    """
    check_index("expert_idxs", expert_idxs)
    with torch.no_grad():
        flat = expert_idxs.reshape(-1)
        routing = dispatch(flat.unsqueeze(1), num_experts)
        slots = routing.slots.long()
        return flat[slots], slots, routing.offsets[1:].long()


def parallel_linear(
    inputs: torch.Tensor,
    expert_weights: torch.Tensor,
    k: int,
    sorted_expert_idxs: torch.Tensor,
    sorted_scattered_idxs: torch.Tensor,
    expert_offsets: torch.Tensor,
    expert_biases: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> torch.Tensor:
    """Each sorted row r times its expert's matrix: ``Z[r] = X[i(r)]·W[e(r)] + b[e(r)]``, summed by gates if given.

    ``i(r)`` is r for grouped inputs, else ``sorted_scattered_idxs[r] // k``: k is the number of slots per token if
    inputs are in token order, and 1 if they are in slot order. With gates ``O[t] = Σ_j gates[t,j]·Z[t,j]``.

    Args:
        inputs: ``(R/k, C)``, or ``(R, C)`` with ``grouped_in``.
        expert_weights: ``(E, C, N)``; a transposed view of ``(E, N, C)`` is not copied.
        k: slots that share a row of ``inputs``; not read with ``grouped_in``.
        sorted_expert_idxs: ``(R,)``, as the next two from :func:`flatten_sort_count`.
        sorted_scattered_idxs: ``(R,)``.
        expert_offsets: ``(E,)``.
        expert_biases: ``(E, N)`` or None.
        gates: ``(T', k')`` floating with ``T'·k' = R``, or None.
        grouped_in: whether ``inputs`` are sorted by expert.
        grouped_out: whether the result stays sorted by expert; otherwise it is in slot order.

    Returns:
        ``(R, N)``, or ``(T', N)`` with gates; differentiable in inputs, weights, biases and gates. Rows without an
        expert are zero.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or gates with ``grouped_out``, since gates belong to slots.
    """
    check_shape("expert_weights", expert_weights, (None, None, None), "(E, C, N)")
    num_experts, inner, outer = expert_weights.shape
    check_shape("expert_offsets", expert_offsets, (num_experts,), "(E,)")
    check_index("expert_offsets", expert_offsets)
    check_index("sorted_scattered_idxs", sorted_scattered_idxs)
    check_shape("sorted_expert_idxs", sorted_expert_idxs, tuple(sorted_scattered_idxs.shape), "(R,)")
    check_flags(grouped_in=grouped_in, grouped_out=grouped_out)
    check_shape("inputs", inputs, (None, inner), "(R/k, C)")
    if expert_biases is not None:
        check_shape("expert_biases", expert_biases, (num_experts, outer), "(E, N)")
    floats = {"inputs": inputs, "expert_weights": expert_weights, "expert_biases": expert_biases, "gates": gates}
    given = {name: tensor for name, tensor in floats.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in given.items():
        check_floating(name, tensor)
    check_same_device(**given, expert_offsets=expert_offsets)
    routing = sorted_dispatch(sorted_scattered_idxs, expert_offsets, 1 if grouped_in else k)
    weight = expert_weights.transpose(1, 2)
    if gates is None:
        y = grouped_matmul(inputs, weight, routing, bias=expert_biases, x_grouped=grouped_in, y_grouped=grouped_out)
        return y.reshape(routing.num_rows, weight.shape[1])
    if grouped_out:
        raise ValueError("gates must be None with grouped_out=True: they weigh slots, which grouped rows are not in")
    check_shape("gates", gates, (None, None), "(T, k)")
    if gates.numel() != routing.num_rows:
        raise ValueError(f"gates must have one element for each of {routing.num_rows} slots, got {tuple(gates.shape)}")
    products = grouped_matmul(inputs, weight, routing, bias=expert_biases, x_grouped=grouped_in, y_grouped=True)
    return combine_slots(products, routing, gates) if gates.shape[1] else products.new_zeros(gates.shape[0], outer)


class ParallelLinear:
    """:func:`parallel_linear` under the name of ScatterMoE's autograd function; it only provides ``apply``."""

    apply = staticmethod(parallel_linear)


class ParallelExperts(nn.Module):
    """E linear maps, one of which is applied to each row: :func:`parallel_linear` with its parameters.

    Args:
        num_experts: E.
        input_size: C.
        output_size: N.
        bias: whether each expert has a bias.

    Attributes:
        weight: ``(E, N, C)``, at first normal with deviation 0.02.
        bias: ``(E, N)``, initially zero, or None.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.
    """

    def __init__(self, num_experts: int, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        check_widths(num_experts=num_experts, input_size=input_size, output_size=output_size)
        check_flags(bias=bias)
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self.num_experts = num_experts
        self.input_size = input_size
        self.output_size = output_size
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_experts={self.num_experts}, input_size={self.input_size}, output_size={self.output_size}"

    def reset_parameters(self) -> None:
        """Redraw the weight and set the bias to zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        inputs: torch.Tensor,
        k: int,
        sorted_expert_idxs: torch.Tensor,
        sorted_scattered_idxs: torch.Tensor,
        expert_offsets: torch.Tensor,
        gates: torch.Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> torch.Tensor:
        """:func:`parallel_linear` of ``inputs``."""
        return parallel_linear(
            inputs,
            self.weight.transpose(1, 2),
            k,
            sorted_expert_idxs,
            sorted_scattered_idxs,
            expert_offsets,
            expert_biases=self.bias,
            gates=gates,
            grouped_in=grouped_in,
            grouped_out=grouped_out,
        )
