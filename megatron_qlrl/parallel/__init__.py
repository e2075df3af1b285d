"""Process groups and collectives by name.

In: sizes of the layout. Out: a `ParallelContext`, this rank's place in it. Invariant: what fails on
one rank inside `on_all_ranks` is raised on all (tests/dist_cpu/test_collectives.py).
"""
