"""Comparisons of methods: one file per study, each with a ``STUDY`` that ``gossamer bench study NAME`` runs."""
