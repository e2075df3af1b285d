"""What both loops share: `Trainer` updates the policy, `Recorder` keeps what a run leaves on disk,
`Run` joins them with evaluation and the reasons to stop.

In: frozen bundles of parts from `build`. Out: checkpoints, logs and releases in run.dir.
Invariant: a run that is killed and started again on the same layout ends bitwise as one that was
not (tests/integration/test_resume.py, tools/chaos.py).
"""
