"""Measures this package: updates, log-probs, rows, packing, generation, scoring and checkpoints.

In: sizes of a model and of a batch. Out: figures ready for JSON, with the machine they were
measured on. Invariants: both sides of a comparison run interleaved in one process; models have
random weights but are otherwise the real ones. Held by tests/integration/test_bench.py.
"""
