"""Linear-attention layers over :func:`gossamer.delta_rule`."""
