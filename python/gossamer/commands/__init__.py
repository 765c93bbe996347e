"""The command line's commands, one per module: the command ``gossamer X`` is the function ``X`` of the module ``X``, or
``X`` is a Typer with commands of its own.

``gossamer --help`` imports every module here, so each imports what it needs when it runs.
"""
