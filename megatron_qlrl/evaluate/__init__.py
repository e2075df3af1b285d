"""Held-out accuracy with the engine and the scorer of training, and its comparison over runs.

In: parquet files and a `Collector`. Out: `val/...` metrics, and in <run.dir>/eval the scores and
every answer. Invariants: an evaluation that a stop interrupted is made up for at the next start
(tests/unit/evaluate/test_evaluation.py); `qlrl eval` asks for no answer twice (test_journal.py).
"""
