"""Linear layers with block-sparse, low-rank and factorised weights, and the schedules that change them."""
