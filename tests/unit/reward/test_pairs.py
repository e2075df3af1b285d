"""The labelled set: large and varied enough to measure a judge, and sane."""

import json
from collections import Counter

from megatron_qlrl.reward import pairs as module
from megatron_qlrl.reward.extract import Answer
from megatron_qlrl.reward.pairs import pairs_digest, read_pairs
from megatron_qlrl.reward.rules import apply_rule
from megatron_qlrl.reward.text import normalize
from megatron_qlrl.reward.verdict import make_claim

PAIRS = read_pairs()


def test_size_and_balance():
    """Both rates get a standard error of at most 3.5 points, whatever they are."""
    labels = Counter(pair.label for pair in PAIRS)
    assert len(PAIRS) >= 500
    assert min(labels.values()) >= 200
    assert max((0.25 / n) ** 0.5 for n in labels.values()) <= 0.035


def test_every_category_has_both_labels_but_that_of_empty_answers():
    by_category = {}
    for pair in PAIRS:
        by_category.setdefault(pair.category, Counter())[pair.label] += 1
    assert len(by_category) == 20
    assert by_category.pop("empty") == {"different": 20}
    for name, own in by_category.items():
        assert min(own["equivalent"], own["different"]) >= 5, name
        assert own.total() >= 15, name


def test_no_pair_is_there_twice_and_none_is_labelled_in_two_ways():
    claims = Counter((p.question, p.gold, p.answer) for p in PAIRS)
    assert [claim for claim, n in claims.items() if n > 1] == []
    folded = {}
    for p in PAIRS:
        key = (p.question, p.gold, " ".join(p.answer.split()).casefold())
        folded.setdefault(key, set()).add(p.label)
    assert [key for key, labels in folded.items() if len(labels) > 1] == []


def test_a_question_has_one_gold():
    golds = {}
    for pair in PAIRS:
        golds.setdefault(pair.question, set()).add(pair.gold)
    assert [question for question, own in golds.items() if len(own) > 1] == []


def test_the_gold_itself_is_never_labelled_different():
    for pair in PAIRS:
        assert pair.answer != pair.gold
        if normalize(pair.gold) and normalize(pair.answer) == normalize(pair.gold):
            assert pair.label == "equivalent", pair


def test_no_rule_accepts_an_answer_that_is_labelled_different():
    accepted = [
        (p.gold, p.answer, rule)
        for p in PAIRS
        if p.label == "different"
        for rule in ("qa", "exact")
        if apply_rule(rule, gold=p.gold, answer=Answer(p.answer, ""))
    ]
    assert accepted == []


def test_most_pairs_are_such_as_reach_a_judge():
    """The rule accepts few equivalent answers, and training asks about nearly all others."""
    known = [apply_rule("qa", gold=p.gold, answer=Answer(p.answer, "")) for p in PAIRS]
    assert sum(known) <= 10
    claims = [make_claim(question=p.question, gold=p.gold, prediction=p.answer) for p in PAIRS]
    unasked = [p for p, claim in zip(PAIRS, claims, strict=True) if claim is None]
    assert 10 <= len(unasked) <= 40
    assert [p.answer for p in unasked if p.label == "equivalent"] == ["no"]


def test_the_file_is_one_json_object_a_line():
    text = module._FILE.read_text(encoding="utf-8")
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    assert {tuple(row) for row in rows} == {
        ("category", "question", "gold", "answer", "label", "reason")
    }
    assert all(row["reason"].strip() for row in rows)
    assert len(pairs_digest()) == 64
