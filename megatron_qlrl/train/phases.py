"""The phases of a run, and which of them run in one process."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_qlrl.config.schema import Config


@dataclass(frozen=True)
class Phase:
    """Steps [first_step, end_step) of a run.

    Attributes:
        next_reference: folder for the weights at the phase's end, where the next phase takes them
            as its reference policy.
    """

    index: int
    name: str
    first_step: int
    end_step: int
    next_reference: Path | None = None


@dataclass(frozen=True)
class PhaseGroup:
    """Consecutive phases that run in one process: they need the same layout, engine, reference
    policy and optimizer, and differ in their prompts alone.

    Attributes:
        config: the config of the last of them.
        is_last: no phase follows.
    """

    config: Config
    phases: list[Phase]
    is_last: bool


@dataclass(frozen=True)
class Handover:
    """What the processes of the next group need: the port where they meet, on rank 0 the descriptor
    of the socket that listens there, and the longest step so far in seconds."""

    port: int
    listener: int | None
    longest_step_s: float


def make_phases(config: Config) -> list[Phase]:
    """All phases of the run."""
    ends = accumulate(phase.steps for phase in config.phases)
    return [
        Phase(
            index,
            phase.name,
            end - phase.steps,
            end,
            _renewed_reference(config, index + 1) if _renews(config, index + 1) else None,
        )
        for index, (phase, end) in enumerate(zip(config.phases, ends, strict=True))
    ]


def phase_group_at(config: Config, step: int) -> PhaseGroup:
    """The group that step `step` of the run belongs to, or the last one beyond the run's end."""
    phases = make_phases(config)
    current = next((p.index for p in phases if step < p.end_step), len(phases) - 1)
    starts = [k for k in range(len(phases)) if k == 0 or _needs_new_process(config, k)]
    first = max(k for k in starts if k <= current)
    end = min((k for k in starts if k > current), default=len(phases))
    return PhaseGroup(config.for_phase(end - 1), phases[first:end], end == len(phases))


def reference_folder(config: Config, phase: int) -> Path:
    """Hugging Face folder of a phase's reference policy: what the run wrote at the start of the
    newest phase that renewed it, or model.path if none did. A run with a parent writes the parent's
    weights at the start of the first one."""
    renewed = [k for k in range(phase + 1) if _renews(config, k)]
    return _renewed_reference(config, renewed[-1]) if renewed else Path(config.model.path)


def fresh_steps(config: Config) -> frozenset[int]:
    """Steps at which a phase begins with a new optimizer state."""
    phases = zip(make_phases(config), config.phases, strict=True)
    return frozenset(p.first_step for p, own in phases if own.optimizer_state == "reset")


def _renewed_reference(config: Config, phase: int) -> Path:
    return Path(config.run.dir) / "references" / f"phase_{phase}"


def _renews(config: Config, phase: int) -> bool:
    """Whether there is such a phase and its reference is a folder of the weights at its start."""
    if phase == 0:
        return config.run.parent is not None
    return phase < len(config.phases) and config.phases[phase].reference == "renew"


def _needs_new_process(config: Config, phase: int) -> bool:
    before, now = config.phases[phase - 1], config.phases[phase]
    return (
        _renews(config, phase)
        or now.optimizer_state == "reset"
        or (now.overrides != before.overrides)
    )
