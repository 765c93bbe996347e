"""Benchmarks over several processes; ``gossamer bench parallel`` runs them."""
