"""Scores responses, for training, evaluation and audits alike."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property

from megatron_qlrl.config.schema import RewardConfig
from megatron_qlrl.errors import DataError, RewardError
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.reward.extract import final_text, find_answer
from megatron_qlrl.reward.judge import Judge, no_counts
from megatron_qlrl.reward.rules import RULE_OF_SOURCE, RuleName, apply_rule, recitation, rule_of
from megatron_qlrl.reward.verdict import Claim, make_claim
from megatron_qlrl.types import Prompt, Score

_MAX_LOGGED_CHARS = 400


def score_response(
    *, data_source: str, ground_truth: str, response_text: str, reasoning_open: bool
) -> Score:
    """Returns the score of one response by its source's rule, without a judge.

    A response that leaves its reasoning open (see `final_text`) or states no answer scores 0.

    Raises:
        DataError: the data source has no rule (`check_sources` finds this before training).
    """
    final = final_text(response_text, reasoning_open=reasoning_open)
    score, _ = _by_rule(rule_of(data_source).rule, ground_truth, final)
    return score


def _by_rule(rule: RuleName, gold: str, final: str | None) -> tuple[Score, str]:
    """Returns the score and the whole final answer, which is "" if none is stated."""
    if rule == "recite":
        ratio = None if final is None else recitation(gold, final)
        if final is None or ratio is None:
            return Score(value=0.0, rule=0.0), ""
        return Score(ratio, ratio, matched="prefix", prediction=final[:_MAX_LOGGED_CHARS]), final
    answer = find_answer(final) if final is not None else None
    if answer is None:
        return Score(value=0.0, rule=0.0), ""
    reward = float(apply_rule(rule, gold=gold, answer=answer))
    prediction = answer.text[:_MAX_LOGGED_CHARS]
    return Score(reward, reward, matched=answer.notation, prediction=prediction), answer.text


class Scorer:
    """Gives the outcome reward r = max(rule, judge), never a format reward (QwenLong-L1 section
    3.4): 0 or 1, or a share of the text by the rule `recite`. Rules run in `submit`; the judge runs
    in a thread of its own during generation.

    A response's score depends on the response alone, not on the order or number of requests.
    """

    def __init__(self, judge: Judge | None) -> None:
        """Without a judge, the rules decide alone."""
        self._judge = judge

    @classmethod
    def of(cls, config: RewardConfig) -> "Scorer":
        """Returns the scorer of a run; the judge's key comes from the environment."""
        judge = config.judge
        return cls(judge and Judge(judge, key=read_secret(judge.api_key_env)))

    def submit(
        self,
        *,
        data_source: str,
        question: str,
        ground_truth: str,
        response: str,
        reasoning_open: bool,
    ) -> Future[Score]:
        """Returns the future score, whose value is None if the judge is needed and gives no
        verdict. If the process that reads expressions does not start, its RewardError is raised by
        the future and not here, because other ranks are in the middle of generation.

        Raises:
            DataError: the data source has no rule.
        """
        source = rule_of(data_source)
        done: Future[Score] = Future()
        try:
            final = final_text(response, reasoning_open=reasoning_open)
            score, prediction = _by_rule(source.rule, ground_truth, final)
        except RewardError as error:
            done.set_exception(error)
            return done
        if self._judge is not None and source.judged and not score.rule:
            claim = make_claim(question=question, gold=ground_truth, prediction=prediction)
            if claim is not None:
                return asyncio.run_coroutine_threadsafe(
                    _judged(self._judge, claim, score), self._loop
                )
        done.set_result(score)
        return done

    def score(self, prompt: Prompt, response: str) -> Future[Score]:
        """Submits a response to `prompt`; returns and raises as `submit`."""
        return self.submit(
            data_source=prompt.data_source,
            question=prompt.question,
            ground_truth=prompt.ground_truth,
            response=response,
            reasoning_open=prompt.reasoning_open,
        )

    @property
    def last_failure(self) -> str:
        """The reason why there was no verdict, the last time."""
        return self._judge.last_failure if self._judge else ""

    def take_counts(self) -> dict[str, float]:
        """Returns `Judge.counts` since the last call, or {} without a judge. Call it when no score
        is outstanding."""
        if self._judge is None:
            return {}
        taken, self._judge.counts = self._judge.counts, no_counts()
        return taken

    def close(self) -> None:
        """Ends the background thread and cancels outstanding scores."""
        loop = self.__dict__.pop("_loop", None)
        if self._judge is None or loop is None:
            return
        asyncio.run_coroutine_threadsafe(_end(self._judge), loop).result()
        loop.call_soon_threadsafe(loop.stop)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()

        def work() -> None:
            loop.run_forever()
            loop.close()

        threading.Thread(target=work, name="judge", daemon=True).start()
        return loop


async def _judged(judge: Judge, claim: Claim, score: Score) -> Score:
    verdict = await judge.verdict(claim)
    if verdict is None:
        return replace(score, value=None)
    return replace(score, value=max(score.rule, float(verdict)), judge=float(verdict))


async def _end(judge: Judge) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await judge.close()


def check_sources(prompts: Sequence[Prompt]) -> None:
    """Checks before training that every data source has a rule.

    Raises:
        DataError: some have none. The message names them all, with their number of rows.
    """
    counts = Counter(prompt.data_source for prompt in prompts)
    unknown = [
        f"{source!r} ({n} rows)"
        for source, n in counts.items()
        if not any(name in source.lower() for name in RULE_OF_SOURCE)
    ]
    if unknown:
        raise DataError(
            f"no reward rule for data_source {', '.join(sorted(unknown))}; the name must contain "
            f"one of: {', '.join(RULE_OF_SOURCE)}. Rename data_source in the parquet files"
        )
