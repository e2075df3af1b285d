"""Estimates memory and time of a run before it starts, and searches layouts that fit.

In: a phase's config, the model's shape, a number and kind of GPUs. Out: each phase's peak by part,
what does not fit, seconds by part, and the smallest change that makes it fit; with response lengths
as a distribution, a simulation of generation. Invariants: memory is counted tensor by tensor, and
what is assumed instead is a named number in `hardware.py`; nothing here imports torch or uses a
network. Held by tests/unit/plan and tests/dist_cpu/test_plan_memory.py.
"""
