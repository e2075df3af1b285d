"""One HTML file that shows a run, or several runs beside each other.

In: run folders (config.yaml, starts.jsonl, metrics.jsonl, rollouts/, eval/), of runs that have
ended or are going on. Out: a page of at most `MAX_BYTES` that opens from disk and loads nothing.
Invariants: a file that is missing or damaged costs its part of the page and a note, never the page;
text of a run reaches the page as data only and is shown as text. Held by tests/unit/report and, in
a real browser, tests/integration/test_report.py.
"""
