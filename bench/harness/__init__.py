"""What runs, times, checks, profiles and reports benchmark cases; :mod:`gossamer.bench.harness.runner` runs them."""
