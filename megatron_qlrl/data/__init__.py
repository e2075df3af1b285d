"""Reads data sets, and builds them.

In: parquet files in verl's format and a tokenizer. Out: `Prompt` and `Example` records with token
ids (int32). Invariants: a row that cannot be used stops the run with its file and number, and is
never skipped; no prompt is cut for training; text in a message never becomes a control token.
Held by tests/unit/data and tests/unit/test_fuzz_readers.py.
"""
