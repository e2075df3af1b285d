"""Held-out prompts by benchmark, and the scores of their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.dataset import load_prompts, middle_truncate
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.reward.score import check_sources
from megatron_qlrl.types import Prompt, ScoredGroup


def read_benchmarks(
    config: Config, tokenizer: Any, *, max_positions: int
) -> dict[str, list[Prompt]]:
    """Prompts of data.eval_files by file stem, cut in the middle to evaluation.max_input_tokens
    and to what the model's positions leave beside a response.

    Raises:
        ConfigError: they leave nothing.
    """
    room = max_positions - config.rollout.max_response_tokens
    if room <= 0 and config.data.eval_files:
        raise ConfigError(
            f"rollout.max_response_tokens={config.rollout.max_response_tokens} leaves no room for "
            f"a prompt in the model's {max_positions} positions; lower it"
        )
    limit = min(config.evaluation.max_input_tokens, room)
    thinking = config.data.enable_thinking
    benchmarks = {
        Path(file).stem: load_prompts([file], tokenizer=tokenizer, enable_thinking=thinking)
        for file in config.data.eval_files
    }
    check_sources([p for prompts in benchmarks.values() for p in prompts])
    return {
        name: [replace(p, token_ids=middle_truncate(p.token_ids, limit)) for p in prompts]
        for name, prompts in benchmarks.items()
    }


def benchmark_scores(answers: Mapping[str, Sequence[ScoredGroup]]) -> dict[str, float]:
    """Metrics `val/<benchmark>/score` (mean over prompts of the mean over verdicts),
    `.../masked` (responses without a verdict), `.../response_length`, `.../unfinished`, and
    `val/score`, the mean over benchmarks. Where there is no verdict at all there is no score.
    """
    metrics: dict[str, float] = {}
    scores = []
    for name, groups in answers.items():
        rollouts = [r for g in groups for r in g.rollouts]
        rewards = [g.rewards for g in groups]
        means = [r[~np.isnan(r)].mean() for r in rewards if not np.isnan(r).all()]
        values = {
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
