"""What `qlrl eval` keeps of its answers, and what it asks again after it was killed."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_qlrl.errors import DataError, StopRequested
from megatron_qlrl.evaluate.journal import AnswerJournal, read_answers
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.rollout.collect import Collector, collect_groups
from megatron_qlrl.rollout.seeds import EVALUATION_STEP
from megatron_qlrl.rollout.vllm_engine import Completion, Request, Sampling
from megatron_qlrl.types import Prompt, Score, ScoredGroup

pytestmark = pytest.mark.usefixtures("lone_group")
PROMPTS = [Prompt(f"a:{i}", np.arange(i + 2, dtype=np.int32), "qa", "?", "!") for i in range(5)]
SAMPLING = Sampling(1.0, 1.0, 8, 2)
SETTINGS = {"weights": "abc", "temperature": 1.0}


class SeededEngine:
    """Gives an answer that the seed alone decides, and stops after `limit` answers."""

    num_engines, engine_index, leads = 1, 0, True

    def __init__(self, limit: int = 99) -> None:
        self.limit, self.asked = limit, 0

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        for number, request in reversed(list(enumerate(requests))):
            if self.asked == self.limit:
                raise StopRequested("killed")
            self.asked += 1
            rng = np.random.default_rng(request.seed)
            ids = rng.integers(99, size=1 + request.seed % 4).astype(np.int32)
            yield number, Completion(ids, -rng.random(len(ids), np.float32), len(ids) < 4)


class Scorer:
    last_failure = ""

    def score(self, prompt: Prompt, response: str) -> Future[Score]:
        done: Future[Score] = Future()
        done.set_result(Score(float(len(response) % 2), 0.0))
        return done

    def take_counts(self) -> dict[str, float]:
        return {}

    def take_custom_counts(self) -> dict[str, float]:
        return {}


def answer(
    folder: Path, engine: SeededEngine, prompts: Sequence[Prompt] = PROMPTS, **settings: Any
) -> list[ScoredGroup]:
    collector = Collector(
        engine=lambda: engine,  # pyright: ignore
        weights=lambda: ([], 0),
        decode=lambda ids: ".".join(map(str, ids)),
        scorer=Scorer(),
        run_seed=settings.pop("run_seed", 0),
        max_masked_share=0.0,
    )
    journal = AnswerJournal(
        folder / "0.jsonl",
        read_answers(folder),
        run_seed=collector.run_seed,
        settings=SETTINGS | settings,
    )
    try:
        return collect_groups(
            collector, prompts, engine.generate, 0, SAMPLING, EVALUATION_STEP, Meter(), journal
        )
    finally:
        journal.close()


def facts(groups: Sequence[ScoredGroup]) -> list[Any]:
    return [
        (r.prompt_uid, r.sample, r.text, r.token_ids.tolist(), r.engine_logprobs.tobytes(),
         r.finished, s.value)
        for g in groups
        for r, s in zip(g.rollouts, g.scores, strict=True)
    ]  # fmt: skip


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    whole = answer(tmp_path / "whole", SeededEngine())
    with pytest.raises(StopRequested):
        answer(tmp_path, SeededEngine(limit=7))
    file = tmp_path / "0.jsonl"
    before = file.read_text()
    assert before.count("\n") == 7
    file.write_text(before + '{"uid": "a:0", "sam')  # cut off by the kill

    engine = SeededEngine()
    assert facts(answer(tmp_path, engine)) == facts(whole)
    assert engine.asked == 3
    assert file.read_text().startswith(before)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((r["uid"], r["sample"]) for r in records) == [
        (p.uid, k) for p in PROMPTS for k in range(2)
    ]

    again = SeededEngine()
    assert facts(answer(tmp_path, again)) == facts(whole)
    assert again.asked == 0


def test_answers_of_something_else_are_not_used(tmp_path: Path) -> None:
    answer(tmp_path, SeededEngine())
    for changed in ({"weights": "other"}, {"run_seed": 1}):
        engine = SeededEngine()
        answer(tmp_path, engine, **changed)
        assert engine.asked == 10
    edited = [replace(PROMPTS[0], token_ids=np.array([7, 7], np.int32)), *PROMPTS[1:]]
    engine = SeededEngine()
    answer(tmp_path, engine, edited)
    assert engine.asked == 2
    engine = SeededEngine()
    answer(tmp_path, engine)  # the first ones are still there
    assert engine.asked == 0


def test_answers_of_all_engines_are_read(tmp_path: Path) -> None:
    answer(tmp_path, SeededEngine())
    lines = (tmp_path / "0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_text("".join(lines[:4]))
    (tmp_path / "4.jsonl").write_text("".join(lines[4:]))
    engine = SeededEngine()
    answer(tmp_path, engine)
    assert engine.asked == 0


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text('{"uid": 3}\n')
    with pytest.raises(DataError, match=r"1\.jsonl, line 1 cannot be used: uid: Input should be"):
        read_answers(tmp_path)
