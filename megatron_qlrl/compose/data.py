"""What a run reads: RL prompts, held-out prompts, SFT rows, checked against the config."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_qlrl.compose.fingerprint import rows_digest
from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.dataset import (
    Example,
    drop_overlong,
    load_examples,
    load_prompts,
    middle_truncate,
)
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.reward.score import check_sources
from megatron_qlrl.types import Prompt


def read_train_prompts(
    config: Config, tokenizer: Any, *, warn: Callable[[str], None]
) -> tuple[list[Prompt], str]:
    """RL prompts that fit the last phase, with the digest of all; longer ones are reported."""
    prompts = _read_prompts(config, tokenizer, config.data.train_files)
    check_sources(prompts)
    kept, report = drop_overlong(prompts, config.max_input_tokens)
    if report:
        warn(report)
    return kept, rows_digest(prompts)


def read_sample_prompts(
    config: Config, tokenizer: Any, *, max_tokens: int, warn: Callable[[str], None]
) -> list[Prompt]:
    """Prompts of data.train_files, or else of data.sft_files, of at most `max_tokens` tokens."""
    prompts = _read_prompts(config, tokenizer, config.data.train_files or config.data.sft_files)
    check_sources(prompts)
    kept, report = drop_overlong(prompts, max_tokens)
    if report:
        warn(report)
    return kept


def read_benchmarks(
    config: Config, tokenizer: Any, *, max_positions: int
) -> dict[str, list[Prompt]]:
    """Held-out prompts by file stem, cut in the middle to the limit and to what the model's
    positions leave beside a response.

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
    found = {Path(f).stem: _read_prompts(config, tokenizer, [f]) for f in config.data.eval_files}
    check_sources([p for prompts in found.values() for p in prompts])
    return {
        name: [replace(p, token_ids=middle_truncate(p.token_ids, limit)) for p in prompts]
        for name, prompts in found.items()
    }


def read_examples(config: Config, tokenizer: Any) -> list[Example]:
    """SFT rows.

    Raises:
        DataError: one does not fit into a packed row.
    """
    data, limit = config.data, config.policy.max_tokens_per_row
    examples = load_examples(
        data.sft_files, tokenizer=tokenizer, enable_thinking=data.enable_thinking
    )
    for e in examples:
        num = e.prompt.num_tokens + len(e.response_ids)
        if num > limit:
            raise DataError(
                f"SFT row {e.prompt.uid} has {num} tokens, more than "
                f"policy.max_tokens_per_row={limit}"
            )
    return examples


def _read_prompts(config: Config, tokenizer: Any, files: Sequence[str]) -> list[Prompt]:
    return load_prompts(files, tokenizer=tokenizer, enable_thinking=config.data.enable_thinking)
