"""Benchmarks: every primitive and layer against float64 truth, a dense baseline, references and peers.

``gossamer bench`` runs them; from Python, call ``gossamer.bench.harness.runner.run``.
"""
