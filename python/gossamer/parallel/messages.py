"""Lists of tensors of any dtypes and sizes, sent to every rank as one message each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from gossamer.parallel.exchange import RowExchange

_WORD = 8


def words(numel: int, dtype: torch.dtype) -> int:
    """Number of 8-byte words that ``numel`` elements take in a message."""
    return -(-numel * dtype.itemsize // _WORD)


def pack(messages: Sequence[Sequence[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """One buffer of words with all messages."""
    buffer = torch.empty(sum(sizes_of(messages)), dtype=torch.int64, device=device)
    at = 0
    for message in messages:
        for part in message:
            count = words(part.numel(), part.dtype)
            if count:
                room = buffer[at : at + count]
                # Padding in the last word of a part is zeroed, so that it does not contain this process's memory.
                room[-1:].zero_()
                room.view(part.dtype)[: part.numel()].copy_(part.detach().reshape(-1))
            at += count
    return buffer


class Reader:
    """Reads the tensors of a message, in the order in which they were packed."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer, self.at = buffer, 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next tensor, a view of the message."""
        numel = 1
        for size in shape:
            numel *= size
        count = words(numel, dtype)
        part = self.buffer[self.at : self.at + count].view(dtype)[:numel].view(shape)
        self.at += count
        return part


def sizes_of(messages: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    """Words of each message."""
    return [sum(words(part.numel(), part.dtype) for part in message) for message in messages]


def send(
    messages: Sequence[Sequence[torch.Tensor]],
    received_words: Sequence[int] | None,
    group: dist.ProcessGroup,
    device: torch.device,
    label: str,
) -> list[Reader]:
    """Send a message to every rank with one collective, and return readers of the received messages.

    If ``received_words`` is None, another collective exchanges the sizes first.
    """
    sizes, buffer = sizes_of(messages), pack(messages, device)
    if received_words is None:
        exchange = RowExchange.of(sizes, group, buffer, label=label)
    else:
        exchange = RowExchange(tuple(sizes), tuple(received_words), group, dist.get_rank(group))
    received = exchange.send(buffer, label=label)
    return [Reader(part) for part in received.split(list(exchange.received_sizes))]
