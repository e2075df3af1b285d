import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.score import check_sources, score_group, score_response
from megatron_qlrl.types import Prompt, Rollout, Score


def make_prompt(source="musique", gold="Paris", uid="f:0"):
    return Prompt(uid, np.zeros(3, np.int32), source, "Which city?", gold)


def make_rollout(sample, text, *, finished=True):
    return Rollout("f:0", sample, np.zeros(1, np.int32), np.zeros(1, np.float32), text, finished, 0)


def score(response, *, source="musique", gold="Paris"):
    return score_response(data_source=source, ground_truth=gold, response_text=response)


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


def test_a_group_keeps_the_order_and_scores_unfinished_text_alike():
    rollouts = [
        make_rollout(0, "</think>the answer is Rome"),
        make_rollout(1, "</think>the answer is Paris", finished=False),
        make_rollout(2, "the answer is Paris", finished=False),
    ]
    group = score_group(make_prompt(), rollouts)
    assert group.rollouts == tuple(rollouts)
    assert group.rewards.tolist() == [0.0, 1.0, 0.0]


def test_unknown_sources_are_all_named_before_training():
    prompts = [make_prompt(), make_prompt("gsm8k"), make_prompt("gsm8k"), make_prompt("aime")]
    with pytest.raises(DataError, match=r"'aime' \(1 rows\), 'gsm8k' \(2 rows\).*one of: multihop"):
        check_sources(prompts)
    check_sources([make_prompt(), make_prompt("docmath")])


@given(st.text(), st.text(), st.sampled_from(["musique", "docmath", "long_toc_choices"]))
def test_any_text_gets_a_binary_reward(text, gold, source):
    got = score(f"</think>the answer is {text}", source=source, gold=gold)
    assert got.value in (0.0, 1.0)
    assert got.value == got.rule
