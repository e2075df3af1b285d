import time
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import MODEL, FakeJudge, Reply, running, same_initial

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.judge import Judge
from megatron_qlrl.reward.score import Scorer, check_sources, score_response
from megatron_qlrl.types import Prompt, Score


def make_prompt(source="musique", gold="Paris", uid="f:0"):
    return Prompt(uid, np.zeros(3, np.int32), source, "Which city?", gold)


def score(response, *, source="musique", gold="Paris"):
    """By the rule alone, which is what a scorer without a judge gives."""
    found = score_response(
        data_source=source, ground_truth=gold, response_text=response, reasoning_open=True
    )
    future = Scorer(None).submit(
        data_source=source,
        question="Which city?",
        ground_truth=gold,
        response=response,
        reasoning_open=True,
    )
    assert future.result(timeout=0) == found
    return found


def test_a_right_answer_scores_one_with_its_parts():
    assert score("<think>hm</think>\nTherefore, the answer is (Paris).") == Score(
        value=1.0, rule=1.0, matched="the answer is", prediction="Paris"
    )


def test_templates_that_open_the_reasoning_leave_only_its_end():
    assert score("hm</think>the answer is Paris").value == 1.0


@pytest.mark.parametrize(
    "response",
    ["the answer is Paris", "<think>the answer is Paris", "", "<think>the answer is Paris</think>"]
    + ["<think></think>the answer is Paris</think>", "<think></think>Paris"],
)
def test_no_closed_reasoning_or_no_stated_answer_scores_zero(response):
    assert score(response) == Score(value=0.0, rule=0.0, matched="", prediction="")


def test_a_wrong_answer_is_logged_in_bounded_length():
    got = score("</think>the answer is " + "Rome " * 500)
    assert got.value == 0.0
    assert len(got.prediction) == 400


@pytest.mark.parametrize(
    ("source", "gold", "response"),
    [
        ("docmath_0_20000", "0.053", "</think>\\[\\boxed{5.3\\%}\\]"),
        ("docmath_0_20000", "1234", "</think>**Therefore, the answer is (1,234).**"),
        ("long_toc_choices_0_20000", "C", "</think>The correct answer is (C)."),
        ("toy_multihoprag", "Yes", "</think>Therefore, the answer is Yes."),
    ],
)
def test_each_source_is_scored_by_its_rule(source, gold, response):
    assert score(response, source=source, gold=gold).value == 1.0


def test_unknown_sources_are_all_named_before_training():
    prompts = [make_prompt(), make_prompt("gsm8k"), make_prompt("gsm8k"), make_prompt("aime")]
    with pytest.raises(DataError, match=r"'aime' \(1 rows\), 'gsm8k' \(2 rows\).*one of: multihop"):
        check_sources(prompts, {})
    check_sources([make_prompt(), make_prompt("docmath")], {})


@given(st.text(), st.text(), st.sampled_from(["musique", "docmath", "long_toc_choices"]))
def test_any_text_gets_a_binary_reward(text, gold, source):
    got = score(f"</think>the answer is {text}", source=source, gold=gold)
    assert got.value in (0.0, 1.0)
    assert got.value == got.rule


@contextmanager
def scoring(answer=same_initial, **settings):
    """A scorer with a judge by hand."""
    with running(FakeJudge(answer)) as server:
        config = JudgeConfig.model_validate(
            {"urls": [server.url], "model": MODEL, "attempts": 2} | settings
        )
        scorer = Scorer(Judge(config, key=None, pause_s=0.001))
        try:
            yield scorer, server
        finally:
            scorer.close()


def submit(scorer, answer, *, source="musique", gold="Paris"):
    return scorer.submit(
        data_source=source,
        question="Which city?",
        ground_truth=gold,
        response=f"<think>hm</think>the answer is {answer}",
        reasoning_open=False,
    )


def test_the_reward_is_the_larger_of_rule_and_judge():
    with scoring() as (scorer, server):
        futures = [submit(scorer, a) for a in ("Paris", "Paname", "Rome")]
        found = [f.result() for f in futures]
    assert [(s.value, s.rule, s.judge) for s in found] == [
        (1.0, 1.0, None),  # the rule's 1 needs no judge
        (1.0, 0.0, 1.0),
        (0.0, 0.0, 0.0),
    ]
    assert sorted(server.candidates) == ["Paname", "Rome"]
    assert server.asked[0]["question"] == "Which city?"
    assert server.asked[0]["reference"] == "Paris"


def test_the_judge_is_asked_only_where_it_may_be():
    with scoring(lambda _: Reply()) as (scorer, server):
        futures = [
            submit(scorer, "(B).", source="long_toc_choices_0_20000", gold="P"),
            submit(scorer, "Pear", source="toy_docqa", gold="Plum"),
            submit(scorer, ":"),
            submit(scorer, "YES YES YES"),
            submit(scorer, "x" * 1001),
            scorer.submit(
                data_source="musique",
                question="?",
                ground_truth="P",
                response="the answer is Paname, no end",
                reasoning_open=True,
            ),
        ]
        assert [f.result(timeout=0).value for f in futures] == [0.0] * 6
    assert server.asked == []


def test_without_a_verdict_a_sample_is_masked_and_never_zero():
    def answer(fields):
        return (
            Reply(status=503, body=b"busy")
            if fields["candidate"] == "Pavia"
            else same_initial(fields)
        )

    with scoring(answer) as (scorer, server):
        futures = [submit(scorer, a) for a in ("Pavia", "Paname", "Rome", "Paris")]
        found = [f.result() for f in futures]
        assert scorer.last_failure == f"{server.url}: HTTP 503 busy"
        counts = scorer.take_counts()
        assert scorer.take_counts()["asked"] == 0
    assert [s.value for s in found] == [None, 1.0, 0.0, 1.0]
    assert found[0] == Score(value=None, rule=0.0, matched="the answer is", prediction="Pavia")
    assert [counts[n] for n in ("asked", "yes", "failed", "cached")] == [3, 1, 1, 0]


def test_scores_arrive_while_others_are_still_to_come():
    """The judge works before the batch is complete: generation and scoring overlap."""
    with scoring() as (scorer, _):
        assert submit(scorer, "Paname").result(timeout=10).value == 1.0
        assert submit(scorer, "Rome").result(timeout=10).value == 0.0


def test_scores_do_not_depend_on_order_or_number_in_flight():
    answers = [f"{'PR'[n % 2]}{n}" for n in range(40)]
    found = []
    for concurrency, order in ((1, 1), (8, -1), (64, 1)):
        with scoring(concurrency=concurrency) as (scorer, _):
            futures = {a: submit(scorer, a) for a in answers[::order]}
            found.append([futures[a].result() for a in answers])
    assert found[0] == found[1] == found[2]
    assert [s.value for s in found[0]] == [1.0, 0.0] * 20


def test_close_gives_up_what_is_outstanding():
    with scoring(lambda _: Reply(wait_s=5)) as (scorer, server):
        future = submit(scorer, "Paname")
        deadline = time.monotonic() + 10
        while not server.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        scorer.close()
        assert future.cancelled() or future.exception() is not None


def test_close_without_a_question_asked():
    with scoring():
        pass
    Scorer(None).close()
