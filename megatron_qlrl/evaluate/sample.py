"""`qlrl check CONFIG --sample N`: which prompts are answered before any job, and what is shown."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.dataset import drop_overlong, load_prompts
from megatron_qlrl.evaluate.benchmarks import read_benchmarks
from megatron_qlrl.reward.diagnose import diagnosis, shortened
from megatron_qlrl.reward.score import check_sources
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup

_PROMPT_CHARS = 600
_RESPONSE_CHARS = 600


def sample_prompts(
    config: Config, tokenizer: Any, *, max_positions: int, warn: Callable[[str], None]
) -> list[Prompt]:
    """All prompts of the first of data.train_files, eval_files and sft_files that the config
    names, without those that are too long."""
    data = config.data
    if data.eval_files and not data.train_files:
        benchmarks = read_benchmarks(config, tokenizer, max_positions=max_positions, warn=warn)
        return [prompt for prompts in benchmarks.values() for prompt in prompts]
    prompts = load_prompts(
        data.train_files or data.sft_files,
        tokenizer=tokenizer,
        enable_thinking=data.enable_thinking,
    )
    check_sources(prompts, config.reward.custom)
    longest = min(config.longest_generation, max_positions)
    kept, report = drop_overlong(prompts, longest - config.rollout.max_response_tokens)
    if report:
        warn(report)
    return kept


def spread(prompts: Sequence[Prompt], num: int) -> list[Prompt]:
    """At most `num` prompts at even distances, over the sources and from short to long."""
    ordered = sorted(prompts, key=lambda p: (p.data_source, p.num_tokens, p.uid))
    num = min(num, len(ordered))
    return [ordered[i * len(ordered) // num] for i in range(num)]


def report(groups: Sequence[ScoredGroup], tokenizer: Any) -> str:
    """Each prompt and response with what was read and the score, then a table, then what is wrong
    with most of them."""
    shown = [
        f"[{number}/{len(groups)}] {_shown(g.prompt, g.rollouts[0], g.scores[0], tokenizer)}"
        for number, g in enumerate(groups, 1)
    ]
    problem = diagnosis(groups)
    return "\n\n".join([*shown, _table(groups), *([f"warning: {problem}"] if problem else [])])


def _shown(prompt: Prompt, rollout: Rollout, score: Score, tokenizer: Any) -> str:
    rendered = shortened(tokenizer.decode(prompt.token_ids), _PROMPT_CHARS)
    ended = "" if rollout.finished else ", cut at rollout.max_response_tokens"
    read = f"{score.prediction!r} (from {score.matched!r})" if score.matched else "no answer"
    reasoning = "must be closed" if prompt.reasoning_open else "is optional"
    # repr makes line ends and control characters visible; decode keeps the control tokens.
    return (
        f"{prompt.uid}, {prompt.data_source}, {prompt.num_tokens} tokens; reasoning "
        f"{reasoning}\n"
        f"  prompt:   {rendered!r}\n"
        f"  response: {shortened(rollout.text, _RESPONSE_CHARS)!r} "
        f"({len(rollout.token_ids)} tokens{ended})\n"
        f"  read:     {read}\n"
        f"  gold:     {prompt.ground_truth!r}\n"
        f"  score:    {'no verdict' if score.value is None else f'{score.value:g}'}"
    )


def _table(groups: Sequence[ScoredGroup]) -> str:
    lines = [f"{'source':<32}{'prompts':>8}{'read':>8}{'cut':>8}{'score':>8}"]
    for source in sorted({g.prompt.data_source for g in groups}):
        of_source = [g for g in groups if g.prompt.data_source == source]
        read = sum(bool(g.scores[0].matched) for g in of_source)
        cut = sum(not g.rollouts[0].finished for g in of_source)
        score = sum(g.scores[0].value or 0.0 for g in of_source)
        lines.append(f"{source[:31]:<32}{len(of_source):>8}{read:>8}{cut:>8}{score:>8g}")
    return "\n".join(lines)
