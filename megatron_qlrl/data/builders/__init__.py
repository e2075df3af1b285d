"""Builds data files in verl's format: the toy task, and your own documents and questions.

In: a seed, or a folder of texts and a JSONL file. Out: parquet files that `data.dataset` reads.
Invariants: the same arguments write the same rows; a file is written whole or not at all.
Held by tests/unit/data/builders.
"""
