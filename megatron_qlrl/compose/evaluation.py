"""`Evaluation`: the held-out files scored through a run, when its config says so."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_qlrl.compose.data import read_benchmarks
from megatron_qlrl.compose.parts import rollout_records
from megatron_qlrl.compose.rollouts import Rollouts
from megatron_qlrl.config.schema import Config
from megatron_qlrl.evaluate.benchmarks import evaluate
from megatron_qlrl.metrics.sinks import Tracker
from megatron_qlrl.parallel.collectives import on_all_ranks
from megatron_qlrl.reward.diagnose import diagnosis
from megatron_qlrl.types import Prompt, ScoredGroup


class Evaluation:
    """The held-out files of one run. Methods are collective, but for the state.

    Attributes:
        scores: at the start and at the ends of phases, not in between, by "<which>: <metric>"; for
            the model card.
    """

    def __init__(
        self,
        config: Config,
        *,
        rollouts: Rollouts,
        write: Callable[[Callable[[Tracker], None]], object],
        warn: Callable[[str], None],
    ) -> None:
        """`write` runs what it is given on rank 0, with the run's tracker."""
        self.scores: dict[str, float] = {}
        self._steps_done: int | None = None  # at the newest evaluation
        self._config = config.evaluation
        self._read = partial(read_benchmarks, config)
        self._folder = Path(config.run.dir) / "eval"
        self._rollouts, self._write, self._warn = rollouts, write, warn
        self._benchmarks: dict[str, list[Prompt]] = {}

    def read(self, tokenizer: Any, *, max_positions: int) -> None:
        """Reads and checks the files; before weights are loaded, for that takes minutes."""
        self._benchmarks = on_all_ranks(partial(self._read, tokenizer, max_positions=max_positions))

    @property
    def prompts(self) -> list[Prompt]:
        """All that were read."""
        return [prompt for prompts in self._benchmarks.values() for prompt in prompts]

    def before_training(self, state: Mapping[str, Any]) -> None:
        """Unless the run goes on from a checkpoint with `state`."""
        if self._config.before_training and not state:
            self.score("start", 0)

    def after(self, steps_done: int, phase: str, *, last: bool) -> None:
        """After a step of phase `phase`, whose `last` one it may be, if it is the turn. At a
        resumed run's start, too: it may have ended in this evaluation."""
        every = self._config.every_steps
        if self._steps_done == steps_done:
            return
        if last and self._config.at_phase_end:
            self.score(phase, steps_done)
        elif every is not None and steps_done % every == 0:
            self._score(f"step_{steps_done}", steps_done)

    def score(self, name: str, steps_done: int) -> dict[str, float]:
        """Scores the held-out files, for `scores` too."""
        metrics = self._score(name, steps_done)
        self.scores |= {f"{name}: {k}": v for k, v in metrics.items() if k.endswith("/score")}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "steps_done": self._steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores, self._steps_done = dict(state["scores"]), state["steps_done"]

    def _score(self, name: str, steps_done: int) -> dict[str, float]:
        """Writes eval/<name>.json and, in .jsonl, the answers."""
        if not self._benchmarks:
            return {}
        answers: list[ScoredGroup] = []

        def answer(prompts: Sequence[Prompt]) -> list[ScoredGroup]:
            groups = self._rollouts.answer(prompts)
            answers.extend(groups)
            return groups

        metrics = evaluate(self._benchmarks, answer)
        metrics |= {f"val/{name}": value for name, value in self._rollouts.judge_metrics().items()}

        def write(tracker: Tracker) -> None:
            tracker.log(max(steps_done - 1, 0), metrics)  # steps count from 0
            self._write_answers(name, metrics, answers)

        self._write(write)
        if problem := diagnosis(answers):
            self._warn(f"evaluation {name!r}: {problem}")
        self._steps_done = steps_done
        return metrics

    def _write_answers(
        self, name: str, metrics: Mapping[str, float], answers: Sequence[ScoredGroup]
    ) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{name}.json").write_text(json.dumps(metrics, indent=1))
        rollouts = (r for g in answers for r in g.rollouts)
        with (self._folder / f"{name}.jsonl").open("w") as out:
            for record, rollout in zip(rollout_records(answers), rollouts, strict=True):
                record["token_ids"] = rollout.token_ids.tolist()
                record["logprobs"] = rollout.engine_logprobs.tolist()
                out.write(json.dumps(record) + "\n")
