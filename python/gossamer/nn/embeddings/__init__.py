"""Embedding tables, one file per kind."""
