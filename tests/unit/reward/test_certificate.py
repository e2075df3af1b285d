"""Certificates: their rates by hand, and what a run demands of them."""

import json
from pathlib import Path

import pytest

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward.certificate import (
    Category,
    Certificate,
    Outcomes,
    Rate,
    certificate_table,
    check_certificate,
    read_certificate,
)
from megatron_qlrl.reward.pairs import pairs_digest
from megatron_qlrl.reward.verdict import prompt_digest

URL = "http://127.0.0.1:8000/v1"


def certificate(**fields):
    names = Category(
        equivalent=Outcomes(right=16, wrong=4, unasked=1),
        different=Outcomes(right=37, wrong=1, no_verdict=2, unasked=7),
    )
    dates = Category(equivalent=Outcomes(right=20), different=Outcomes(right=41, wrong=1))
    return Certificate(
        **{
            "model": "judge",
            "urls": (URL,),
            "prompt": prompt_digest(),
            "pairs": pairs_digest(),
            "made": "2026-01-02T03:04:05+00:00",
            "software": "megatron_qlrl 1",
            "repeats": 3,
            "categories": {"names": names, "dates": dates},
            "agreeing": 119,
            "repeated": 120,
            "verdicts_per_s": 12.34,
            "mistakes": (2, 5),
        }
        | fields
    )


def judge(file=None, **settings):
    settings |= {"urls": [URL], "model": "judge", "certificate": file and str(file)}
    return JudgeConfig.model_validate(settings)


@pytest.fixture
def write(tmp_path: Path):
    def write(**fields):
        file = tmp_path / "certificate.json"
        file.write_text(certificate(**fields).model_dump_json())
        return file

    return write


def test_wilsons_interval():
    """Values from Wilson's formula in exact arithmetic."""
    assert Rate(0, 100).interval == pytest.approx((0.0, 0.036994), abs=1e-5)
    assert Rate(5, 100).interval == pytest.approx((0.021543, 0.111751), abs=1e-5)
    assert Rate(50, 100).interval == pytest.approx((0.403832, 0.596168), abs=1e-5)
    assert Rate(10, 10).interval == pytest.approx((0.722467, 1.0), abs=1e-5)
    assert Rate(0, 0).interval == (0.0, 1.0)
    assert Rate(0, 0).value is None
    assert str(Rate(0, 0)) == "not known (0 pairs)"
    assert str(Rate(5, 100)) == "5.0% (5 of 100 pairs, 95% interval 2.2% to 11.2%)"


def test_rates_leave_out_what_has_no_verdict_and_what_is_not_asked():
    one = certificate()
    assert (one.false_positives.wrong, one.false_positives.of) == (2, 80)
    assert (one.false_negatives.wrong, one.false_negatives.of) == (4, 40)
    assert (one.no_verdict.wrong, one.no_verdict.of) == (2, 122)
    assert (one.unstable.wrong, one.unstable.of) == (1, 120)
    assert one.summary().startswith("false positives 2.5% (2 of 80 pairs, 95% interval ")
    assert one.summary().endswith(
        "no verdict on 2 of 122 pairs; measured 2026-01-02, 3 verdicts a pair"
    )


def test_the_table():
    head, names, dates, total, _, *facts = certificate_table(certificate()).splitlines()
    assert head.split() == "category equivalent wrong different wrong no verdict unasked".split()
    assert names.split() == ["names", "20", "4", "40", "1", "2", "8"]
    assert dates.split() == ["dates", "20", "0", "42", "1", "0", "0"]
    assert total.split() == ["all", "40", "4", "82", "2", "2", "8"]
    assert [fact.split("  ")[0] for fact in facts] == [
        "false positives", "false negatives", "no verdict", "unstable", "verdicts a second",
    ]  # fmt: skip
    assert facts[-1].split()[-1] == "12.3"
    assert "not known (all from the journal)" in certificate_table(certificate(verdicts_per_s=None))


def test_a_certificate_comes_back_from_its_file(write):
    assert read_certificate(write()) == certificate()


def test_a_run_that_demands_nothing_needs_no_certificate():
    check_certificate(judge(), max_no_verdict=0.1)


def test_a_good_judge_passes(write):
    check_certificate(judge(write()), max_no_verdict=0.1)
    check_certificate(judge(write(), max_false_positive=0.025), max_no_verdict=0.1)
    check_certificate(judge(write(urls=("http://other:1/v1",))), max_no_verdict=0.1)


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"max_false_positive": 0.02}, r"are 2\.5% \(2 of 80 .* more than 2\.0%"),
        ({"model": "older"}, {}, "is of the model older"),
        ({"prompt": "0" * 64}, {}, "is of another version of the judge's prompt"),
        ({"pairs": "0" * 64}, {"max_false_positive": 1.0}, "another version of the labelled pairs"),
        (
            {"categories": {"a": Category(equivalent=Outcomes(right=8),
                                          different=Outcomes(no_verdict=2))}},
            {}, r"no verdict on 2 of 10 pairs, more than reward\.max_masked_share=0\.1",
        ),
        (
            {"categories": {"a": Category(equivalent=Outcomes(right=8))}},
            {"max_false_positive": 1.0}, r"false positives are not known \(0 pairs\)",
        ),
    ],
)  # fmt: skip
def test_another_judge_is_refused(write, fields, settings, message):
    with pytest.raises(RewardError, match=message):
        check_certificate(judge(write(**fields), **settings), max_no_verdict=0.1)


def test_without_a_certificate_the_message_says_how_to_make_one(tmp_path):
    config = JudgeConfig(
        urls=(URL,), model="a judge", max_false_positive=0.01, api_key_env="JUDGE_KEY"
    )  # pyright: ignore[reportCallIssue]
    with pytest.raises(RewardError) as raised:
        check_certificate(config, max_no_verdict=0.1)
    assert "reward.judge.max_false_positive=0.01 and reward.judge.certificate is not set" in str(
        raised.value
    )
    assert (
        f"`qlrl judge certify --url {URL} --model 'a judge' --key-env JUDGE_KEY "
        "--out judge_certificate.json`"
    ) in str(raised.value)
    missing = tmp_path / "gone.json"
    with pytest.raises(RewardError, match=r"gone\.json cannot be read \(No such file"):
        check_certificate(judge(missing), max_no_verdict=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"more": 1},
        {"repeats": 0},
        {"made": "<script>"},
        {"agreeing": -1},
        {"verdicts_per_s": "12"},
        {"categories": {"names": {"equivalent": {"right": 1.5}}}},
        {"categories": {"names": {"same": {}}}},
        {"categories": []},
        {"model": None},
    ],
)
def test_a_damaged_certificate_is_none(tmp_path, change):
    file = tmp_path / "certificate.json"
    file.write_text(json.dumps(certificate().model_dump(mode="json") | change))
    with pytest.raises(RewardError, match="is no certificate"):
        read_certificate(file)
    file.write_text("{")
    with pytest.raises(RewardError, match=r"is no certificate \(file: "):
        read_certificate(file)
