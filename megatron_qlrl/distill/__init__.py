"""`qlrl distill`: SFT rows from a teacher's correct answers; and `qlrl eval` of a model behind a
service (`endpoint.py`).

In: verl parquet files and an OpenAI-compatible server. Out: a parquet file with a `response`
column, a journal and a report. Invariant: killed and started again, no answer is lost or asked for
twice (tests/integration/test_distill.py).
"""
