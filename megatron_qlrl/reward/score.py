"""Scores responses, for training, evaluation and audits alike."""

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any

from megatron_qlrl.config.schema import RewardConfig
from megatron_qlrl.errors import DataError, RewardError
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.reward.custom import CustomRewards, Source, no_custom_counts
from megatron_qlrl.reward.extract import final_text, find_answer
from megatron_qlrl.reward.judge import Judge, no_counts
from megatron_qlrl.reward.rules import (
    RULE_OF_SOURCE,
    RuleName,
    SourceRule,
    apply_rule,
    find_rule,
    recitation,
    rule_of,
    with_own_rewards,
)
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
    3.4): 0 or 1, or a number between them by the rule `recite` or by the user's own function.
    Rules run in `submit`; judge and functions are asked by a thread of its own during generation.

    A response's score depends on the response alone, not on the order or number of requests.
    """

    def __init__(
        self,
        judge: Judge | None,
        custom: CustomRewards | None = None,
        rules: Mapping[str, SourceRule] = RULE_OF_SOURCE,
    ) -> None:
        """Without a judge, the rules decide alone. `rules` may name functions of `custom`."""
        self._judge, self._custom, self._rules = judge, custom, rules

    @classmethod
    def of(cls, config: RewardConfig) -> "Scorer":
        """Returns the scorer of a run; the judge's key comes from the environment.

        Raises:
            ConfigError: the key is not there, or a function of `reward.custom` cannot be used.
        """
        judge = config.judge
        asked = judge and Judge(judge, key=read_secret(judge.api_key_env))
        return cls.with_functions(asked, config)

    @classmethod
    def with_functions(cls, judge: Judge | None, config: RewardConfig) -> "Scorer":
        """Returns a scorer with the functions of `reward.custom`.

        Raises:
            ConfigError: one cannot be used.
        """
        if not config.custom:
            return cls(judge)
        custom = CustomRewards(
            config.custom,
            timeout_s=config.custom_timeout_s,
            num_workers=config.custom_workers,
        )
        return cls(judge, custom, with_own_rewards(config.custom, judged=config.custom_judged))

    def submit(
        self,
        *,
        data_source: str,
        question: str,
        ground_truth: str,
        response: str,
        reasoning_open: bool,
        extra: Mapping[str, Any] | None = None,
    ) -> Future[Score]:
        """Returns the future score, whose value is None if the judge, or the user's function, is
        needed and gives no verdict. If a process that scores does not start, its RewardError is
        raised by the future and not here, because other ranks are in the middle of generation.

        Args:
            extra: what the row says beside question and gold, for the user's function.

        Raises:
            DataError: the data source has no rule.
        """
        source = rule_of(data_source, self._rules)
        done: Future[Score] = Future()
        final = final_text(response, reasoning_open=reasoning_open)
        if self._custom is not None and source.rule == "custom" and final is not None:
            arguments = {
                "question": question,
                "gold": ground_truth,
                "response": response,
                "final": final,
                "extra": dict(extra or {}),
            }
            work = self._by_function(self._custom, source, arguments)
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            score, prediction = _by_rule(source.rule, ground_truth, final)
        except RewardError as error:
            done.set_exception(error)
            return done
        if self._judge is not None and source.judged and not score.rule:
            claim = make_claim(question=question, gold=ground_truth, prediction=prediction)
            if claim is not None:
                work = _judged(self._judge, claim, score)
                return asyncio.run_coroutine_threadsafe(work, self._loop)
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
            extra=prompt.extra,
        )

    @property
    def sources(self) -> dict[str, Source]:
        """The files of the user's functions, by "pattern (function)"."""
        return self._custom.sources if self._custom else {}

    @property
    def last_failure(self) -> str:
        """The reason why there was no verdict, the last time."""
        asked = (self._judge, self._custom)
        return "; ".join(a.last_failure for a in asked if a is not None and a.last_failure)

    def take_counts(self) -> dict[str, float]:
        """Returns `Judge.counts` since the last call, or {} without a judge. Call it when no score
        is outstanding."""
        if self._judge is None:
            return {}
        taken, self._judge.counts = self._judge.counts, no_counts()
        return taken

    def take_custom_counts(self) -> dict[str, float]:
        """Returns `CustomRewards.counts`, in the way of `take_counts`."""
        if self._custom is None:
            return {}
        taken, self._custom.counts = self._custom.counts, no_custom_counts()
        return taken

    def close(self) -> None:
        """Ends the background thread and the workers, and cancels outstanding scores."""
        loop = self.__dict__.pop("_loop", None)
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_end(self._judge), loop).result()
            loop.call_soon_threadsafe(loop.stop)
        if self._custom is not None:
            self._custom.close()

    async def _by_function(
        self, custom: CustomRewards, source: SourceRule, arguments: Mapping[str, Any]
    ) -> Score:
        """Returns what the user's function says of a response, or the judge, where it may."""
        verdict = await custom.score(source.function, arguments)
        final = arguments["final"]
        answer = find_answer(final)
        prediction = verdict.prediction or (answer.text if answer else final.strip())
        score = Score(
            value=verdict.value,
            rule=verdict.value or 0.0,
            matched="custom",
            prediction=prediction[:_MAX_LOGGED_CHARS],
        )
        if self._judge is not None and source.judged and score.value == 0:
            claim = make_claim(
                question=arguments["question"], gold=arguments["gold"], prediction=prediction
            )
            if claim is not None:
                return await _judged(self._judge, claim, score)
        return score

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()

        def work() -> None:
            loop.run_forever()
            loop.close()

        threading.Thread(target=work, name="scorer", daemon=True).start()
        return loop


async def _judged(judge: Judge, claim: Claim, score: Score) -> Score:
    verdict = await judge.verdict(claim)
    if verdict is None:
        return replace(score, value=None)
    return replace(score, value=max(score.rule, float(verdict)), judge=float(verdict))


async def _end(judge: Judge | None) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if judge is not None:
        await judge.close()


def check_sources(prompts: Sequence[Prompt], custom: Mapping[str, str]) -> None:
    """Checks before training that every data source has a rule, or an own reward in `custom`.

    Raises:
        DataError: some have none. The message names them all, with their number of rows.
    """
    rules = with_own_rewards(custom, judged=False)
    counts = Counter(prompt.data_source for prompt in prompts)
    unknown = [f"{name!r} ({n} rows)" for name, n in counts.items() if not find_rule(name, rules)]
    if unknown:
        raise DataError(
            f"no reward rule for data_source {', '.join(sorted(unknown))}; the name must contain "
            f"one of: {', '.join(rules)}. Rename data_source in the parquet files, or name a "
            "function of your own in reward.custom"
        )
