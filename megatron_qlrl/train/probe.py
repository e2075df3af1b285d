"""After each weight sync, a fixed prompt shows whether the engines have the trainer's weights.

Each engine reads the prompt and goes on from it greedily; the trainer computes the log-probs of the
same tokens. They may differ by rounding, and how much that is depends on the model. It is measured
beside them: what the trainer's own log-probs change when each layer's output is off by one rounding
of its type (random, normal). Engines on a CPU were off by 0.5 to 3 times as much, in float32 and
bfloat16, with 2 and with 30 layers.

With experts, rounding now and then gives a token another expert, which changes its log-probs by
many times the noise: of 20 bfloat16 checks with 2 layers, 2 had one token off by 0.18 and so a
root mean square of 5 and 7 times the noise. In bfloat16 both sides are then measured by the
median, which one token does not move (at most 2.5 times), and which weights of another version do.

In bfloat16, what one stale layer of a small update changes is less than the rounding, and no
log-prob can show it. An engine that is stale as a whole shows at any size of the update: its
log-probs do not move at all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_qlrl.errors import SyncError
from megatron_qlrl.packing.distribute import group_rows
from megatron_qlrl.parallel.collectives import gather_objects
from megatron_qlrl.policy.policy import Policy
from megatron_qlrl.policy.selfcheck import without_fp8
from megatron_qlrl.types import ProbeAnswer, TrainGroup, TrainResponse

ALLOWED_NOISE = 8.0
"""An error up to this many times the rounding noise passes."""


@dataclass(frozen=True)
class _Expected:
    """The trainer's log-probs of an answer's tokens (float64 [P + D - 1]) and their rounding noise
    (root mean square, or median)."""

    logprobs: np.ndarray
    noise: float


@dataclass(frozen=True)
class _Checked:
    """What the engines answered after one weight sync, and what the trainer expected of each."""

    version: int
    answers: Sequence[ProbeAnswer]
    expected: Sequence[_Expected]


class WeightProbe:
    """Compares engines with the policy.

    Attributes:
        prompt_ids: int32 [P], random tokens of the vocabulary, the same in every run.
        num_tokens: D, by how many tokens an engine goes on.
    """

    def __init__(self, policy: Policy, *, max_tokens: int) -> None:
        """`max_tokens`: no sequence of an engine is longer."""
        self._policy = policy
        coarse = policy.model.config.params_dtype is torch.bfloat16
        self._size = _median if coarse and policy.model_shape.experts else _rms
        self.num_tokens = min(8, max_tokens // 2)
        vocab = policy.model_shape.vocab_size
        length = min(32, max_tokens - self.num_tokens)
        self.prompt_ids = np.random.default_rng(0).integers(0, vocab, length).astype(np.int32)
        self._last: _Checked | None = None

    def check(self, answer: ProbeAnswer | None) -> dict[str, float]:
        """Compares what the engines answered with the policy's present weights and returns the
        largest errors as metrics. Collective; `answer` is None on ranks that lead no engine.

        Raises:
            SyncError: an engine has other weights than the trainer (every rank).
        """
        answers = [a for a in gather_objects(answer) if a is not None]
        last = self._last
        now = self._last = _Checked(self._policy.version, answers, self._expected(answers))
        problem, metrics = gather_objects(_judge(now, last, self._size))[0]
        if problem:
            raise SyncError(
                f"weight sync: {problem}, with weights of version {self._policy.version}. Start "
                "again: the run resumes. If it happens again, report it with the output of `qlrl "
                "check`; rollout.check_sync=false trains without this check, and "
                "training/rollout_probs_diff_mean shows the difference"
            )
        return metrics

    def _expected(self, answers: Sequence[ProbeAnswer]) -> list[_Expected]:
        """Every data-parallel rank computes all sequences, most often a single one."""
        kinds = [a.token_ids.tobytes() for a in answers]
        distinct = {kind: a.token_ids for kind, a in zip(kinds, answers, strict=True)}
        rows = [row for ids in distinct.values() for row in _rows(ids)]

        def logprobs() -> list[np.ndarray]:
            named = self._policy.add_logprobs(rows, "probe")
            return [row.columns["probe"].astype(np.float64) for row in named]

        with self._policy.at_temperature(1.0), without_fp8(self._policy.model.config):
            plain = logprobs()
            with _rounded_once_more(self._policy.model):
                noisy = logprobs()
        # A log-prob is kept in float32, whatever the model's type.
        least, size = torch.finfo(torch.float32).eps, self._size
        by_kind = {
            kind: _Expected(p, max(size(n - p), least * size(p)))
            for kind, p, n in zip(distinct, plain, noisy, strict=True)
        }
        return [by_kind[kind] for kind in kinds]


def _median(values: np.ndarray) -> float:
    return float(np.median(np.abs(values)))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _rows(ids: np.ndarray) -> Any:
    group = TrainGroup(ids[:1], (TrainResponse(ids[1:], 0.0),))
    return group_rows(group, max_tokens=len(ids), share_prompt=True, cost=lambda p, r: 1.0)


@contextmanager
def _rounded_once_more(model: Any) -> Iterator[None]:
    """A block in which each layer's output has a random relative error of its type's unit
    round-off. Tensor parallel ranks, which hold the same output, draw the same errors."""

    def disturb(layer: Any, _: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        generator = torch.Generator().manual_seed(layer.layer_number)
        errors = torch.randn(states.shape, generator=generator, dtype=torch.float64)
        unit = torch.finfo(states.dtype).eps / 2
        disturbed = (states.double() * (1 + unit * errors).to(states.device)).to(states.dtype)
        return (disturbed, *output[1:]) if isinstance(output, tuple) else disturbed

    hooks = [layer.register_forward_hook(disturb) for layer in model.decoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _judge(
    now: _Checked, last: _Checked | None, size: Callable[[np.ndarray], float] = _rms
) -> tuple[str, dict[str, float]]:
    """Returns what is wrong with an engine, or "", and the metrics. `size` is how differences are
    measured, noise and errors alike."""
    if not all(np.isfinite(right.logprobs).all() for right in now.expected):
        return "", {}  # the policy itself has diverged, which is not the engine's fault
    problem, errors = "", {"prefill": 0.0, "decode": 0.0}
    for engine, (answer, right) in enumerate(zip(now.answers, now.expected, strict=True)):
        read = answer.num_prompt - 1
        differences = answer.logprobs - right.logprobs
        for kind, part in (("prefill", differences[:read]), ("decode", differences[read:])):
            ratio = size(part) / right.noise
            errors[kind] = max(errors[kind], ratio)
            if not problem and not ratio <= ALLOWED_NOISE:  # NaN, too
                problem = (
                    f"engine {engine} does not have the trainer's weights: by {kind}, its "
                    f"log-probs of the probe are off by {size(part):.1e}, {ratio:.0f} times their "
                    f"rounding noise (allowed: {ALLOWED_NOISE:.0f} times)"
                )
        if not problem and last is not None and _stands_still(engine, now, last):
            problem = (
                f"engine {engine} has kept its old weights: its log-probs of the probe are those "
                f"of version {last.version} to the last bit, and the trainer's are not"
            )
    return problem, {f"training/probe_{kind}_error": error for kind, error in errors.items()}


def _stands_still(engine: int, now: _Checked, last: _Checked) -> bool:
    """Returns whether the prefill's log-probs of an engine are all as before an update that changed
    at least half of the trainer's. (One that changes fewer may vanish in the engine's rounding.)"""
    if now.version == last.version:
        return False
    prefill = slice(now.answers[engine].num_prompt - 1)
    before, after = (c.answers[engine].logprobs[prefill] for c in (last, now))
    moved = last.expected[engine].logprobs[prefill] != now.expected[engine].logprobs[prefill]
    return bool(moved.mean() >= 0.5 and np.array_equal(before, after))
