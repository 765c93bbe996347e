"""Stacks of quantised expert weights."""

import torch

from gossamer import QuantizedExpertWeight

# No tile divides N, and C has a part of a 128-block; groups need C to be a multiple of 32.
E, N, C = 4, 47, 160


def stack(weight_format, device, e=E, n=N, c=C, **options):
    weight = torch.randn(e, n, c, generator=torch.Generator().manual_seed(1)) / c**0.5
    # Rows and groups have different sizes, so that a scale taken from the wrong place is noticed.
    weight *= torch.rand(e, n, 1, generator=torch.Generator().manual_seed(2)) + 0.2
    weight *= torch.linspace(0.5, 2, c)
    return QuantizedExpertWeight.quantize(weight.to(device), weight_format, **options)
