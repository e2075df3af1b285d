"""Counts how responses reason: grounding, subgoal setting, backtracking, verification.

In: a run's rollout log, or a file of responses, and perhaps a judge server. Out: counts of each
response, means over training steps, and how far the judge and the patterns agree. Invariants: a
response without a verdict is counted as such and is in no mean; no verdict is asked for twice.
Held by tests/unit/behaviours.
"""
