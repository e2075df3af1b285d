"""`qlrl eval` of a model behind a service (evaluation.endpoint): the same prompts, samples and
scorer as for model.path, of which only the tokenizer is loaded. One process, no ranks.

prompts x samples -> service -> journal -> scores -> <run.dir>/eval/eval.json, .jsonl
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qlrl.config.load import save_config
from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.control import encode_plain, escaped
from megatron_qlrl.data.cut import Limits, Messages, cut_messages
from megatron_qlrl.data.dataset import load_prompts, load_rows
from megatron_qlrl.data.tokenizer import load_tokenizer
from megatron_qlrl.distill.distill import collect
from megatron_qlrl.distill.journal import Journal, Sample
from megatron_qlrl.distill.teacher import Teacher
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.evaluate.benchmarks import benchmark_scores, cut_report
from megatron_qlrl.evaluate.evaluation import write_answers
from megatron_qlrl.evaluate.statistics import score_lines, statistics
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.platform.lock import take_lock
from megatron_qlrl.platform.progress import Progress, Tally
from megatron_qlrl.reward.endpoint import open_session
from megatron_qlrl.reward.score import Scorer, check_sources
from megatron_qlrl.rollout.collect import check_masked
from megatron_qlrl.rollout.seeds import EVALUATION_STEP, token_seed
from megatron_qlrl.types import Prompt, Rollout, ScoredGroup


def evaluate_endpoint(config: Config) -> None:
    """Scores the model of evaluation.endpoint on data.eval_files, prints the scores, and writes
    them with every answer. A second start continues from the journal.

    Raises:
        ConfigError: data.enable_thinking is set, or the key is not.
        DataError: rows cannot be used, or an answer could not be had.
        RewardError: too many responses have no verdict.
    """
    settings, service = config.evaluation, config.evaluation.endpoint
    assert service is not None  # checked before
    if config.data.enable_thinking is not None:
        raise ConfigError(
            "data.enable_thinking is for the chat template of model.path, and the service of "
            "evaluation.endpoint uses its own: leave it out here, and set it where the service is "
            "started"
        )
    key = read_secret(service.api_key_env, of="evaluation.endpoint")
    tokenizer = load_tokenizer(Path(config.model.path))
    limits = Limits(settings.max_input_tokens)
    benchmarks: dict[str, list[Prompt]] = {}
    chats: list[Messages] = []
    for file in config.data.eval_files:
        benchmarks[Path(file).stem] = load_prompts([file], tokenizer=tokenizer, limits=limits)
        for row in load_rows([file]):
            chat = [{key: m[key] for key in ("role", "content")} for m in row["prompt"]]
            kept = cut_messages(tokenizer, chat, limits.text_tokens)
            # The service makes the tokens.
            chats.append([m | {"content": escaped(tokenizer, m["content"])} for m in kept])
    prompts = [prompt for own in benchmarks.values() for prompt in own]
    check_sources(prompts, config.reward.custom)
    if report := cut_report(benchmarks, limits):
        print(f"qlrl: warning: {report}", flush=True)
    request = {
        **settings.model_dump(include={"temperature", "top_p"}),
        "max_tokens": config.rollout.max_response_tokens,
    }
    identity = {
        "model": service.model,
        "prompts": blake2b(json.dumps(chats).encode(), digest_size=16).hexdigest(),
        "seed": config.run.seed,
        **request,
    }
    folder = Path(config.run.dir)
    with (
        closing(take_lock(folder / "run.lock", what=f"run.dir {folder}")),
        closing(Scorer.of(config.reward)) as scorer,
    ):
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        with closing(Journal(folder / "eval" / "endpoint.journal", identity)) as journal:
            asyncio.run(_collect(config, prompts, chats, request, journal, key=key))
        answers = _scored(
            benchmarks, journal, scorer, tokenizer=tokenizer, num_samples=settings.samples
        )
        groups = [group for own in answers.values() for group in own]
        check_masked(groups, max_share=config.reward.max_masked_share, reason=scorer.last_failure)
    metrics = benchmark_scores(answers) | statistics(answers)
    write_answers(folder / "eval", "eval", metrics, groups)
    print("\n".join([*score_lines(metrics, list(answers)), json.dumps(metrics)]), flush=True)


async def _collect(
    config: Config,
    prompts: Sequence[Prompt],
    chats: Sequence[Messages],
    request: Mapping[str, Any],
    journal: Journal,
    *,
    key: str | None,
) -> None:
    """
    Raises:
        DataError: an answer could not be had.
    """
    service = config.evaluation.endpoint
    assert service is not None
    teacher = Teacher(service, key=key)
    tally = Tally("answers")
    wanted = [(p.uid, k) for p in prompts for k in range(config.evaluation.samples)]
    tally.total, tally.known = len(wanted), sum(key in journal.samples for key in wanted)
    async with open_session(service.concurrency) as session:

        async def ask(number: int, sample: int) -> Sample | None:
            uid = prompts[number].uid
            seed = token_seed(config.run.seed, EVALUATION_STEP, uid, sample)
            answer = await teacher.answer(
                session, {**request, "messages": chats[number], "seed": seed}
            )
            tally.done += answer is not None
            return answer and Sample(uid, sample, *answer)

        try:
            with Progress.of_rank(0).doing(f"asking {service.model}", tally):
                failed = await collect(
                    prompts,
                    ask,
                    journal,
                    samples=config.evaluation.samples,
                    concurrency=service.concurrency,
                )
        except DataError as error:
            raise DataError(f"{error} (last: {teacher.last_failure})") from error
    if failed:
        raise DataError(
            f"{failed} of {len(prompts) * config.evaluation.samples} answers could not be had "
            f"(last: {teacher.last_failure}); the others are in the journal: start the same "
            "command again, or lower evaluation.max_input_tokens if the service calls prompts too "
            "long"
        )


def _scored(
    benchmarks: Mapping[str, Sequence[Prompt]],
    journal: Journal,
    scorer: Scorer,
    *,
    tokenizer: Any,
    num_samples: int,
) -> dict[str, list[ScoredGroup]]:
    """Returns the groups of the journal's answers; lengths are counted by model.path's
    tokenizer.

    The template of another model, and what it opens, is not known: a finished answer without
    `</think>` counts as a whole, an unfinished one as reasoning if model.path's template opens it.
    """
    result: dict[str, list[ScoredGroup]] = {}
    for name, prompts in benchmarks.items():
        rollouts = [
            tuple(_rollout(journal.samples[p.uid, k], tokenizer) for k in range(num_samples))
            for p in prompts
        ]
        futures = [
            [
                scorer.score(replace(p, reasoning_open=p.reasoning_open and not r.finished), r.text)
                for r in own
            ]
            for p, own in zip(prompts, rollouts, strict=True)
        ]
        result[name] = [
            ScoredGroup(p, own, tuple(score.result() for score in scores))
            for p, own, scores in zip(prompts, rollouts, futures, strict=True)
        ]
    return result


def _rollout(sample: Sample, tokenizer: Any) -> Rollout:
    try:
        token_ids = encode_plain(tokenizer, sample.response)
    except DataError:  # control tokens as text; only the length counts
        token_ids = tokenizer(sample.response, add_special_tokens=False)["input_ids"]
    return Rollout(
        prompt_uid=sample.uid,
        sample=sample.sample,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        engine_logprobs=np.zeros(0, np.float32),  # the service gives none
        text=sample.response,
        finished=sample.finished,
        weight_version=0,
    )
