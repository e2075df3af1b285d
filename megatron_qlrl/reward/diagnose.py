"""Warns early that a run learns nothing because almost all responses are cut, have no readable
answer, or are wrong. Such a run looks healthy in every other metric and would go on for days.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from megatron_qlrl.reward.extract import final_text
from megatron_qlrl.reward.rules import RuleName, SourceRule, find_rule
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup

MAX_SHARE = 0.9
"""A problem is reported if a larger share of the responses has it."""
WINDOW = 5
"""After the first batch, which is judged alone, this many batches are judged together."""
_SHOWN_CHARS = 240

_LOOKED_FOR: dict[RuleName, str] = {
    "qa": 'the words after the last "the answer is", or a \\boxed{}',
    "numeric": 'a number after the last "the answer is", or in a \\boxed{}',
    "choice": 'a letter after the last "the correct answer is", or in a \\boxed{}',
    "exact": 'the words after the last "the answer is", or a \\boxed{}',
    "recite": "the prefix that the gold starts with",
    "custom": "what your function of reward.custom pays for",
}
# Causes come before effects: a response that is cut has no answer, and without one it scores 0.
_PROBLEMS = {
    "cut": "are cut at rollout.max_response_tokens",
    "open": "never close their reasoning",
    "unread": "have no readable answer",
    "zero": "score 0",
}
_CURES = {
    "cut": "raise rollout.max_response_tokens, or teach shorter responses first with `qlrl sft`",
    "open": "raise rollout.max_response_tokens, take the chat template that the model was trained "
    "with (data.enable_thinking sets it for Qwen3), or teach it first with `qlrl sft`",
    "unread": "let the prompts ask for that sentence (`qlrl data docs` does), or teach it first "
    "with `qlrl sft` on a few hundred rows",
    "zero": "compare reward_model.ground_truth with the answers in the rollout log, choose the "
    "data_source whose rule fits them, or begin with easier prompts or `qlrl sft`",
}


class BatchWatch:
    """Warns when almost all responses, of the first batch or of the last `WINDOW` batches, have the
    same problem. It warns again about the same problem only after a batch without it."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._counts: deque[Counter[str]] = deque(maxlen=WINDOW)
        self._is_first = True
        self._told: str = ""

    def observe(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Records the groups that were generated in a step; a step without any is left out."""
        if not groups:
            return
        self._counts.append(_count(groups))
        if not self._is_first and len(self._counts) < WINDOW:
            return
        counts = sum(self._counts, Counter[str]())
        problem = _main_problem(counts)
        if problem and problem != self._told:
            when = f"step {step}" if self._is_first else f"steps {step - WINDOW + 1}-{step}"
            self._warn(f"{when}: {_message(problem, counts, groups)}")
        self._is_first, self._told = False, problem


def diagnosis(groups: Sequence[ScoredGroup]) -> str:
    """Returns what is wrong with most of these responses and how to mend it; "" if nothing is."""
    counts = _count(groups)
    problem = _main_problem(counts)
    return _message(problem, counts, groups) if problem else ""


def _responses(groups: Sequence[ScoredGroup]) -> Iterator[tuple[Prompt, Rollout, Score]]:
    for group in groups:
        for rollout, score in zip(group.rollouts, group.scores, strict=True):
            yield group.prompt, rollout, score


def _problems(prompt: Prompt, rollout: Rollout, score: Score) -> set[str]:
    unread = not score.matched
    is_open = final_text(rollout.text, reasoning_open=prompt.reasoning_open) is None
    tests = {
        "cut": not rollout.finished,
        "open": unread and is_open,
        "unread": unread,
        "zero": score.value == 0.0,
    }
    return {name for name, holds in tests.items() if holds}


def _count(groups: Sequence[ScoredGroup]) -> Counter[str]:
    counts = Counter[str]()
    for response in _responses(groups):
        counts.update([*_problems(*response), "all"])
    return counts


def _main_problem(counts: Counter[str]) -> str:
    return next((name for name in _PROBLEMS if counts[name] > MAX_SHARE * counts["all"]), "")


def _message(problem: str, counts: Counter[str], groups: Sequence[ScoredGroup]) -> str:
    """Returns the problem, what the rule looks for, an example from `groups`, and the cure."""
    having = (response for response in _responses(groups) if problem in _problems(*response))
    prompt, rollout, score = next(having, next(_responses(groups)))
    own = SourceRule("custom", judged=False)
    rule = own if score.matched == "custom" else find_rule(prompt.data_source) or own
    looked_for = _LOOKED_FOR[rule.rule]
    where = " after </think>" if prompt.reasoning_open else ""
    read = f"read {score.prediction!r}, the gold is {prompt.ground_truth!r}"
    return (
        f"{counts[problem]} of {counts['all']} responses {_PROBLEMS[problem]}, so there is almost "
        f"nothing to learn from. The rule of data_source {prompt.data_source!r} looks for "
        f"{looked_for}{where}. Example ({prompt.uid}, {len(rollout.token_ids)} tokens): "
        f"{shortened(rollout.text)!r}; {read if score.matched else 'no answer was read'}. "
        f"What helps: {_CURES[problem]}. `qlrl check CONFIG --sample 4` shows prompts and scores"
    )


def shortened(text: str, limit: int = _SHOWN_CHARS) -> str:
    """Returns a text, or about `limit` characters from the beginning and end of a longer one."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 3]} [...] {text[len(text) - (limit - limit // 3) :]}"
