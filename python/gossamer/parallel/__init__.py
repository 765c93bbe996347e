"""Experts and tables over several processes, on torch.distributed.

It runs on the process groups, DeviceMesh and DTensor of torch.distributed: gloo on CPUs, NCCL on GPUs.
"""

from gossamer.parallel.exchange import Flow, Pending, RowExchange, Traffic, count_traffic

__all__ = ["Flow", "Pending", "RowExchange", "Traffic", "count_traffic"]
