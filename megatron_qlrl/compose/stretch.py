"""Which phases run in one process: those that need the same layout, engine and reference."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_qlrl.config.schema import Config
from megatron_qlrl.loop import Phase


@dataclass(frozen=True)
class Stretch:
    """Phases [first, end) of a run, which share everything but their prompts.

    Attributes:
        config: of the last of them; the others differ in their prompts' lengths alone.
        is_last: no phase follows.
    """

    config: Config
    phases: list[Phase]
    is_last: bool


def stretch_at(config: Config, step: int) -> Stretch:
    """The stretch that step `step` of the run belongs to; the last one when there is no such."""
    phases = make_phases(config)
    current = next((p.index for p in phases if step < p.end_step), len(phases) - 1)
    starts = [k for k in range(len(phases)) if k == 0 or _starts_anew(config, k)]
    first = max(k for k in starts if k <= current)
    end = min((k for k in starts if k > current), default=len(phases))
    return Stretch(config.for_phase(end - 1), phases[first:end], end == len(phases))


@dataclass(frozen=True)
class Handover:
    """To the processes that go on with the next phases: where they meet, and the longest step so
    far, in seconds."""

    port: int
    longest_step_s: float


def make_phases(config: Config) -> list[Phase]:
    ends = list(accumulate(p.steps for p in config.phases))
    return [
        Phase(index, phase.name, end - phase.steps, end)
        for index, (phase, end) in enumerate(zip(config.phases, ends, strict=True))
    ]


def reference_folder(config: Config, phase: int) -> Path:
    """Hugging Face folder of a phase's reference policy: model.path, or what the run wrote at the
    start of the newest phase that renewed it."""
    renewed = [k for k in range(phase + 1) if renews_reference(config, k)]
    if not renewed:
        return Path(config.model.path)
    return Path(config.run.dir) / "references" / f"phase_{renewed[-1]}"


def renews_reference(config: Config, phase: int) -> bool:
    """Whether there is such a phase and it takes the weights at its start as reference."""
    return 0 < phase < len(config.phases) and config.phases[phase].reference == "renew"


def fresh_steps(config: Config) -> frozenset[int]:
    """Steps at which a phase begins with an optimizer that starts anew."""
    phases = zip(make_phases(config), config.phases, strict=True)
    return frozenset(p.first_step for p, own in phases if own.optimizer_state == "reset")


def _starts_anew(config: Config, phase: int) -> bool:
    before, now = config.phases[phase - 1], config.phases[phase]
    changes = now.reference == "renew" or now.optimizer_state == "reset"
    return changes or now.overrides != before.overrides
