"""A model that is handed on: its card.

In: the Hugging Face folder that a run or `qlrl export` writes, and the run's own record. Out: its
README.md (`card.py`). Invariants: nothing from a config or a data file is YAML or Markdown on a
card; no path, address or key of this machine stands there.
Held by tests/unit/release/ and tests/integration/test_release.py.
"""
