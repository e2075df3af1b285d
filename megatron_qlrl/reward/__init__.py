"""Scores responses against gold answers: by rules, and by an LLM judge where a rule gives 0.

In: data source, question, gold answer, response. Out: a `Score` of 0 or 1, or None (masked) if the
judge was needed and gave no verdict. Invariants: any text is scored in linear time and nothing in
it is executed; an answer that is denied, hedged or retracted scores 0; a score depends on its own
response alone; there is no reward for format.
Held by tests/unit/reward, above all the corpora of test_corpus.py and the properties of
test_properties.py.
"""
