"""Held-out prompts by benchmark, and the scores of their answers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import TEMPLATE_TOKENS, Config
from megatron_qlrl.data.cut import Limits
from megatron_qlrl.data.dataset import load_prompts
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.reward.score import check_sources
from megatron_qlrl.types import Prompt, ScoredGroup


def read_benchmarks(
    config: Config, tokenizer: Any, *, max_positions: int, warn: Callable[[str], None]
) -> dict[str, list[Prompt]]:
    """Returns the prompts of data.eval_files by file stem. Their text is cut in the middle to
    evaluation.max_input_tokens, and again if what the engine has left beside a response is less;
    `warn` gets a line that counts the cut ones.

    Raises:
        ConfigError: a response leaves no room for a prompt.
        DataError: a file or row cannot be used.
    """
    response = config.rollout.max_response_tokens
    room = min(config.longest_generation, max_positions) - response
    if room <= 0 and config.data.eval_files:
        raise ConfigError(
            f"rollout.max_response_tokens={response} leaves no room for "
            f"a prompt in the model's {max_positions} positions; lower it"
        )
    limits = Limits(config.evaluation.max_input_tokens, room)
    benchmarks = {
        Path(file).stem: load_prompts(
            [file],
            tokenizer=tokenizer,
            enable_thinking=config.data.enable_thinking,
            limits=limits,
        )
        for file in config.data.eval_files
    }
    check_sources([p for own in benchmarks.values() for p in own], config.reward.custom)
    if report := cut_report(benchmarks, limits):
        warn(report)
    return benchmarks


def cut_report(benchmarks: Mapping[str, Sequence[Prompt]], limits: Limits) -> str:
    """Returns one line that counts the prompts whose text was cut, or "" if there are none."""
    counts = {name: sum(p.cut for p in prompts) for name, prompts in benchmarks.items()}
    total = sum(map(len, benchmarks.values()))
    by_name = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
    room = limits.prompt_tokens
    too_few = room is not None and room < limits.text_tokens + TEMPLATE_TOKENS
    positions = f", or the prompt more than the {room} tokens that are left beside a response"
    return by_name and (
        f"{sum(counts.values())} of {total} evaluation prompts lose their middle ({by_name}): the "
        f"text has more than evaluation.max_input_tokens={limits.text_tokens}"
        f"{positions if too_few else ''}"
    )


def benchmark_scores(answers: Mapping[str, Sequence[ScoredGroup]]) -> dict[str, float]:
    """Returns the metrics `val/<benchmark>/score` (mean over prompts of the mean over verdicts),
    `.../cut` (prompts that lost their middle), `.../masked` (responses without a verdict),
    `.../response_length`, `.../unfinished`, and `val/score`, the mean over benchmarks. Where there
    is no verdict at all there is no score.
    """
    metrics: dict[str, float] = {}
    scores = []
    for name, groups in answers.items():
        rollouts = [r for g in groups for r in g.rollouts]
        rewards = [g.rewards for g in groups]
        means = [r[~np.isnan(r)].mean() for r in rewards if not np.isnan(r).all()]
        values = {
            "cut": sum(g.prompt.cut for g in groups),
            "masked": sum(np.isnan(r).sum() for r in rewards),
            "response_length": np.mean([len(r.token_ids) for r in rollouts]),
            "unfinished": np.mean([not r.finished for r in rollouts]),
        }
        if means:
            scores.append(np.mean(means))
            values = {"score": scores[-1], **values}
        metrics |= {f"val/{name}/{key}": float(value) for key, value in values.items()}
    if scores:
        metrics["val/score"] = float(np.mean(scores))
    return metrics
