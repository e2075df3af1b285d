"""AEPO, adaptive entropy-controlled policy optimization (QwenLong-L1.5, arXiv 2512.12967).

Responses with a negative advantage push probability towards all other tokens, which raises the
entropy. While it is too high, the policy learns from good responses alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_qlrl.types import PackedRow


class EntropyControl:
    """Masks responses with a negative advantage, from the update after one whose entropy was above
    `high` until the one whose entropy is below `low`. In between nothing changes.

    Attributes:
        masking: whether the next update leaves them out.
    """

    def __init__(self, band: tuple[float, float]) -> None:
        """`band`: (low, high), entropies of an update in nats (`actor/response_entropy`)."""
        self._low, self._high = band
        self.masking = False

    def masked(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """Returns the rows of the next update, with advantage 0 where it is negative and masked.
        Loss weights stay, so the update is divided by the same number of tokens or responses."""
        if not self.masking:
            return list(rows)
        return [
            replace(
                row, columns={**row.columns, "advantages": row.columns["advantages"].clip(min=0)}
            )
            for row in rows
        ]

    def observe(self, entropy: float) -> None:
        """Takes in the entropy of an update: the mean over its responses, masked or not, of the
        mean over their tokens. One that is not a number changes nothing."""
        if entropy > self._high:
            self.masking = True
        elif entropy < self._low:
            self.masking = False
