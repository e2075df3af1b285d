"""A model that is handed on: its card, its check, its upload.

In: the Hugging Face folder that a run or `qlrl export` writes, the run's own record, and the
checkpoint. Out: the folder's README.md (`card.py`), `Check`s that say what holds or how to mend it
(`static.py`, `bytes.py`, `answers.py`), a repository on the hub (`push.py`). Invariants: nothing
from a config or a data file is YAML or Markdown on a card; no path, address or key of this machine
stands there; nothing is sent before the static checks hold.
Held by tests/unit/release/ and tests/integration/test_release*.py.
"""
