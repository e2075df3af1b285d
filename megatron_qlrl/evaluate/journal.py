"""The answers of `qlrl eval` on disk as they come, so that a command that was killed goes on.

    <run.dir>/eval/eval.journal/<rank>.jsonl    a line for each answer of the engine that rank leads

Every answer carries a digest of all that it depends on. Answers of other weights, prompts or
settings stay in the files and are not used.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megatron_qlrl.errors import DataError
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.platform.journal import JournalFile, open_journal
from megatron_qlrl.rollout.seeds import EVALUATION_STEP, token_seed
from megatron_qlrl.types import Prompt, Rollout


@dataclass(frozen=True)
class Answer:
    """One line of a journal. `digest` stands for what the answer depends on."""

    uid: str
    sample: int
    digest: str
    response: str
    finished: bool
    token_ids: list[int]
    logprobs: list[float]


_ANSWER = TypeAdapter(Answer)


class AnswerJournal:
    """Implements `rollout.collect.Answers`."""

    def __init__(
        self,
        path: Path,
        known: Mapping[str, Rollout],
        *,
        run_seed: int,
        settings: Mapping[str, Any],
    ) -> None:
        """
        Args:
            path: this rank's file; it is made at the first answer.
            known: answers of all files by digest.
            settings: what all answers depend on beside prompt and seed.
        """
        self._path, self._known, self._run_seed = path, known, run_seed
        self._settings = json.dumps(settings, sort_keys=True).encode()
        self._file: JournalFile | None = None

    def known(self, prompt: Prompt, sample: int) -> Rollout | None:
        return self._known.get(self._digest(prompt, sample))

    def add(self, prompt: Prompt, rollout: Rollout) -> None:
        """Records an answer; it survives whatever comes next.

        Raises:
            DataError: it cannot be written.
        """
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = JournalFile(self._path)
        except (OSError, ValueError) as error:
            raise DataError(f"journal {self._path} cannot be written: {error}") from error
        answer = Answer(
            uid=prompt.uid,
            sample=rollout.sample,
            digest=self._digest(prompt, rollout.sample),
            response=rollout.text,
            finished=rollout.finished,
            token_ids=rollout.token_ids.tolist(),
            logprobs=rollout.engine_logprobs.tolist(),
        )
        self._file.add(json.dumps(asdict(answer)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _digest(self, prompt: Prompt, sample: int) -> str:
        seed = token_seed(self._run_seed, EVALUATION_STEP, prompt.uid, sample)
        parts = (self._settings, str(seed).encode(), prompt.token_ids.tobytes())
        return blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def read_answers(folder: Path) -> dict[str, Rollout]:
    """Returns the answers of a journal by digest, as those of the starting weights.

    Raises:
        DataError: a file cannot be used.
    """
    answers: dict[str, Rollout] = {}
    for path in sorted(folder.glob("*.jsonl")):
        file, lines = open_journal(path, _ANSWER)
        file.close()
        for answer in lines:
            answers[answer.digest] = Rollout(
                prompt_uid=answer.uid,
                sample=answer.sample,
                token_ids=np.array(answer.token_ids, dtype=np.int32),
                engine_logprobs=np.array(answer.logprobs, dtype=np.float32),
                text=answer.response,
                finished=answer.finished,
                weight_version=0,
            )
    return answers


def open_answers(
    folder: Path, *, rank: int, run_seed: int, settings: Mapping[str, Any]
) -> AnswerJournal:
    """Opens the journal on every rank with what rank 0 reads; collective.

    Raises:
        DataError: as `read_answers` (every rank).
    """
    own = on_all_ranks(lambda: read_answers(folder) if rank == 0 else {})
    known = gather_objects(own)[0]
    path = folder / f"{rank}.jsonl"
    return AnswerJournal(path, known, run_seed=run_seed, settings=settings)
