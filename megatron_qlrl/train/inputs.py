"""What a run trains on: RL prompts or SFT rows, checked against the config."""

from collections.abc import Callable
from typing import Any

from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.dataset import drop_overlong, load_examples, load_prompts
from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.score import check_sources
from megatron_qlrl.train.fingerprint import rows_digest
from megatron_qlrl.types import Example, Prompt


def read_train_prompts(
    config: Config, tokenizer: Any, *, warn: Callable[[str], None]
) -> tuple[list[Prompt], str]:
    """RL prompts that fit the last phase, and the digest of all rows; longer prompts are reported
    and left out."""
    data = config.data
    prompts = load_prompts(
        data.train_files, tokenizer=tokenizer, enable_thinking=data.enable_thinking
    )
    check_sources(prompts, config.reward.custom)
    kept, report = drop_overlong(prompts, config.max_input_tokens)
    if report:
        warn(report)
    return kept, rows_digest(prompts)


def read_examples(config: Config, tokenizer: Any) -> tuple[list[Example], str]:
    """SFT rows and their digest.

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
    return examples, rows_digest((e.prompt for e in examples), [e.response_ids for e in examples])
