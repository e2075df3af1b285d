"""Starts and watches processes: ranks on this machine, a Slurm job's nodes, the judge's server.

In: a command line and a number of ranks. Out: one exit code (0, 2 for a user's mistake, 85 for a
run that was asked to stop and is saved, 128 + n after signal n) and the message of the rank that
failed. Invariants: a failure on one rank ends all ranks and its message is shown once; no process
outlives its launcher; torch is not imported, except to check a Slurm job's nodes.
Held by tests/unit/launch and tests/integration/test_slurm.py.
"""
