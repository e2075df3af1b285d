"""Which checkpoint a run goes on from, and what a step and a save leave behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_policy import FakePolicy

from megatron_qlrl.config.schema import Config, StabilityConfig
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.evaluate.best import BestScore, HeldOutScore
from megatron_qlrl.metrics.meter import Meter
from megatron_qlrl.metrics.monitor import Monitor
from megatron_qlrl.platform.progress import Progress
from megatron_qlrl.train import recorder as recorder_file
from megatron_qlrl.train.recorder import Recorder, newest_checkpoint
from megatron_qlrl.train.run_log import RunLog
from megatron_qlrl.types import Prompt, Rollout, Score, ScoredGroup
from megatron_qlrl.weights.checkpoint import CheckpointStore
from megatron_qlrl.weights.checkpoint_folder import FORMAT, read_state

pytestmark = pytest.mark.usefixtures("lone_group")


def checkpoint_of(run: Path, **state: Any) -> Path:
    return write_checkpoint(run / "checkpoints" / "step_00000003", state)


def newest(run: Path) -> Path | None:
    store = CheckpointStore(run / "checkpoints", keep=1, warn=print)
    return newest_checkpoint(store, "rl")


def test_run_goes_on_from_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    folder = checkpoint_of(tmp_path, format=FORMAT, command="rl")
    assert newest(tmp_path) == folder


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": FORMAT, "command": "sft"}, "a run of `qlrl sft`, which `qlrl rl` cannot"),
        ({"format": FORMAT, "command": "import"}, "a run of `qlrl import`, which `qlrl rl` cannot"),
        ({"command": "rl"}, f"has format 1, this version of megatron_qlrl reads {FORMAT}"),
        ({"format": 99, "command": "rl"}, "has format 99"),
        (
            {"format": FORMAT},
            r"does not hold the state that this run needs \(KeyError: 'command'\)",
        ),
    ],
)
def test_run_does_not_go_on_from_another_one(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    checkpoint_of(tmp_path, **state)
    with pytest.raises(CheckpointError, match=message):
        newest(tmp_path)


WEIGHTS_ALONE = ["load weights", "optimizer takes the weights", "fresh moments"]


class FakeParts(FakePolicy):
    """Policy, optimizer, checkpoint store, evaluation and the data's state in one."""

    model = "the model"
    checkpoint: Path | None = None
    released = 0

    def __init__(self) -> None:
        super().__init__()
        self.scores = {"start: val/score": 0.25}
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.spared: list[int | None] = []
        self.ranking = BestScore(None)

    @property
    def optimizer(self) -> "FakeParts":
        return self

    def reload_model_params(self) -> None:
        self.calls.append("optimizer takes the weights")

    def newest(self) -> Path | None:
        return self.checkpoint

    def save(
        self, step: int, *, model: Any, optimizer: Any, state: Any, companions: Any, spare: Any
    ) -> None:
        assert (model, optimizer) == (self.model, self)
        self.saved.append((step, state))
        self.spared.append(spare)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "released": self.released}

    def load_state_dict(self, state: Any) -> None:
        self.scores = state["scores"]

    def release(self) -> None:
        self.released += 1


class FakeTrainer:
    def state_dict(self) -> dict[str, Any]:
        return {"masking": True}


class Made:
    """A recorder in `folder`, its parts, and what it warned of."""

    def __init__(self, folder: Path) -> None:
        self.parts: Any = FakeParts()
        self.warnings: list[str] = []
        self.doing: list[str] = []
        self.monitor = Monitor(
            StabilityConfig.model_validate({"non_finite": "roll_back"}), warn=lambda _: None
        )
        settings = {"model": {"path": "m"}, "run": {"dir": str(folder)}}
        config = Config.model_validate(settings | {"logging": {"tensorboard": False}})
        self.log = RunLog(config, is_writer=True)
        self.recorder = Recorder(
            policy=self.parts,
            stream=self.parts,
            store=self.parts,
            log=self.log,
            evaluation=self.parts,
            monitor=self.monitor,
            model=config.model,
            dtype="float32",
            facts={"base model": "m", "seed": 0},
            card=lambda facts, step, folder: "",
            identity={"command": "rl", "fingerprint": {"seed": 0}},
            rollouts_per_step=1,
            fresh_steps=frozenset({8}),
            keep_best=True,
            progress=Progress(self.doing.append),
            warn=self.warnings.append,
        )

    def record(self, step: int, *, data: Any = None, loss: float = 0.0) -> None:
        """A step of 2 seconds and 52 tokens with two groups."""
        meter = Meter()
        meter.add("timing_s/step", 2.0)
        self.monitor.begin(step, 0, {})
        self.monitor.permit({"actor/pg_loss": loss})
        groups = [scored("a:0"), scored("a:1")]
        trainer: Any = FakeTrainer()
        self.recorder.record(step, meter, groups, num_tokens=52, trainer=trainer, data=data)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(uid: str) -> ScoredGroup:
    ids = np.zeros(2, np.int32)
    rollout = Rollout(uid, 0, ids, np.zeros(2, np.float32), "yes", True, 0)
    return ScoredGroup(Prompt(uid, ids, "toy_docqa", "?", "!"), (rollout,), (Score(1.0, 1.0),))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Checkpoints are loaded into nothing; the calls are noted."""
    made = Made(tmp_path)

    def load(what: str) -> Any:
        def noted(path: Path, **_: Any) -> dict[str, Any]:
            made.parts.calls.append(f"load {what}")
            return read_state(path)

        return noted

    monkeypatch.setattr(recorder_file, "load_checkpoint", load("all"))
    monkeypatch.setattr(recorder_file, "load_weights", load("weights"))
    return made


STATE = {
    "format": FORMAT,
    "step": 3,
    "version": 5,
    "evaluation": {"scores": {"short: val/score": 0.5}},
    "monitor": {
        "phase": 1,
        "recent": {"critic/rewards/mean": [0.5], "actor/kl_loss": [], "actor/grad_norm": []},
        "skips": 0,
        "roll_backs": 2,
    },
    "tracker": {"step": 2, "lines": 1, "wandb_id": None},
    "facts": {"base model": "of before"},
}


def test_a_step_is_logged_with_its_speed_and_its_first_groups(made: Made, tmp_path: Path) -> None:
    assert made.recorder.start(None) == {}
    made.record(0)
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (line["step"], line["perf/total_num_tokens"], line["perf/throughput"]) == (0, 52, 26)
    assert line["stability/skipped"] == 0
    (shown,) = read_jsonl(tmp_path / "rollouts" / "step_000000.jsonl")
    assert (shown["uid"], shown["response"], shown["score"]) == ("a:0", "yes", 1)


def test_a_checkpoint_is_the_last_step_recorded_and_is_taken_once(made: Made) -> None:
    made.recorder.start(None)
    made.recorder.save()
    assert made.parts.saved == []
    made.record(2, data=made.parts)
    made.parts.version = 7
    made.recorder.save()
    made.recorder.save()
    ((step, state),) = made.parts.saved
    assert step == state["step"] == 3
    assert (state["command"], state["fingerprint"]) == ("rl", {"seed": 0})
    assert (state["version"], state["dtype"]) == (7, "float32")
    assert state["facts"] == {"base model": "m", "seed": 0, "optimizer updates": 7}
    assert state["sampler"] == {"scores": {"start: val/score": 0.25}, "released": 0}
    assert state["evaluation"]["scores"] == {"start: val/score": 0.25}
    assert state["monitor"] == made.monitor.state_dict()
    assert state["tracker"] == {"step": 2, "lines": 1, "wandb_id": None}


def test_a_checkpoint_spares_and_names_the_best(made: Made) -> None:
    made.recorder.start(None)
    made.record(0)
    made.recorder.save()
    for steps_done, value in [(2, 0.5), (3, 0.25)]:
        made.parts.ranking.observe(HeldOutScore(steps_done, "short", value, 0.03))
    assert [made.recorder.keeps(step) for step in (1, 2, 3)] == [False, True, False]
    made.record(2)
    made.recorder.save()
    assert made.parts.spared == [None, 2]
    facts = made.parts.saved[1][1]["facts"]
    assert facts["best evaluation"] == "0.5000 ± 0.0300 after 2 steps"
    assert facts["last evaluation"] == "0.2500 ± 0.0300 after 3 steps"


def test_the_line_after_a_save_says_how_long_it_took(made: Made, tmp_path: Path) -> None:
    made.recorder.start(None)
    made.record(0)
    made.recorder.save()
    made.record(1)
    made.record(2)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert ["timing_s/save_checkpoint" in line for line in lines] == [False, True, False]


def test_a_roll_back_restores_weights_and_optimizer_and_nothing_else(
    made: Made, tmp_path: Path
) -> None:
    made.recorder.start(None)
    made.parts.checkpoint = checkpoint_of(tmp_path, **STATE)
    made.parts.version = 9
    made.record(4, data=made.parts, loss=float("nan"))
    assert made.parts.calls == ["optimizer at hand", "load all"]
    assert made.warnings[-1] == (
        "step 4: non_finite: actor/pg_loss is nan; weights and optimizer are those of "
        f"{made.parts.checkpoint} again"
    )
    made.recorder.save()
    ((step, state),) = made.parts.saved
    assert (step, state["version"]) == (5, 9)
    assert state["monitor"]["roll_backs"] == 1
    assert state["sampler"]["released"] == 1  # what waited came from other weights
    assert state["evaluation"]["scores"] == {"start: val/score": 0.25}


def test_a_run_without_a_checkpoint_goes_on(made: Made) -> None:
    made.recorder.start(None)
    made.record(0, data=made.parts, loss=float("nan"))
    assert made.parts.calls == []
    assert made.parts.released == 0
    assert made.warnings[-1].endswith("there is no checkpoint to go back to: it goes on")
    assert made.monitor.state_dict()["roll_backs"] == 0


def test_a_start_takes_all_from_its_checkpoint(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')  # 3 comes again
    path = checkpoint_of(tmp_path, **STATE)
    assert made.recorder.start(path)["step"] == 3
    assert made.doing == [f"loading {path}"]
    assert f"resuming from {path} at step 3" in capsys.readouterr().out
    assert made.parts.calls == ["optimizer at hand", "load all"]
    assert made.parts.version == 5
    assert made.parts.scores == {"short: val/score": 0.5}
    assert made.monitor.state_dict() == STATE["monitor"]
    made.record(3)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [2, 3]
    made.recorder.save()
    assert made.parts.saved[0][1]["facts"]["base model"] == "of before"


def test_a_phase_with_a_new_optimizer_takes_the_weights_alone(made: Made, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoints" / "step_00000008", STATE | {"step": 8})
    assert made.recorder.start(path)["step"] == 8
    assert made.parts.calls == ["optimizer at hand", *WEIGHTS_ALONE]


def test_a_state_that_lacks_a_part_is_the_checkpoints_fault(made: Made, tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, **{k: v for k, v in STATE.items() if k != "monitor"})
    with pytest.raises(
        CheckpointError, match=r"does not hold the state .* \(KeyError: 'monitor'\)"
    ):
        made.recorder.start(path)


@pytest.mark.parametrize("anew", [False, True])
def test_a_new_run_takes_weights_and_optimizer_from_its_parent(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """And nothing else, even if a phase of its own begins at a step of the parent's number."""
    released: list[Path] = []
    monkeypatch.setattr(
        recorder_file, "write_release", lambda _, folder, **__: released.append(folder)
    )
    made.recorder._fresh_steps = frozenset({0} if anew else {3})
    path = checkpoint_of(tmp_path / "parent", **STATE)
    state = made.recorder.start_from(path, reference=tmp_path / "reference")
    assert state["step"] == 3
    loads = WEIGHTS_ALONE if anew else ["load all"]
    assert made.parts.calls == ["optimizer at hand", *loads]
    assert released == [tmp_path / "reference"]
    assert made.parts.version == 0
    assert made.parts.scores == {"start: val/score": 0.25}
    assert made.monitor.state_dict()["roll_backs"] == 0
    made.record(0)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [0]
    made.recorder.save()
    ((step, saved),) = made.parts.saved
    assert (step, saved["facts"]["base model"]) == (1, "of before")
