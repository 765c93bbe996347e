"""Plans for many devices: the time and memory that a layout of a model or of tables costs, before it is run.

:mod:`exchanges` is the alpha-beta model of collectives, :mod:`measure` fits and tests it on running processes,
:mod:`rates` reads how fast devices compute, :mod:`models` reads the sizes of a model, and :mod:`layouts` and
:mod:`tables` compute the cost of each way to spread a model or tables over the devices.
"""
