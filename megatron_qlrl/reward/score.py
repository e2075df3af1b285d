"""Responses -> rewards. The one scorer of training and of evaluation."""

from collections import Counter
from collections.abc import Sequence

from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.extract import final_text, find_answer
from megatron_qlrl.reward.rules import RULE_OF_SOURCE, apply_rule, rule_of
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup

_MAX_LOGGED_CHARS = 400


def score_response(*, data_source: str, ground_truth: str, response_text: str) -> Score:
    """Binary outcome reward of one response (QwenLong-L1 section 3.4), never a format reward.

    A response that does not close its reasoning, or states no answer, scores 0.

    Raises:
        DataError: the data source has no rule (`check_sources` finds it before training).
    """
    rule = rule_of(data_source).rule
    final = final_text(response_text)
    answer = find_answer(final) if final is not None else None
    if answer is None:
        return Score(value=0.0, rule=0.0)
    reward = float(apply_rule(rule, gold=ground_truth, answer=answer))
    return Score(
        value=reward,
        rule=reward,
        matched=answer.notation,
        prediction=answer.text[:_MAX_LOGGED_CHARS],
    )


def score_group(prompt: Prompt, rollouts: Sequence[Rollout]) -> ScoredGroup:
    """Scores all responses to one prompt; an unfinished response is scored like any other."""
    assert all(r.prompt_uid == prompt.uid for r in rollouts), prompt.uid
    scores = [
        score_response(
            data_source=prompt.data_source,
            ground_truth=prompt.ground_truth,
            response_text=rollout.text,
        )
        for rollout in rollouts
    ]
    return ScoredGroup(prompt, tuple(rollouts), tuple(scores))


def check_sources(prompts: Sequence[Prompt]) -> None:
    """To be called before training: every data source must have a rule.

    Raises:
        DataError: names all sources without one, with their number of rows.
    """
    counts = Counter(prompt.data_source for prompt in prompts)
    unknown = [f"{source!r} ({n} rows)" for source, n in counts.items() if not _has_rule(source)]
    if unknown:
        raise DataError(
            f"no reward rule for data_source {', '.join(sorted(unknown))}; the name must contain "
            f"one of: {', '.join(RULE_OF_SOURCE)}. Rename data_source in the parquet files"
        )


def _has_rule(data_source: str) -> bool:
    return any(name in data_source.lower() for name in RULE_OF_SOURCE)
