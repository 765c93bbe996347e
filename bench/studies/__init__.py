"""Comparisons of methods: one file a study, each with a ``STUDY`` that ``gossamer bench study NAME`` runs."""
