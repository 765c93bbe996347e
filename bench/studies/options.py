"""Command-line options that the examples share, checked."""

from __future__ import annotations

import argparse

import torch


def check_folders(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exit with a message unless ``--data``, if given, is a folder, and ``--out`` is a folder or a new path."""
    if getattr(given, "data", None) is not None and not given.data.is_dir():
        parser.error(f"--data must be a folder, got {given.data}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, got the file {given.out}")


def choose_device(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Replace ``--device auto`` by ``cuda`` or ``cpu``; exit with a message for ``cuda`` without a CUDA device."""
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
