"""Measuring a judge: a server by hand whose verdicts are known."""

import json
from contextlib import closing

import pytest
from judge_server import MODEL, FakeJudge, Reply, running, verdict

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import DataError, RewardError
from megatron_qlrl.reward.certify import VerdictJournal, certify, rule_alone
from megatron_qlrl.reward.extract import Answer
from megatron_qlrl.reward.pairs import read_pairs
from megatron_qlrl.reward.rules import apply_rule
from megatron_qlrl.reward.verdict import make_claim

PAIRS = [p for p in read_pairs() if p.category in ("names", "abbreviation", "negation")]
LABELS = {(p.question, p.gold, p.answer): p.label == "equivalent" for p in read_pairs()}
ASKED = [
    p
    for p in PAIRS
    if make_claim(question=p.question, gold=p.gold, prediction=p.answer) is not None
]
DIFFERENT = sum(p.label == "different" for p in ASKED)
EQUIVALENT = len(ASKED) - DIFFERENT


def label(fields):
    return LABELS[fields["question"], fields["reference"], fields["candidate"]]


def perfect(fields):
    return verdict(label(fields))


def by_rule(fields):
    answer = Answer(fields["candidate"], "")
    return verdict(apply_rule("qa", gold=fields["reference"], answer=answer))


def measure(server, path, *, repeats=2, pairs=PAIRS, **settings):
    config = JudgeConfig.model_validate(
        {"urls": [server.url], "model": MODEL, "attempts": 1, "concurrency": 8, **settings}
    )
    with closing(VerdictJournal(path, config)) as journal:
        return certify(
            config, key=None, repeats=repeats, journal=journal, pairs=pairs, pause_s=0.001
        )


def test_a_perfect_judge(tmp_path):
    with running(FakeJudge(perfect)) as server:
        result = measure(server, tmp_path / "journal")
    assert (result.false_positives.wrong, result.false_positives.of) == (0, DIFFERENT)
    assert (result.false_negatives.wrong, result.false_negatives.of) == (0, EQUIVALENT)
    assert result.no_verdict.wrong == result.unstable.wrong == 0
    assert result.mistakes == ()
    assert len(server.asked) == 2 * len(ASKED) == 2 * result.repeated
    assert result.verdicts_per_s and result.verdicts_per_s > 1
    unasked = result.total("different").unasked + result.total("equivalent").unasked
    assert unasked == len(PAIRS) - len(ASKED) > 0


def test_a_judge_that_says_yes_to_everything(tmp_path):
    with running(FakeJudge(lambda fields: verdict(True))) as server:
        result = measure(server, tmp_path / "journal", repeats=1)
    assert (result.false_positives.value, result.false_negatives.value) == (1.0, 0.0)
    assert len(result.mistakes) == DIFFERENT
    assert {PAIRS[n - 1].label for n in result.mistakes} == {"different"}
    assert result.repeated == 0 and result.unstable.value is None


def test_the_rule_as_a_judge_is_what_the_rule_alone_is(tmp_path):
    with running(FakeJudge(by_rule)) as server:
        result = measure(server, tmp_path / "journal", repeats=1, pairs=None)
    positives, negatives = rule_alone()
    assert result.false_positives.wrong == positives.wrong == 0
    assert positives.of > result.false_positives.of > 300  # some are not asked about
    # One equivalent pair is not asked about, and the rule does not accept it.
    assert result.false_negatives.wrong == negatives.wrong - 1
    assert result.false_negatives.of == negatives.of - 1


def test_verdicts_that_change_are_counted_as_wrong_and_unstable(tmp_path):
    seen = []

    def wavering(fields):
        """Wrong about the first pair of names, the second time."""
        first = fields["candidate"] == "Friedrich von Hagenau"
        seen.append(first)
        return verdict(label(fields) != (first and seen.count(True) == 2))

    with running(FakeJudge(wavering)) as server:
        result = measure(server, tmp_path / "journal")
    assert result.unstable.wrong == result.false_negatives.wrong == 1
    names = result.categories["names"].equivalent
    assert (names.wrong, names.no_verdict) == (1, 0)
    assert [PAIRS[n - 1].answer for n in result.mistakes] == ["Friedrich von Hagenau"]


def test_what_has_no_verdict_is_in_no_rate_and_is_asked_for_again(tmp_path):
    def chats(fields):
        return Reply("I think so.") if fields["candidate"] == "WHO" else perfect(fields)

    with running(FakeJudge(chats)) as server:
        result = measure(server, tmp_path / "journal")
        assert result.no_verdict.wrong == 1
        assert result.false_negatives.of == EQUIVALENT - 1
        server.answer = perfect
        server.asked.clear()
        result = measure(server, tmp_path / "journal")
    assert server.candidates == ["WHO", "WHO"]
    assert (result.no_verdict.wrong, result.false_negatives.of) == (0, EQUIVALENT)


def test_a_command_that_was_killed_goes_on(tmp_path):
    journal = tmp_path / "journal"
    with running(FakeJudge(perfect)) as server:
        whole = measure(server, journal, repeats=1)
        journal.write_bytes(journal.read_bytes()[:-5])  # killed while it wrote the last line
        server.asked.clear()
        again = measure(server, journal, repeats=1)
        assert len(server.asked) == 1
        assert again.categories == whole.categories
        server.asked.clear()
        known = measure(server, journal, repeats=1)
        assert server.asked == []
        assert known.verdicts_per_s is None
        # Another model is another judge.
        measure(server, journal, repeats=1, model="other")
        assert len(server.asked) == len(ASKED)


def test_another_server_is_another_judge(tmp_path):
    journal = tmp_path / "journal"
    with running(FakeJudge(perfect)) as server:
        measure(server, journal, repeats=1)
    with running(FakeJudge(perfect)) as server:
        measure(server, journal, repeats=1)
        assert len(server.asked) == len(ASKED)


def test_a_judge_without_any_verdict_gets_no_certificate(tmp_path):
    with (
        running(FakeJudge(lambda fields: Reply("YES"))) as server,
        pytest.raises(RewardError, match=rf"on any of {len(ASKED)} pairs \(.*not a verdict: 'YES'"),
    ):
        measure(server, tmp_path / "journal", repeats=1)


@pytest.mark.parametrize("line", ["hello", "{}", '{"digest": "a", "repeat": "0", "verdict": true}'])
def test_a_journal_of_something_else_is_refused(tmp_path, line):
    (tmp_path / "journal").write_text(line + "\n")
    config = JudgeConfig.model_validate({"urls": ["http://h/v1"], "model": MODEL})
    with pytest.raises(DataError, match="line 1 cannot be used"):
        VerdictJournal(tmp_path / "journal", config)


def test_the_judge_is_asked_as_in_training(tmp_path):
    """The whole request is that of `Judge`, its schema included, and holds no label."""
    with running(FakeJudge(perfect)) as server:
        measure(server, tmp_path / "journal", repeats=1)
    request = server.requests[0]
    assert request["temperature"] == 0
    assert request["response_format"]["json_schema"]["name"] == "verdict"
    assert set(json.loads(request["messages"][1]["content"])) == {
        "question", "reference", "candidate",
    }  # fmt: skip
