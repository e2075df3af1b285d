"""The model being trained: attention over pieces, log-probs without logits, loss, update.

In: packed rows. Out: log-probs, and updated weights with metrics. Invariants: the gradient does not
depend on the layout or on how rows are packed (tests/dist_cpu/test_policy_parity.py,
test_sharing.py), and no tensor has [tokens, vocabulary] elements
(tests/unit/policy/test_logprobs.py).
"""
