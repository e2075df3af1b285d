"""Distilled warm-up data (QwenLong-L1 section 4.1): a teacher answers, the scorer keeps. One
process, no ranks.

prompts x samples -> teacher -> journal (a line a sample, on disk at once)
journal -> scorer, lengths, duplicates -> SFT rows + counts of what was dropped and why
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.control import escaped
from megatron_qlrl.data.dataset import load_prompts, load_rows, response_ids
from megatron_qlrl.data.tokenizer import load_tokenizer
from megatron_qlrl.distill.journal import Journal, Sample
from megatron_qlrl.distill.teacher import Teacher, fit_reasoning
from megatron_qlrl.errors import DataError
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.platform.files import replaced
from megatron_qlrl.platform.lock import take_lock
from megatron_qlrl.reward.endpoint import open_session
from megatron_qlrl.reward.extract import final_text
from megatron_qlrl.reward.score import Scorer, check_sources
from megatron_qlrl.rollout.seeds import token_seed
from megatron_qlrl.types import Prompt

GIVE_UP_AFTER = 16
"""When this many samples in a row have failed, the teacher is taken for gone."""

# (row number, sample) -> the teacher's answer, or None where it gave none.
Ask = Callable[[int, int], Awaitable[Sample | None]]


def output_files(out: Path) -> tuple[Path, Path, Path]:
    """What `qlrl distill CONFIG out` writes: the SFT rows, the journal and the report."""
    return out, Path(f"{out}.journal.jsonl"), Path(f"{out}.report.json")


def run_distill(config: Config, out: Path) -> None:
    """Writes the SFT parquet and the report, and prints the report. A second start continues from
    the journal.

    Raises:
        DataError: rows cannot be used, the teacher is gone, or nothing was kept.
    """
    files, settings = config.data.train_files, config.distill
    tokenizer = load_tokenizer(Path(config.model.path))
    prompts = load_prompts(files, tokenizer=tokenizer, enable_thinking=config.data.enable_thinking)
    rows = load_rows(files)
    check_sources(prompts, config.reward.custom)
    assert settings.teacher is not None  # checked before
    identity = {
        "files": [Path(f).name for f in files],
        "prompts": len(prompts),
        "seed": config.run.seed,
        "teacher": settings.teacher.model,
        **settings.model_dump(include={"temperature", "top_p", "max_response_tokens"}),
    }
    # Not in it: a later start may ask for more samples or another length limit.
    with (
        closing(take_lock(out.with_name(out.name + ".lock"), what=str(out))),
        closing(Journal(output_files(out)[1], identity)) as journal,
        closing(Scorer.of(config.reward)) as scorer,
    ):
        failed = asyncio.run(_collect(config, prompts, rows, journal, tokenizer))
        kept, counts = select(
            prompts,
            rows,
            journal,
            scorer,
            num_tokens=lambda text: len(response_ids(tokenizer, text)),
            max_tokens=settings.max_tokens,
            solved_above=config.reward.solved_above,
        )
    report = {
        "settings": identity,
        "prompts": len(prompts),
        "failed": failed,
        "sources": {name: dict(tally) for name, tally in sorted(counts.items())},
    }
    print(json.dumps(report, indent=1), flush=True)
    if not kept:
        raise DataError(f"no answer of the teacher was kept (see the report above); {out} not made")
    _write(out, kept, report)


async def _collect(
    config: Config,
    prompts: Sequence[Prompt],
    rows: Sequence[dict[str, Any]],
    journal: Journal,
    tokenizer: Any,
) -> int:
    settings = config.distill
    assert settings.teacher is not None
    key = read_secret(settings.teacher.api_key_env, of="distill.teacher")
    teacher = Teacher(settings.teacher, key=key)
    async with open_session(settings.teacher.concurrency) as session:

        async def ask(number: int, sample: int) -> Sample | None:
            prompt = prompts[number]
            answer = await teacher.answer(
                session,
                {
                    # The teacher's server makes the tokens.
                    "messages": [
                        {key: escaped(tokenizer, message[key]) for key in ("role", "content")}
                        for message in rows[number]["prompt"]
                    ],
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "max_tokens": settings.max_response_tokens,
                    "seed": token_seed(config.run.seed, 0, prompt.uid, sample),
                },
            )
            if answer is None:
                return None
            text, finished = answer
            text = fit_reasoning(text, reasoning_open=prompt.reasoning_open)
            return Sample(prompt.uid, sample, text, finished)

        try:
            return await collect(
                prompts,
                ask,
                journal,
                samples=settings.samples,
                concurrency=settings.teacher.concurrency,
            )
        except DataError as error:
            raise DataError(f"{error} (last: {teacher.last_failure})") from error


def _write(out: Path, rows: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    try:
        with replaced(out) as fresh:
            pq.write_table(pa.Table.from_pylist(list(rows)), fresh)
    except pa.ArrowException as error:
        raise DataError(f"the rows for {out} make no parquet file: {error}") from error
    with replaced(output_files(out)[2]) as fresh:
        fresh.write_text(json.dumps(report, indent=1))


async def collect(
    prompts: Sequence[Prompt], ask: Ask, journal: Journal, *, samples: int, concurrency: int
) -> int:
    """Asks for every sample that the journal lacks; returns how many could not be had.

    Raises:
        DataError: `GIVE_UP_AFTER` samples in a row failed.
    """
    missing: Iterator[tuple[int, int]] = (
        (number, sample)
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
        if (prompt.uid, sample) not in journal.samples
    )
    failed = failed_in_row = 0

    async def work() -> None:
        nonlocal failed, failed_in_row
        for number, sample in missing:  # shared: every worker takes the next one
            answer = await ask(number, sample)
            if answer is not None:
                journal.add(answer)
                failed_in_row = 0
                continue
            failed += 1
            failed_in_row += 1
            if failed_in_row >= GIVE_UP_AFTER:
                raise DataError(
                    f"the service failed {failed_in_row} times in a row; "
                    f"{len(journal.samples)} of {len(prompts) * samples} samples are in the "
                    "journal: mend the service and start the same command again"
                )

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except* DataError as several:
        raise several.exceptions[0] from None
    return failed


def select(
    prompts: Sequence[Prompt],
    rows: Sequence[Mapping[str, Any]],
    journal: Journal,
    scorer: Scorer,
    *,
    num_tokens: Callable[[str], int],
    max_tokens: int,
    solved_above: float = 0.0,
) -> tuple[list[dict[str, Any]], dict[str, Counter[str]]]:
    """(SFT rows in the order of prompts and samples, counts by data source).

    Kept are answers that ended by themselves, that the scorer gives more than `solved_above`, that
    fit, and that are not there already. `num_tokens` counts an answer by the student's tokenizer.
    """
    kept: list[dict[str, Any]] = []
    counts: dict[str, Counter[str]] = {}
    seen: set[tuple[str, str]] = set()
    by_uid = {prompt.uid: number for number, prompt in enumerate(prompts)}
    order = sorted((by_uid[uid], sample) for uid, sample in journal.samples if uid in by_uid)
    answers = {key: journal.samples[prompts[key[0]].uid, key[1]] for key in order}
    # All at once: the judge has many requests in flight.
    scores = {
        key: scorer.score(prompts[key[0]], sample.response)
        for key, sample in answers.items()
        if sample.finished
    }
    for key, sample in answers.items():
        prompt, row = prompts[key[0]], rows[key[0]]
        score = scores[key].result() if key in scores else None
        same = (json.dumps(row["prompt"], sort_keys=True), sample.response.strip())
        if score is None:
            outcome = "cut_off"
        elif score.value is None:
            outcome = "no_verdict"
        elif final_text(sample.response, reasoning_open=prompt.reasoning_open) is None:
            outcome = "open_reasoning"
        elif score.value <= solved_above:
            outcome = "wrong"
        elif prompt.num_tokens + num_tokens(sample.response) > max_tokens:
            outcome = "too_long"
        else:
            outcome = "duplicate" if same in seen else "kept"
        counts.setdefault(prompt.data_source, Counter())[outcome] += 1
        if outcome == "kept":
            seen.add(same)
            kept.append({**row, "response": sample.response})
    return kept, counts
