"""Decides which prompts are trained on, and in which order.

In: all prompts, the phases' length limits, and the scored groups of every step. Out: the prompts
of the next batch, and metrics. Invariants: a draw depends on the seed, its number and the recorded
rewards alone, so all ranks draw the same and a resumed run draws what the first would have; no
batch holds a prompt twice. Held by tests/unit/curriculum.
"""
