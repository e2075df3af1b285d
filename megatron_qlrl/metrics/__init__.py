"""Collects a run's metrics, watches them, and writes them down.

In: metrics under verl's names, step by step. Out: the console line, `metrics.jsonl`, TensorBoard,
wandb, the rollout log, and the monitor's decision to skip, stop or roll back. Invariants: a step's
line is on disk before the next step begins; a resumed run continues the record at its checkpoint;
the monitors of all ranks decide the same.
Held by tests/unit/metrics and tests/dist_cpu/test_monitor.py.
"""
