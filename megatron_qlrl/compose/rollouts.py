"""`Rollouts`: engine, sampler and scorer joined; prompts in, scored groups out."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_qlrl.compose.parts import (
    check_masked,
    judge_metrics,
    make_scorer,
    stop_tokens,
    weight_dtype,
)
from megatron_qlrl.config.schema import Config
from megatron_qlrl.config.shape import ModelShape, hf_shapes
from megatron_qlrl.data.template import response_decoder
from megatron_qlrl.errors import StopRequested
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import ParallelContext
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.rollout.sampler import sample_groups, share_prompts
from megatron_qlrl.rollout.vllm_engine import Sampling, VllmEngine
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup
from megatron_qlrl.weights.stream import WeightStream, untied

EVALUATION_STEP = -1
"""Seeds of evaluation are drawn at this step, so that they never meet those of training."""


class Rollouts:
    """Methods are collective, but `close`.

    Args:
        weights: the policy's weights and their version; called before the first generation and
            then for each, and Megatron's part is made first: the order that is tested.
        give_up: asked while responses are generated: this rank's reason to stop, or "".
    """

    def __init__(
        self,
        config: Config,
        *,
        shape: ModelShape,
        context: ParallelContext,
        tokenizer: Any,
        weights: Callable[[], tuple[WeightStream, int]],
        give_up: Callable[[], str],
        progress: Progress,
    ) -> None:
        self._give_up, self._progress = give_up, progress
        self._config, self._shape, self._context = config, shape, context
        self._tokenizer, self._weights = tokenizer, weights
        self._scorer = on_all_ranks(partial(make_scorer, config))

    def close(self) -> None:
        self._scorer.close()
        if "_engine" in self.__dict__:
            self._engine.close()

    @cached_property
    def _engine(self) -> VllmEngine:
        with self._progress.doing("starting the vLLM engine"):
            return self._new_engine()

    def _new_engine(self) -> VllmEngine:
        config, rollout = self._config, self._config.rollout
        return VllmEngine(
            Path(config.model.path),
            tp=rollout.tp,
            rank=self._context.rank,
            world_size=self._context.world_size,
            dtype=weight_dtype(config),
            max_model_len=min(config.longest_generation, self._shape.max_positions),
            stop_token_ids=stop_tokens(Path(config.model.path), self._tokenizer),
            manifest=hf_shapes(self._shape.untied),
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            positions=self._shape.position_fields(),
            seed=config.run.seed,
            give_up=self._give_up,
        )

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[ScoredGroup]:
        """Groups to train on."""
        rollout = self._config.rollout
        sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_response_tokens)
        return self._generate(prompts, step, sampling, rollout.group_size)

    def answer(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """Groups to evaluate."""
        settings = self._config.evaluation
        longest = self._config.rollout.max_response_tokens
        sampling = Sampling(settings.temperature, settings.top_p, longest)
        with self._progress.doing(f"answering {len(prompts)} prompts"):
            return self._generate(prompts, EVALUATION_STEP, sampling, settings.samples)

    def judge_metrics(self) -> dict[str, float]:
        """What the judge did since the last call; nothing without a judge."""
        if self._config.reward.judge is None:
            return {}
        return judge_metrics(gather_objects(self._scorer.take_counts()))

    def _generate(
        self, prompts: Sequence[Prompt], step: int, sampling: Sampling, samples: int
    ) -> list[ScoredGroup]:
        """Every engine generates its share and scores each response as it ends; all ranks get
        all groups, in order.

        Raises:
            RewardError: too many responses have no verdict.
            StopRequested: on every rank, when any engine was stopped.
        """
        weights = self._weights()
        engine, scorer = self._engine, self._scorer
        share = share_prompts(prompts, engine.num_engines)[engine.engine_index]
        mine = [prompts[i] for i in share]
        scores: dict[tuple[int, int], Future[Score]] = {}

        def submit(number: int, rollout: Rollout) -> None:
            if engine.leads:
                prompt = mine[number]
                scores[number, rollout.sample] = scorer.submit(
                    data_source=prompt.data_source,
                    question=prompt.question,
                    ground_truth=prompt.ground_truth,
                    response=rollout.text,
                    reasoning_open=prompt.reasoning_open,
                )

        sample = partial(
            sample_groups,
            mine,
            group_size=samples,
            sampling=sampling,
            run_seed=self._config.run.seed,
            step=step,
            decode=response_decoder(self._tokenizer),
            on_done=submit,
        )
        found = self._sampled(sample, *weights)

        def finish() -> dict[int, ScoredGroup]:
            if not engine.leads:
                return {}
            wait(scores.values())  # one awakening in place of one for each
            return {
                share[n]: ScoredGroup(
                    mine[n], group, tuple(scores[n, r.sample].result() for r in group)
                )
                for n, group in enumerate(found)
            }

        parts = gather_objects((on_all_ranks(finish), scorer.last_failure))
        merged = {index: group for part, _ in parts for index, group in part.items()}
        groups = [merged[i] for i in range(len(prompts))]
        reason = next((failure for _, failure in parts if failure), "")
        check_masked(groups, max_share=self._config.reward.max_masked_share, reason=reason)
        return groups

    def _sampled(
        self,
        sample: Callable[..., list[tuple[Rollout, ...]]],
        stream: WeightStream,
        version: int,
    ) -> list[tuple[Rollout, ...]]:
        """`sample` by the engine with these weights; StopRequested on all ranks or on none."""
        found: list[tuple[Rollout, ...]] = []
        stopped = ""
        try:
            with self._engine.awake(untied(stream)) as generate:
                found = sample(generate=generate, weight_version=version)
        except StopRequested as request:
            stopped = str(request)
        reasons = [reason for reason in gather_objects(stopped) if reason]
        if reasons:
            raise StopRequested(reasons[0])
        return found
