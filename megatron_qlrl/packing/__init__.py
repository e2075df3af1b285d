"""Groups -> packed rows -> micro-batches.

In: `TrainGroup`. Out: `PackedRow` (a prompt once, then its responses), and `MicroBatch`, the part
of a row that a context parallel rank computes. Invariants: every response is computed exactly once,
no row is longer than the cap, and every rank finds the same plan (tests/unit/packing/).
"""
