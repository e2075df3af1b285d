"""Scores responses against gold answers: by rules, and by an LLM judge where a rule gives 0; or by
a function of the user's.

In: data source, question, gold answer, response. Out: a `Score` in [0, 1], or None (masked) if the
judge or the function was needed and gave no verdict. Invariants: any text is scored in linear time
by the rules and nothing in it is executed; an answer that is denied, hedged or retracted scores 0;
a score depends on its own response alone; there is no reward for format; a function that hangs,
crashes or lies masks its response and stops nothing else.
`certify.py` measures a judge on labelled pairs of answers, asked as in training.
Held by tests/unit/reward, above all the corpora of test_corpus.py and the properties of
test_properties.py.
"""
