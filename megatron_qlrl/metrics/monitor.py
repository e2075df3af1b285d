"""Watches a run's metrics before every optimizer update and decides what to do about them.

    begin(rewards of the step) -> permit(metrics of an update)* -> end() -> demand

All metrics are the same on every rank, so every rank makes the same decisions.
"""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from statistics import median
from typing import Any, Literal

from megatron_qlrl.config.schema import Action, StabilityConfig

RULES = ("non_finite", "entropy_floor", "kl_spike", "gradient_spike", "reward_collapse")
_REWARD, _ENTROPY = "critic/rewards/mean", "actor/entropy"
_KL, _GRADIENT = "actor/kl_loss", "actor/grad_norm"
_SEVERITY: dict[Action, int] = {"ignore": 0, "warn": 1, "skip": 2, "stop": 3, "roll_back": 3}

Demand = Literal["stop", "roll_back"]


class Monitor:
    """Applies the rules of `StabilityConfig`.

    Attributes:
        demand: what the caller must do after the step, beside skipping updates.
        reason: the rule that demands it, and why.
    """

    def __init__(self, config: StabilityConfig, *, warn: Callable[[str], None]) -> None:
        self._config, self._warn = config, warn
        self._phase = 0
        self._recent: dict[str, list[float]] = {_REWARD: [], _KL: [], _GRADIENT: []}
        self._skips, self._roll_backs = 0, 0
        self._step = 0
        self._counts = self._no_counts()
        self._denied = False
        self._warned: set[str] = set()
        self.demand: Demand | None = None
        self.reason = ""

    def begin(self, step: int, phase: int, metrics: Mapping[str, float]) -> None:
        """Starts a step and judges the mean reward of its rollouts, unless it is missing or NaN.
        Values of different phases are never compared, because each phase is a task of its own."""
        if phase != self._phase:
            self._recent = {name: [] for name in self._recent}
        self._phase, self._step = phase, step
        self._counts, self._denied, self.demand = self._no_counts(), False, None
        self._denied = self._fire(self._judge_rewards(metrics)) >= _SEVERITY["skip"]
        self._remember(metrics, _REWARD)

    def permit(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether the update with these metrics may be applied."""
        severity = self._fire(self._judge_update(metrics))
        if self._denied or self.demand or severity >= _SEVERITY["skip"]:
            self._skip()
            return False
        self._skips = 0
        self._remember(metrics, _KL, _GRADIENT)
        return True

    def end(self) -> dict[str, float]:
        """Ends the step. Returns its counts (updates by rule, updates skipped) and the number of
        roll-backs of the run."""
        self._warned &= {rule for rule in RULES if self._counts[rule]}
        counts = {f"stability/{name}": float(n) for name, n in self._counts.items()}
        return counts | {"stability/roll_backs": float(self._roll_backs)}

    def rolled_back(self) -> None:
        """Records that the caller has rolled the run back."""
        self._roll_backs += 1
        self._skips = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later decisions depend on, ready for JSON."""
        return {
            "phase": self._phase,
            "recent": {name: list(values) for name, values in self._recent.items()},
            "skips": self._skips,
            "roll_backs": self._roll_backs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phase, self._skips = state["phase"], state["skips"]
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self._roll_backs = state["roll_backs"]

    def _judge_rewards(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Yields each rule that fires, with the reason."""
        typical = self._typical(_REWARD)
        factor = self._config.reward_collapse_factor
        if typical is not None and metrics.get(_REWARD, typical) < factor * typical:
            yield (
                "reward_collapse",
                f"{_REWARD} {metrics[_REWARD]:.4g} is below {factor:g} x its median {typical:.4g}",
            )

    def _judge_update(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        config = self._config
        odd = [
            f"{name} is {value}"
            for name in ("actor/pg_loss", "sft/nll", _GRADIENT)
            if not isfinite(value := metrics.get(name, 0.0))
        ]
        if odd:
            yield "non_finite", ", ".join(odd)
        entropy = metrics.get(_ENTROPY, config.entropy_floor_nats)
        if entropy < config.entropy_floor_nats:
            yield "entropy_floor", f"{_ENTROPY} {entropy:.4g} < {config.entropy_floor_nats:g}"
        spikes = (
            ("kl_spike", _KL, config.kl_spike_factor, config.kl_spike_min),
            ("gradient_spike", _GRADIENT, config.gradient_spike_factor, 0.0),
        )
        for rule, name, factor, least in spikes:
            typical, value = self._typical(name), metrics.get(name, 0.0)
            if typical is not None and value > max(factor * typical, least):
                yield rule, f"{name} {value:.4g} is above {factor:g} x its median {typical:.4g}"

    def _fire(self, findings: Iterator[tuple[str, str]]) -> int:
        """Counts and reports the rules that fire. Returns the severity of the gravest action."""
        gravest = 0
        for rule, why in findings:
            action: Action = getattr(self._config, rule)
            if action == "ignore":
                continue
            self._counts[rule] += 1
            gravest = max(gravest, _SEVERITY[action])
            if rule not in self._warned:  # warned of once, until it has been silent for a step
                self._warned.add(rule)
                self._warn(f"step {self._step}: {rule} ({action}): {why}")
            if action in ("stop", "roll_back") and self.demand is None:
                self._ask(action, f"step {self._step}: {rule}: {why}")
        return gravest

    def _skip(self) -> None:
        self._counts["skipped"] += 1
        self._skips += 1
        if self._skips > self._config.max_skips and self.demand is None:
            self._ask("stop", f"step {self._step}: {self._skips} updates skipped in a row")

    def _ask(self, demand: Demand, reason: str) -> None:
        if demand == "roll_back" and self._roll_backs >= self._config.max_roll_backs:
            demand, reason = "stop", f"{reason}; rolled back {self._roll_backs} times already"
        self.demand, self.reason = demand, reason

    def _typical(self, name: str) -> float | None:
        """Returns the recent median, or None while there are too few values."""
        values = self._recent[name]
        return median(values) if len(values) >= self._config.window else None

    def _remember(self, metrics: Mapping[str, float], *names: str) -> None:
        for name in names:
            if isfinite(value := metrics.get(name, float("nan"))):
                self._recent[name] = [*self._recent[name], value][-self._config.window :]

    @staticmethod
    def _no_counts() -> dict[str, int]:
        return dict.fromkeys((*RULES, "skipped"), 0)
