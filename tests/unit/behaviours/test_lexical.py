"""Each pattern against a sentence that shows the behaviour and one that only looks like it."""

import time

import pytest

from megatron_qlrl.behaviours.lexical import BEHAVIOURS, lexical_counts

SHOWN = {
    "grounding": (
        "According to the annual report, revenue fell.",
        "The passage clearly states that Ada signed.",
        "As mentioned in the second paragraph, it rained.",
        "Let me look at the table.",
        "It follows from Table 3.",
        "This is in the provided text.",
        "Going back through the document I see two dates.",
    ),
    "subgoal_setting": (
        "First, I need to find the year.",
        "Next, let's find the price.",
        "To answer this, we have to know the city.",
        "We need to determine who owns it.",
        "Step 2: divide.",
        "I break this down.",
    ),
    "backtracking": (
        "Wait, that is another Ada.",
        "Hmm, wait.",
        "But hold on, this is 2019.",
        "On second thought, it is Bob.",
        "Let's try a different approach.",
        "I misread the date.",
        "That\u2019s not right.",
        "This does not work.",
        "Let me reconsider.",
    ),
    "verification": (
        "Let me double-check the sum.",
        "I should verify this.",
        "To be sure, I add them.",
        "This matches the total.",
        "Let me recheck it.",
        "I plug it back in.",
    ),
}
NOT_SHOWN = (
    "Wait times were long.",
    "They wait for the bus.",
    "He was first in the race.",
    "The text was long.",
    "The bank sent a check.",
    "Section 5 applies.",
    "We need to pay.",
    "The machine will work.",
)


@pytest.mark.parametrize(
    ("behaviour", "sentence"), [(name, text) for name, texts in SHOWN.items() for text in texts]
)
def test_a_behaviour_is_seen(behaviour, sentence):
    assert lexical_counts(sentence)[behaviour] == 1, sentence
    assert lexical_counts(sentence.upper())[behaviour] == 1


@pytest.mark.parametrize("sentence", NOT_SHOWN)
def test_other_sentences_count_nothing(sentence):
    assert lexical_counts(sentence) == dict.fromkeys(BEHAVIOURS, 0)


def test_sentences_count_not_words():
    text = (
        "First, I need to find the year. According to the text it is 1901.\n"
        "Wait, wait, wait! Let me check: let me verify. It is\n"
        "1901. The report says 1902? According to Table 1, and according to the text, 1901."
    )
    assert lexical_counts(text) == {
        "grounding": 3,  # the text; the report; the last sentence, once
        "subgoal_setting": 1,
        "backtracking": 1,  # "Wait, wait, wait" is one sentence
        "verification": 1,  # one sentence with two of them
    }


def test_numbers_and_empty_text():
    assert lexical_counts("") == dict.fromkeys(BEHAVIOURS, 0)
    # A point inside a number ends no sentence.
    assert lexical_counts("Let me check 1.5 and verify 2.5 to be sure")["verification"] == 1


@pytest.mark.parametrize("text", ["wait, " * 50_000, "to answer this " * 20_000, "a " * 150_000])
def test_time_grows_with_the_length_only(text):
    start = time.perf_counter()
    lexical_counts(text)
    assert time.perf_counter() - start < 10
