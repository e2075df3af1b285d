"""The workers run real processes; the functions are those of own_rewards.py."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from megatron_qlrl.config.schema import RewardConfig
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.reward.custom import CustomRewards, Worker
from megatron_qlrl.reward.rules import SourceRule, find_rule, rule_of, with_own_rewards
from megatron_qlrl.reward.score import Scorer, check_sources
from megatron_qlrl.types import Prompt, Score

HERE = Path(__file__).parent
MODULE = "tests.unit.reward.own_rewards"
GIVEN = {"question": "Q", "gold": "abcd", "response": "R", "final": "bc", "extra": {"n": 1}}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    names = ("share", "everything", "any_names", "by_order", "judged")
    # The limit leaves a loaded machine time to start a process within a call.
    with closing(Worker([f"{MODULE}:{name}" for name in names], timeout_s=20)) as started:
        started.start()
        yield started


def ask(worker: Worker, final: str):
    return worker.ask(f"{MODULE}:by_order", GIVEN | {"final": final})


def test_a_function_gets_what_it_names(worker: Worker) -> None:
    assert worker.ask(f"{MODULE}:share", GIVEN).value == 0.5  # b and c of abcd
    said = worker.ask(f"{MODULE}:everything", GIVEN)
    assert (said.value, said.prediction) == (0.25, "Q|abcd|R|bc|{'n': 1}")
    assert worker.ask(f"{MODULE}:any_names", GIVEN).value == 0.5
    assert worker.ask(f"{MODULE}:judged", GIVEN | {"final": "right"}).value == 1.0


def test_the_source_is_the_file_that_defines_the_function(worker: Worker) -> None:
    file = HERE / "own_rewards.py"
    source = worker.sources[f"{MODULE}:judged"]
    assert Path(source.file) == file
    assert source.digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_no_verdict_on_purpose_is_no_failure(worker: Worker) -> None:
    for final in ("none", "score"):
        verdict = ask(worker, final)
        assert (verdict.value, verdict.failed) == (None, None)
    assert ask(worker, "true").value == 1.0


@pytest.mark.parametrize(
    ("final", "failed", "why"),
    [
        ("two", "invalid", "returned 2.0 (a float), not a number in [0, 1], a Score or None"),
        ("nan", "invalid", "returned nan (a float), not a number"),
        ("minus", "invalid", "returned -1 (a int), not a number"),
        ("text", "invalid", "returned '1.0' (a str), not a number"),
        ("lying score", "invalid", "returned 1.5 (a float), not a number"),
        ("raise", "raised", "raised KeyError: 'no such thing' (own_rewards.py, line "),
        ("exit", "crashed", "ended its process with exit code 7"),
        ("abort", "crashed", "ended its process by SIGABRT"),
    ],
)
def test_failures_are_no_verdict_and_say_why(
    worker: Worker, final: str, failed: str, why: str
) -> None:
    verdict = ask(worker, final)
    assert (verdict.value, verdict.failed) == (None, failed)
    assert verdict.why.startswith(why)
    assert ask(worker, "half").value == 0.5  # the next response is scored


@pytest.mark.parametrize("final", ["loop", "sleep", "child"])
def test_a_function_that_hangs_is_ended(final: str) -> None:
    with closing(Worker([f"{MODULE}:by_order"], timeout_s=1)) as worker:
        worker.start()
        process = worker._process
        start = time.monotonic()
        verdict = ask(worker, final)
        assert time.monotonic() - start < 60
        assert process is not None and process.returncode == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):  # what it had started is gone, too
            _wait_until_gone(process.pid)
    assert verdict.failed == "timeout"
    assert verdict.why == "gave no answer within reward.custom_timeout_s=1; it was ended"


def _wait_until_gone(group: int) -> None:
    for _ in range(200):
        os.killpg(group, 0)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "there is no module 'no_such_module' in the current folder, PYTHON"),
        (f"{MODULE}:no_such", "has no 'no_such'"),
        (f"{MODULE}:GLOBAL", "'GLOBAL' is a int, not a function"),
        (f"{MODULE}:later", "must be a plain function, neither async nor a generator"),
        (f"{MODULE}:misnamed", "takes solution_str; its arguments are passed by name and are some"),
        (f"{MODULE}:wrapped", None),
        (f"{MODULE}:positional", "takes final; its arguments are passed by name"),
        (f"{MODULE}:lists", "takes completions; its arguments are passed by name"),
    ],
)
def test_functions_are_checked_at_the_start(name: str, message: str | None) -> None:
    with closing(Worker([name], timeout_s=20)) as worker:
        if message is None:
            worker.start()
            return
        with pytest.raises(ConfigError, match="docs/own-rewards.md") as caught:
            worker.start()
    assert str(caught.value).startswith("reward.custom: ")
    assert message in str(caught.value) and f"(named: {name})" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "importing mine fails: ZeroDivisionError: division by zero (mine.py, line 1)"),
        ("def f(:", "importing mine fails: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "importing mine:f ended its process with exit code 3"),
        ("while True: pass", "importing mine:f takes more than 5 s"),
        ("import nothing_of_this_name", "there is no module 'nothing_of_this_name'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)  # where the command was started
    worker = Worker(["mine:f"], timeout_s=20, start_limit_s=5)
    with closing(worker), pytest.raises(ConfigError) as caught:
        worker.start()
    assert message in str(caught.value)


def test_several_workers_share_the_responses_and_count() -> None:
    rewards = CustomRewards({"*": f"{MODULE}:by_order"}, timeout_s=20, num_workers=2)

    async def score_all() -> list[float | None]:
        finals = ["half", "two", "none", "raise", "half", "true"]
        work = [rewards.score(f"{MODULE}:by_order", GIVEN | {"final": f}) for f in finals]
        return [verdict.value for verdict in await asyncio.gather(*work)]

    with closing(rewards):
        assert asyncio.run(score_all()) == [0.5, None, None, None, 0.5, 1.0]
    assert rewards.counts.pop("seconds") > 0
    assert rewards.counts == {
        **{"asked": 6, "no_verdict": 1, "raised": 1, "invalid": 1, "timeout": 0, "crashed": 0}
    }
    assert rewards.last_failure.startswith(f"reward.custom: {MODULE}:by_order ")


def scorer_of(**settings: object) -> Scorer:
    custom = {"own": f"{MODULE}:share", "Toy_": f"{MODULE}:by_order"}
    return Scorer.of(
        RewardConfig.model_validate({"custom": custom, "custom_timeout_s": 20} | settings)
    )


def prompt(source: str, *, gold: str = "abcd", reasoning_open: bool = False) -> Prompt:
    import numpy as np

    return Prompt(
        "f:0", np.zeros(1, np.int32), source, "Q", gold, {"n": 1}, reasoning_open=reasoning_open
    )


def test_a_scorer_with_own_rewards() -> None:
    with closing(scorer_of()) as scorer:
        dense = scorer.score(prompt("my_own_rows"), "<think>x</think>the answer is (ab).").result()
        assert dense == Score(0.5, 0.5, matched="custom", prediction="ab")
        stated = scorer.score(prompt("OWN", gold="ab"), "</think> bb ").result()
        assert stated == Score(0.5, 0.5, matched="custom", prediction="bb")
        # Other sources keep their rules, and an own reward comes before them.
        assert scorer.score(prompt("musique"), "the answer is abcd").result().rule == 1.0
        masked = scorer.score(prompt("toy_docqa_short"), "two").result()
        assert masked == Score(None, 0.0, matched="custom", prediction="two")
        assert scorer.last_failure == (
            f"reward.custom: {MODULE}:by_order returned 2.0 (a float), not a number in [0, 1], a "
            "Score or None"
        )
        # What leaves its reasoning open scores 0, and the function is not asked.
        opened = scorer.score(prompt("own", reasoning_open=True), "abcd").result()
        assert opened == Score(0.0, 0.0)
        counts = scorer.take_custom_counts()
        assert (counts["asked"], counts["invalid"]) == (3, 1)
        assert scorer.take_custom_counts()["asked"] == 0
        assert list(scorer.sources) == [f"own ({MODULE}:share)", f"Toy_ ({MODULE}:by_order)"]
        with pytest.raises(DataError, match="'gsm8k' has no rule.*one of: own, toy_, multihop"):
            scorer.score(prompt("gsm8k"), "abcd")


def test_closing_ends_what_hangs() -> None:
    scorer = scorer_of(custom_timeout_s=600)
    future = scorer.score(prompt("toy_docqa"), "sleep")
    time.sleep(0.5)
    scorer.close()
    assert future.cancelled() or future.exception() is not None


def test_the_table_of_rules_with_own_ones() -> None:
    rules = with_own_rewards({"Musique": "a:f", "": "b:g"} | {"*": "c:h"}, judged=True)
    assert find_rule("MUSIQUE_x", rules) == SourceRule("custom", True, "a:f")
    rules = with_own_rewards({"*": "c:h"}, judged=False)
    assert rule_of("anything", rules) == SourceRule("custom", False, "c:h")
    assert find_rule("anything") is None


def test_sources_of_own_rewards_are_known() -> None:
    check_sources([prompt("gsm8k"), prompt("musique")], {"GSM": "a:f"})
    with pytest.raises(DataError, match="or name a function of your own in reward.custom"):
        check_sources([prompt("gsm8k")], {"aime": "a:f"})


@pytest.mark.parametrize("name", ["f", "a.b", "a:", ":f", "a b:f", "a/b.py:f", "1a:f", "a:f()"])
def test_names_of_functions(name: str) -> None:
    with pytest.raises(ValueError, match="custom"):
        RewardConfig.model_validate({"custom": {"own": name}})
