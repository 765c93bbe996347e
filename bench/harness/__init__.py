"""Runs, times, checks, profiles and reports benchmark cases; start reading at :mod:`gossamer.bench.harness.runner`."""
