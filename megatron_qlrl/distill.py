"""Distilled warm-up data (QwenLong-L1 section 4.1): a teacher answers, the scorer keeps.

prompts x samples -> teacher -> journal (a line a sample, on disk at once)
journal -> scorer, lengths, duplicates -> SFT rows + counts of what was dropped and why
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import TypeAdapter, ValidationError
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from megatron_qlrl.config.schema import TeacherConfig
from megatron_qlrl.errors import DataError
from megatron_qlrl.reward.endpoint import Endpoint, EndpointFailure, Endpoints
from megatron_qlrl.reward.extract import final_text
from megatron_qlrl.reward.score import Scorer
from megatron_qlrl.reward.verdict import NoVerdict
from megatron_qlrl.types import Prompt, Score

GIVE_UP_AFTER = 16
"""So many samples failed in a row: the teacher is gone, and what there is stays in the journal."""


MAX_REPLY_BYTES = 2**24
"""Enough for 100,000 tokens with every character as a JSON escape."""


@dataclass(frozen=True)
class Sample:
    """One answer of the teacher. `finished`: ended by itself."""

    uid: str
    sample: int
    response: str
    finished: bool


_SAMPLE = TypeAdapter(Sample)

# (row number, sample) -> the teacher's answer; None when it could not be had.
Ask = Callable[[int, int], Awaitable[Sample | None]]


def output_files(out: Path) -> tuple[Path, Path, Path]:
    """What `qlrl distill CONFIG out` writes: the SFT rows, the journal and the report."""
    return out, Path(f"{out}.journal.jsonl"), Path(f"{out}.report.json")


class Journal:
    """What the teacher has answered so far: JSONL, one line a sample, synced as it comes.

    The first line holds the settings; a line that a crash cut off is taken away.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """
        Raises:
            DataError: the journal belongs to other settings, or cannot be read or written.
        """
        self.samples: dict[tuple[str, int], Sample] = {}
        head = json.dumps({"settings": settings}, sort_keys=True)
        try:
            text = path.read_bytes() if path.exists() else b""
            first = text.partition(b"\n")[0].decode("utf-8")
            # Until here nothing is changed: the file may be no journal at all.
            if first != head and not head.startswith(text.decode("utf-8")):
                raise DataError(
                    f"{path} was begun with other settings ({first[:300]}); use the same, name "
                    "another OUT, or remove it to start again"
                )
            lines = _whole_lines(path) if text else []
            for number, line in enumerate(lines[1:], 2):
                sample = _sample(line, f"journal {path}, line {number}")
                self.samples[sample.uid, sample.sample] = sample
            self._file = path.open("a", encoding="utf-8")
            if not lines:
                self._write(head)
        except (OSError, ValueError) as error:
            raise DataError(f"journal {path} cannot be used: {error}") from error

    def add(self, sample: Sample) -> None:
        """Records a sample; it survives whatever comes next."""
        key = (sample.uid, sample.sample)
        assert key not in self.samples, key
        self._write(json.dumps(asdict(sample)))
        self.samples[key] = sample

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file; a last one without its line end is cut off the file."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode("utf-8").split("\n")[:-1]


def _sample(line: str, where: str) -> Sample:
    try:
        return _SAMPLE.validate_json(line, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "line"
        raise DataError(
            f"{where} cannot be used: {field}: {problem['msg']}; take the line out and start again"
        ) from None


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
            found = await ask(number, sample)
            if found is not None:
                journal.add(found)
                failed_in_row = 0
                continue
            failed += 1
            failed_in_row += 1
            if failed_in_row >= GIVE_UP_AFTER:
                raise DataError(
                    f"the teacher failed {failed_in_row} times in a row; "
                    f"{len(journal.samples)} of {len(prompts) * samples} samples are in the "
                    "journal: mend the teacher and start the same command again"
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
) -> tuple[list[dict[str, Any]], dict[str, Counter[str]]]:
    """(SFT rows in the order of prompts and samples, counts by data source).

    Kept are answers that ended by themselves, that the scorer calls correct, that fit, and that
    are not there already. `num_tokens` counts an answer by the student's tokenizer.
    """
    kept: list[dict[str, Any]] = []
    counts: dict[str, Counter[str]] = {}
    seen: set[tuple[str, str]] = set()
    by_uid = {prompt.uid: number for number, prompt in enumerate(prompts)}
    order = sorted((by_uid[uid], sample) for uid, sample in journal.samples if uid in by_uid)
    found = {key: journal.samples[prompts[key[0]].uid, key[1]] for key in order}
    # All at once: the judge has many requests in flight.
    scores = {
        key: _submit(scorer, prompts[key[0]], sample)
        for key, sample in found.items()
        if sample.finished
    }
    for key, sample in found.items():
        prompt, row = prompts[key[0]], rows[key[0]]
        score = scores[key].result() if key in scores else None
        same = (json.dumps(row["prompt"], sort_keys=True), sample.response.strip())
        if score is None:
            outcome = "cut_off"
        elif score.value is None:
            outcome = "no_verdict"
        elif final_text(sample.response, reasoning_open=prompt.reasoning_open) is None:
            outcome = "open_reasoning"
        elif score.value <= 0:
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


def _submit(scorer: Scorer, prompt: Prompt, sample: Sample) -> Future[Score]:
    return scorer.submit(
        data_source=prompt.data_source,
        question=prompt.question,
        ground_truth=prompt.ground_truth,
        response=sample.response,
        reasoning_open=prompt.reasoning_open,
    )


def fit_reasoning(response: str, *, reasoning_open: bool) -> str:
    """A teacher's response as what follows the student's generation prompt: without `<think>` where
    the prompt has opened it already, and with it where the response closes what nobody opened."""
    if reasoning_open:
        return response.lstrip().removeprefix("<think>").lstrip("\n")
    closes = "</think>" in response and "<think>" not in response
    return f"<think>\n{response}" if closes else response


class Teacher:
    """An OpenAI-compatible service that answers prompts; lives in one event loop."""

    def __init__(self, config: TeacherConfig, *, key: str | None) -> None:
        self.last_failure = ""
        self._config = config
        self._endpoints = Endpoints(
            [
                Endpoint(url, key=key, timeout_s=config.timeout_s, max_bytes=MAX_REPLY_BYTES)
                for url in config.urls
            ],
            cooldown_s=config.cooldown_s,
        )
        self._retrying = AsyncRetrying(
            stop=stop_after_attempt(config.attempts),
            wait=wait_random_exponential(multiplier=1, max=30),
            retry=retry_if_exception_type(EndpointFailure),
            reraise=True,
        )

    async def answer(
        self, session: aiohttp.ClientSession, request: Mapping[str, Any]
    ) -> tuple[str, bool] | None:
        """(the response after the generation prompt, whether it ended by itself); None when
        there is none to be had."""
        try:
            body = await self._retrying.wraps(self._post)(session, request)
            return read_answer(body)
        except (NoVerdict, EndpointFailure) as error:
            self.last_failure = str(error)
            return None

    async def _post(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> bytes:
        with self._endpoints.use() as endpoint:
            return await endpoint.chat(session, {"model": self._config.model, **request})


def read_answer(body: bytes) -> tuple[str, bool]:
    """Response and whether it is whole, of a chat completion. Servers that part the reasoning from
    the content (`reasoning` or `reasoning_content`) get them joined by the closing tag.

    Raises:
        NoVerdict: the body is no chat completion.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        content = message["content"] or ""
        reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
        finished = choice["finish_reason"] == "stop"
        f"{content}{reasoning}".encode()  # JSON can hold halves of characters
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NoVerdict(f"not a chat completion: {type(error).__name__}") from error
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise NoVerdict("not a chat completion: its text is none")
    if reasoning:
        return f"{reasoning.strip()}\n</think>\n\n{content.lstrip()}", finished
    return content, finished
