"""Embedding tables, one file a kind."""
