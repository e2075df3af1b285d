"""Runs vLLM in the trainer's own process (`external_launcher`); the only importer of vllm.

World ranks [i * tp, (i + 1) * tp) form engine i. The engine starts with dummy weights and gets the
trainer's through `awake`, which always puts it back to sleep, so that it never generates with stale
weights and its memory is free for the trainer.

On one H100 all of it was run (docs/gpus.md): sleep level 2, wake tags, the reload and the counts
with a batch queue; not yet on several GPUs.
"""

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import torch

from megatron_qlrl.errors import StopRequested, SyncError
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.platform.device import has_gpu
from megatron_qlrl.rollout.normalize import normalize_logits
from megatron_qlrl.types import ProbeAnswer


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` responses to each prompt; temperature 0 is greedy. `ignore_end` samples on
    after an end token, to `max_tokens` (benches force the lengths of responses)."""

    temperature: float
    top_p: float
    max_tokens: int
    n: int
    ignore_end: bool = False


@dataclass(frozen=True)
class Request:
    """One response to sample: the prompt (int32 [P]) and the seed of its tokens. `max_tokens`
    replaces that of `Sampling`."""

    prompt_ids: np.ndarray
    seed: int
    max_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: int32 [R], with the end token.
        logprobs: float32 [R], at the temperature and over the whole vocabulary (also with
            top_p < 1, see `rollout/normalize.py`).
        finished: whether the response ended by itself.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


Generate = Callable[[Sequence[Request], Sampling], Iterator[tuple[int, Completion]]]
"""Yields the number of a request and its response as soon as the response is complete."""
STOP_EVERY = 16
"""The number of engine steps after which the ranks ask each other whether to stop. A step samples
one token of each response, or reads some thousand tokens of prompts."""
COUNTS: tuple[str, ...] = (
    "prefill_tokens", "prefill_s", "decode_tokens", "decode_s", "generate_s", "prompt_tokens",
    "cached_tokens", "sibling_tokens", "sibling_cached_tokens", "preemptions", "sync_s",
    "sync_bytes",
)  # fmt: skip


class VllmEngine:
    """One rank's share of a rollout engine."""

    def __init__(
        self,
        model: Path,
        *,
        tp: int,
        rank: int,
        world_size: int,
        dtype: str,
        max_model_len: int,
        stop_token_ids: Sequence[int],
        manifest: Mapping[str, tuple[int, ...]],
        gpu_memory_utilization: float,
        enforce_eager: bool,
        positions: Mapping[str, Any],
        seed: int,
        give_up: Callable[[], str],
    ) -> None:
        """`set_engine_env` must have run before the first engine of the process is made.

        Args:
            manifest: names and shapes of the Hugging Face tensors that every weight update must
                hold, including the LM head of a model that ties it to the embedding.
            positions: fields of config.json on the number of positions and on RoPE scaling, which
                replace the folder's.
            give_up: returns this rank's reason to stop, or ""; called during generation.
        """
        from vllm import LLM
        from vllm.distributed import get_tp_group

        self.engine_index, self.num_engines = rank // tp, world_size // tp
        self.leads = rank % tp == 0
        self._progress = rank == 0 and sys.__stderr__ is not None and sys.__stderr__.isatty()
        self._stop = list(stop_token_ids)
        self._manifest = dict(manifest)
        self._give_up = give_up
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._read_before = False
        self._temperature = 1.0
        self._version = 0
        if tp > 1 and not has_gpu():
            _name_shared_memory(gather_objects(token_hex(8))[0])
        self._llm = LLM(
            model=str(model),
            tensor_parallel_size=tp,
            distributed_executor_backend="external_launcher",
            load_format="dummy",
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=True,
            **_platform_settings(max_model_len, enforce_eager),
            # Nothing from the model folder may change how we sample.
            generation_config="vllm",
            # The default reports log-probs BEFORE temperature, which no trainer can match, and
            # "processed_logprobs" those of the nucleus. These logits are log-probs (see normalize).
            logprobs_mode="processed_logits",
            # vLLM's reload leaves a tied LM head at its old weights ("ParallelLMHead: Failed to
            # load weights"), so the engine never ties: the trainer sends the head by name.
            hf_overrides={"tie_word_embeddings": False, **positions},
            disable_log_stats=True,
            seed=seed,
        )
        executor: Any = self._llm.llm_engine.model_executor  # pyright: ignore
        normalize_logits(executor.driver_worker.get_model(), lambda: self._temperature)
        self._ranks = get_tp_group().cpu_group
        self._block_tokens = self._llm.llm_engine.vllm_config.cache_config.block_size
        self._sleep()

    @contextmanager
    def awake(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> Iterator[Generate]:
        """Loads `weights` and yields `generate`; sleeps afterwards, also on an error. No prefix
        that weights of another `version` have computed is taken from the cache.

        Raises:
            SyncError: a tensor is missing, unknown, doubled or of another shape, or the engine
                cannot load it. If the engine then also fails to sleep, this error is still raised.
            StopRequested: (by `generate`) a rank of this engine has a reason to stop.
        """
        self._version = version
        try:
            with self._timed("sync_s"):
                self._wake("weights")
                self._reload(weights)
                self._wake("kv_cache")
            yield self._generate
        except BaseException as first:
            try:
                self._sleep()
            finally:
                # A half awake engine may fail to sleep; the first error is the one to report.
                raise first
        self._sleep()

    def close(self) -> None:
        """Ends the engine. vLLM then destroys every process group, including the trainer's, so this
        is the last thing a run does. Without it, the interpreter's exit shows a stack trace."""
        self._llm.llm_engine.engine_core.shutdown()

    def _reload(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        executor: Any = self._llm.llm_engine.model_executor  # pyright: ignore
        stream = iter(weights)
        try:
            _pack_experts_again(executor.driver_worker.get_model())
            # `model.load_weights` does not work after start on CPU, where weights are packed.
            executor.driver_worker.reload_weights(weights_iterator=self._checked(stream))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, KeyError, RuntimeError, ValueError, SyncError) as error:
            deque(stream, maxlen=0)  # the other ranks gather with this one to the end
            if isinstance(error, SyncError):
                raise
            raise SyncError(
                f"weight sync: the engine could not load the weights ({type(error).__name__}: "
                f"{error})"
            ) from error

    def _wake(self, part: str) -> None:
        if has_gpu():
            # torch must return what the update and the stream have freed, because the engine takes
            # its memory from the device.
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=[part])

    def _sleep(self) -> None:
        if has_gpu():
            self._llm.sleep(level=2)

    def _checked(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        missing = dict(self._manifest)
        for name, tensor in weights:
            if missing.pop(name, None) != tuple(tensor.shape):
                raise SyncError(
                    f"weight sync: {name} {tuple(tensor.shape)} was not expected; the model "
                    f"has {self._manifest.get(name, 'no such tensor')}"
                )
            self._counts["sync_bytes"] += tensor.nbytes
            yield name, tensor
        if missing:
            raise SyncError(f"weight sync: {len(missing)} tensors missing, e.g. {min(missing)}")

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        from tqdm import tqdm
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        # Cached prefixes may come from other weights; without them the responses depend on these
        # requests alone.
        self._llm.reset_prefix_cache()
        self._temperature = sampling.temperature or 1.0
        # `LLM.generate` would return nothing before the last response is complete.
        engine = self._llm.llm_engine
        salt = str(self._version)
        for number, request in enumerate(requests):
            engine.add_request(
                str(number),
                tokens_input(request.prompt_ids.tolist(), cache_salt=salt),
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=request.max_tokens or sampling.max_tokens,
                    stop_token_ids=[] if sampling.ignore_end else self._stop,
                    ignore_eos=sampling.ignore_end,
                    seed=request.seed,
                    logprobs=0,  # the sampled token's own
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
        left = {str(number) for number in range(len(requests))}
        siblings = _sibling_tokens(requests, self._block_tokens)
        steps = itertools.count()
        # The original stderr, because messages of other packages are sent to a file.
        bar = tqdm(
            total=len(requests), desc="responses", disable=not self._progress, file=sys.__stderr__
        )
        with self._timed("generate_s"), bar:
            while engine.has_unfinished_requests():
                if next(steps) % STOP_EVERY == 0 and (reason := self._reason_to_stop()):
                    engine.abort_request(sorted(left))
                    raise StopRequested(reason)
                for output in self._step(engine):
                    left.remove(output.request_id)
                    number = int(output.request_id)
                    self._count_prompt(
                        len(requests[number].prompt_ids),
                        cached=output.num_cached_tokens or 0,
                        sibling_tokens=siblings[number],
                    )
                    yield number, _completion(output.outputs[0])
                    bar.update()

    def probe(self, prompt_ids: np.ndarray, num_tokens: int) -> ProbeAnswer:
        """Reads the prompt and goes on from it greedily by `num_tokens` tokens, while awake. It is
        in no count."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._temperature = 1.0
        engine.add_request(
            "probe",
            tokens_input(prompt_ids.tolist(), cache_salt=str(self._version)),
            SamplingParams(
                temperature=0.0,
                max_tokens=num_tokens,
                ignore_eos=True,
                prompt_logprobs=0,  # the prompt's own; they keep the cache from being read
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )
        outputs: list[Any] = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        (output,) = outputs
        done = _completion(output.outputs[0])
        read = [
            position[token].logprob
            for position, token in zip(output.prompt_logprobs, prompt_ids.tolist(), strict=True)
            if position is not None  # nothing predicts the first token
        ]
        return ProbeAnswer(
            token_ids=np.concatenate([prompt_ids, done.token_ids]),
            logprobs=np.concatenate([np.array(read, np.float32), done.logprobs]),
            num_prompt=len(prompt_ids),
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._counts[name] += time.perf_counter() - began

    def _count_prompt(self, tokens: int, *, cached: int, sibling_tokens: int) -> None:
        self._counts["prompt_tokens"] += tokens
        self._counts["cached_tokens"] += cached
        self._counts["prefill_tokens"] += tokens - cached
        self._counts["sibling_tokens"] += sibling_tokens
        self._counts["sibling_cached_tokens"] += min(cached, sibling_tokens)

    def _step(self, engine: Any) -> list[Any]:
        """Runs one step of the engine and returns the responses that are complete. Its time counts
        as prefill if it reads a prompt; otherwise its time and its tokens count as decode."""
        core = engine.engine_core.engine_core
        running = list(core.scheduler.running)
        reads = any(r.num_computed_tokens < r.num_prompt_tokens for r in running)
        waiting = len(core.scheduler.waiting)
        before = sum(r.num_output_tokens for r in running)
        preempted = sum(r.num_preemptions for r in running)
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        # A step preempts none of the requests that it admits.
        self._counts["preemptions"] += sum(r.num_preemptions for r in running) - preempted
        reads = reads or len(core.scheduler.waiting) < waiting
        # With a batch queue (on a GPU), a step schedules a batch and then waits for the one before.
        prefill = reads if core.batch_queue is None else self._read_before
        self._read_before = reads
        if prefill:
            self._counts["prefill_s"] += seconds
        else:
            self._counts["decode_s"] += seconds
            self._counts["decode_tokens"] += sum(r.num_output_tokens for r in running) - before
        return outputs

    def take_counts(self) -> dict[str, float]:
        """Returns what the engine did since the last call, or {} on ranks that do not lead it:

        prefill_tokens, prefill_s: prompt tokens read, without those in the prefix cache, and the
            seconds of steps that read a prompt.
        decode_tokens, decode_s: tokens sampled in the other steps, and their seconds.
        generate_s: seconds until the last response, the caller's work between responses included.
        prompt_tokens, cached_tokens: tokens of all prompts, and those found in the prefix cache.
        sibling_tokens, sibling_cached_tokens: tokens in the full blocks of a prompt that an
            earlier request has as well, and those found in the prefix cache.
        preemptions: how often a request lost its cache to others and had to start again.
        sync_s, sync_bytes: seconds and bytes of loading weights, without going to sleep.
        """
        taken, self._counts = self._counts, dict.fromkeys(COUNTS, 0.0)
        return taken if self.leads else {}

    def _reason_to_stop(self) -> str:
        """Returns a reason of any rank of this engine, or "": all ranks stop at the same step."""
        reasons = gather_objects(self._give_up(), self._ranks)
        return next(filter(None, reasons), "")


def _platform_settings(max_model_len: int, enforce_eager: bool) -> dict[str, Any]:
    if has_gpu():
        return {"enable_sleep_mode": True, "enforce_eager": enforce_eager}
    # A seeded request whose prefill is split into chunks fails on CPU ("CPU Generator does not use
    # offset"), so every prompt is computed in one step. Siblings take whole blocks of their prompt
    # from the cache and compute the rest again: of the default blocks of 128 that is 64 tokens on
    # average for each of them, of the smallest that the CPU kernel takes 16.
    return {
        "enforce_eager": True,
        "block_size": 32,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 4096),
    }


def _name_shared_memory(job: str) -> None:
    """Names the memory that the ranks of an engine on a CPU share after `job` too. vLLM 0.32 names
    it by the numbers of the ranks alone: two jobs on a machine would meet in it, and a job could
    not start after one that was killed ("create shm in SHMManager failed")."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name_of = _CPUSHMDistributed.make_group_name

    def named(communicator: Any) -> str:
        return f"{name_of(communicator)}-{job}"

    _CPUSHMDistributed.make_group_name = staticmethod(named)


def _pack_experts_again(model: torch.nn.Module) -> None:
    """Makes the reload pack the experts' weights on CPU, where vLLM 0.32 does it only with the
    weights of the start: it leaves those of a reload unpacked, and the kernel reads them packed. On
    a GPU the kernel is kept, because nothing is packed and CUDA graphs know it. Condition for
    removal: `UnquantizedFusedMoEMethod._setup_kernel` packs on a weight update too."""
    if has_gpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None  # as before the first weights


def _sibling_tokens(requests: Sequence[Request], block: int) -> list[int]:
    """Returns, for each request whose prompt an earlier one has, the tokens that it can take from
    the cache: whole blocks, and never the last token of the prompt. For others it returns 0."""
    seen: set[bytes] = set()
    tokens = []
    for request in requests:
        prompt = request.prompt_ids.tobytes()
        tokens.append((len(request.prompt_ids) - 1) // block * block if prompt in seen else 0)
        seen.add(prompt)
    return tokens


def _completion(output: Any) -> Completion:
    ids = np.array(output.token_ids, np.int32)
    chosen = [
        position[token].logprob
        for position, token in zip(output.logprobs, ids.tolist(), strict=True)
    ]
    return Completion(ids, np.array(chosen, np.float32), output.finish_reason == "stop")
