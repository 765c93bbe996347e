"""Embedding tables, one file per kind of table."""
