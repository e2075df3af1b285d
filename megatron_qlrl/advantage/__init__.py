"""Rewards -> advantages, group by group.

In: `ScoredGroup`. Out: `TrainGroup`. Invariant: a response without a verdict counts in no statistic
and is not trained on (tests/unit/advantage/).
"""
