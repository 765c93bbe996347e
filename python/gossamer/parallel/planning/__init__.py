"""Plans for many devices: what a layout of a model or of tables costs in time and memory, before it is run.

:mod:`exchanges` is the alpha-beta model of collectives, :mod:`measure` fits and tests it on running processes,
:mod:`rates` reads how fast devices compute, :mod:`models` reads what is to be spread, and :mod:`layouts` and
:mod:`tables` price the ways to spread it.
"""
