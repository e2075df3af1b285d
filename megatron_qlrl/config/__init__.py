"""Reads settings and model folders, and refuses what does not fit, before torch is loaded.

In: a YAML file, dotted overrides, a Hugging Face folder. Out: a frozen `Config` and a `ModelShape`.
Invariant: unknown settings and unknown fields of a model are errors
(tests/unit/config/test_load.py, test_shape.py).
"""
