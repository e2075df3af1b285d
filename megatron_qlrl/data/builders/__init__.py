"""Builds data files in verl's format: the toy task, your own documents and questions, the
held-out sets of the literature, training families from their raw parts, and synthetic tasks of any
length.

In: a seed, or a folder of texts and a JSONL file, or a set's official files. Out: parquet files
that `data.dataset` reads. Invariants: the same arguments write the same rows; a file is
written whole or not at all.
Held by tests/unit/data/builders.
"""
