"""Makes the engine report log-probs over the whole vocabulary while it samples from the nucleus.

vLLM reports log-probs before temperature, or of what it samples from: after temperature, and
renormalised over the nucleus that top-p keeps. Instead it can report the logits that it samples
from ("processed_logits"), which are -inf outside the nucleus. A constant that is subtracted from
all logits of a token changes no sampling; with T logsumexp(z / T) as that constant, the logits are
log-probs of the whole vocabulary after the division by the temperature T.
"""

from collections.abc import Callable
from typing import Any

import torch

_ROWS = 32
"""Sequences that are normalised at one time, which bounds the memory beside the logits."""


def normalize_logits(model: Any, temperature: Callable[[], float]) -> None:
    """Replaces `model.compute_logits` of a vLLM model by one that normalises its logits.

    vLLM's own logits processors do not see the logits of a prompt, and have another interface in
    each of its two model runners. Condition for removal: vLLM reports log-probs after temperature
    and before top-p.

    Args:
        temperature: returns that of all sequences of the present batch; 1 if they are greedy.
    """
    compute_logits = model.compute_logits

    def normalized(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = compute_logits(*args, **kwargs)
        if logits is None:  # a rank that does not sample
            return None
        return subtract_logsumexp(logits.float(), temperature())

    model.compute_logits = normalized


def subtract_logsumexp(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Subtracts T logsumexp(z / T) from each row of float32 logits z [B, vocabulary], in place."""
    for rows in logits.split(_ROWS):
        rows.sub_(temperature * (rows / temperature).logsumexp(-1, keepdim=True))
    return logits
