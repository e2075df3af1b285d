"""`qlrl distill`: prompts, teacher, scorer and files joined. One process, no ranks."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_qlrl.compose.parts import load_tokenizer, make_scorer
from megatron_qlrl.config.schema import Config
from megatron_qlrl.data.control import escaped
from megatron_qlrl.data.dataset import load_prompts, load_rows, response_ids
from megatron_qlrl.distill import (
    Journal,
    Sample,
    Teacher,
    collect,
    fit_reasoning,
    output_files,
    select,
)
from megatron_qlrl.errors import DataError
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.platform.files import replaced
from megatron_qlrl.platform.lock import take_lock
from megatron_qlrl.reward.endpoint import open_session
from megatron_qlrl.reward.score import check_sources
from megatron_qlrl.rollout.sampler import token_seed
from megatron_qlrl.types import Prompt


def run_distill(config: Config, out: Path) -> None:
    """Writes the SFT parquet and the report, and prints the report; the journal is what a second
    start goes on from.

    Raises:
        DataError: rows cannot be used, the teacher is gone, or nothing was kept.
    """
    files, settings = config.data.train_files, config.distill
    tokenizer = load_tokenizer(Path(config.model.path))
    prompts = load_prompts(files, tokenizer=tokenizer, enable_thinking=config.data.enable_thinking)
    rows = load_rows(files)
    check_sources(prompts)
    assert settings.teacher is not None  # checked before
    identity = {
        "files": [Path(f).name for f in files],
        "prompts": len(prompts),
        "seed": config.run.seed,
        "teacher": settings.teacher.model,
        **settings.model_dump(include={"temperature", "top_p", "max_response_tokens"}),
    }
    # More samples or another length limit may be asked for later of the same journal.
    with (
        closing(take_lock(out.with_name(out.name + ".lock"), what=str(out))),
        closing(Journal(output_files(out)[1], identity)) as journal,
        closing(make_scorer(config)) as scorer,
    ):
        failed = asyncio.run(_collect(config, prompts, rows, journal, tokenizer))
        kept, counts = select(
            prompts,
            rows,
            journal,
            scorer,
            num_tokens=lambda text: len(response_ids(tokenizer, text)),
            max_tokens=settings.max_tokens,
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
    teacher = Teacher(settings.teacher, key=read_secret(settings.teacher.api_key_env))
    async with open_session(settings.teacher.concurrency) as session:

        async def ask(number: int, sample: int) -> Sample | None:
            prompt = prompts[number]
            seed = token_seed(
                run_seed=config.run.seed, step=0, prompt_uid=prompt.uid, sample=sample
            )
            found = await teacher.answer(
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
                    "seed": seed,
                },
            )
            if found is None:
                return None
            text, finished = found
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
