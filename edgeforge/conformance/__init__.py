"""Conformance: random one-op graphs on a real runtime and on the simulator, integer by integer.

    edgeforge conformance --target T --backend ort_qnn --op add --op mul --precision w8a8 --samples 200 --keep DIR

`samplers` draws shapes and attributes per op, `cases` adds encodings and inputs (case k of an op and precision depends
on the seed and k alone), `child` keeps the runtime in a process of its own, `run` counts. ``--keep`` writes the worst
case of each row: ``<op>-<precision>.txt`` (the graph with its rounding constants) and ``.npz`` (constants, inputs,
``simulator`` and ``runtime`` codes). In Python: ``make_case(op, precision, k, seed, target)`` is case k again."""
