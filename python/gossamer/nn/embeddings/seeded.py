"""Tables with random hashes, whose seed is part of their state."""

from __future__ import annotations

import torch

from gossamer._checks import check_seed


class SeededMaps(torch.nn.Module):
    """A module whose maps are derived from a seed in its state, so that a loaded table finds its rows.

    A subclass draws the maps in :meth:`_draw_maps` and ends its constructor with :meth:`_keep_seed`.

    Attributes:
        seed: ``(1,)`` int64, a buffer.
    """

    def _keep_seed(self, seed: int, device: torch.device) -> None:
        check_seed(seed)
        self._seed = seed
        self.register_buffer("seed", torch.tensor([seed], device=device))
        self._draw_maps(seed)

    def _draw_maps(self, seed: int) -> None:
        """Set the maps derived from a seed."""
        raise NotImplementedError(f"{type(self).__name__} must define _draw_maps(seed)")

    def reset_parameters(self) -> None:
        """As in the main class; also restores the seed, which uninitialised storage may have lost."""
        if "seed" in self._buffers:
            self.seed.fill_(self._seed)
        super().reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "seed" in state_dict and not self.seed.is_meta and int(self.seed) != self._seed:
            self._seed = int(self.seed)
            self._draw_maps(self._seed)
