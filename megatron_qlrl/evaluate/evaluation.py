"""The held-out files of one run: when they are scored, and what is kept of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_qlrl.config.schema import EvaluationConfig
from megatron_qlrl.evaluate.benchmarks import benchmark_scores
from megatron_qlrl.evaluate.best import BestScore, HeldOutScore
from megatron_qlrl.evaluate.counted import CountedAnswers
from megatron_qlrl.evaluate.statistics import statistics
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.rollouts import rollout_records
from megatron_qlrl.metrics.sinks import Tracker
from megatron_qlrl.platform.progress import Progress, Tally
from megatron_qlrl.reward.diagnose import diagnosis
from megatron_qlrl.rollout.collect import Answers, Collector
from megatron_qlrl.rollout.seeds import EVALUATION_STEP
from megatron_qlrl.rollout.vllm_engine import Sampling
from megatron_qlrl.types import Prompt, ScoredGroup


class Evaluation:
    """Methods are collective, but for the state.

    Attributes:
        ranking: the best and the last of the evaluations `after` a step.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        benchmarks: Mapping[str, Sequence[Prompt]],
        *,
        collector: Collector,
        max_response_tokens: int,
        folder: Path,
        write: Callable[[Callable[[Tracker], None]], object],
        warn: Callable[[str], None],
        progress: Progress,
        journal: Answers | None = None,
    ) -> None:
        """`write` runs what it is given on rank 0, with the run's tracker; answers go into
        `folder`, and into the journal as they come."""
        self._steps_done: int | None = None  # at the newest evaluation
        self.ranking = BestScore(config.patience)
        self._config, self._benchmarks = config, benchmarks
        self._collector = collector
        self._sampling = evaluation_sampling(config, max_response_tokens)
        self._folder, self._write, self._warn = folder, write, warn
        self._progress, self._journal = progress, journal

    def before_training(self) -> None:
        """Scores the model that a fresh run starts from, if the config asks for it."""
        if self._config.before_training:
            self.score("start", 0)

    def after(self, steps_done: int, phase: str, *, last: bool) -> None:
        """Scores after a step of the phase (its last one?) if the config asks for it. A run that
        resumes asks again, because it may have ended in this evaluation."""
        every = self._config.every_steps
        if self._steps_done == steps_done:
            return
        if last and self._config.at_phase_end:
            name = phase
        elif every is not None and steps_done % every == 0:
            name = f"step_{steps_done}"
        else:
            return
        metrics = self.score(name, steps_done)
        # A mean over fewer benchmarks, because the judge was away, is not to be compared.
        if metrics and all(f"val/{benchmark}/score" in metrics for benchmark in self._benchmarks):
            error = metrics.get("val/standard_error")
            self.ranking.observe(HeldOutScore(steps_done, name, metrics["val/score"], error))

    def state_dict(self) -> dict[str, Any]:
        return {"steps_done": self._steps_done, "ranking": self.ranking.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps_done = state["steps_done"]
        if "ranking" in state:  # older checkpoints have none
            self.ranking.load_state_dict(state["ranking"])

    def score(self, name: str, steps_done: int) -> dict[str, float]:
        """Scores the held-out files. Writes <folder>/<name>.json and, in .jsonl, the answers. The
        statistics go into the file alone: they would make the tracker's lines too long to read."""
        if not self._benchmarks:
            return {}
        meter, answering, tally = Meter(), Meter(), Tally("responses of this engine")
        counted = CountedAnswers(self._journal, tally)
        with (
            meter.timed("testing"),
            self._collector.session(
                self._sampling, step=EVALUATION_STEP, meter=answering, answers=counted
            ) as collect,
        ):
            answers = {}
            for benchmark, prompts in self._benchmarks.items():
                tally.start()
                what = f"answering {len(prompts)} prompts of {benchmark}"
                with self._progress.doing(what, tally):
                    answers[benchmark] = collect(prompts)
        metrics = benchmark_scores(answers) | {
            f"val/{key}": value
            for key, value in answering.summary().items()
            if key.startswith(("reward/judge/", "reward/custom/"))
        }
        details = statistics(answers)
        groups = [group for answered in answers.values() for group in answered]

        def write(tracker: Tracker) -> None:
            tracker.log(max(steps_done - 1, 0), metrics | meter.summary())  # steps count from 0
            write_answers(self._folder, name, metrics | details, groups)

        self._write(write)
        if problem := diagnosis(groups):
            self._warn(f"evaluation {name!r}: {problem}")
        self._steps_done = steps_done
        return metrics | details


def write_answers(
    folder: Path, name: str, metrics: Mapping[str, float], answers: Sequence[ScoredGroup]
) -> None:
    """Writes <folder>/<name>.json, and the answers beside it in .jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(metrics, indent=1))
    rollouts = (r for g in answers for r in g.rollouts)
    with (folder / f"{name}.jsonl").open("w") as out:
        for record, rollout in zip(rollout_records(answers), rollouts, strict=True):
            record["token_ids"] = rollout.token_ids.tolist()
            record["logprobs"] = rollout.engine_logprobs.tolist()
            out.write(json.dumps(record) + "\n")


def evaluation_sampling(config: EvaluationConfig, max_response_tokens: int) -> Sampling:
    return Sampling(config.temperature, config.top_p, max_response_tokens, config.samples)
