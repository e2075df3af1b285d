"""Kills, stops and damages real runs at random points, and checks that they end like an undisturbed
one.

    python tools/chaos.py /tmp/chaos --blows 50 --processes 2 --json chaos.json

One reference run of the toy task is left alone. In the others, every start takes a blow; they
resume from what is left, and must end with the same weights, metrics and rollouts, bit for bit.
Responses get 8 of at most 24 tokens a step (`rollout.tokens_per_round`), so that most checkpoints
hold responses that wait; the result counts the blows after which a run went on with some. The
blows:

    kill_all    kill -9 of the launcher and all ranks
    kill_rank   kill -9 of one rank: the launcher must end the others with a message
    stop_rank   one rank is frozen for a moment: the run must continue as if nothing had happened
    ask         SIGUSR1: the run must save, and end with the exit code for it
    flip        kill_all, then one bit of the newest checkpoint is flipped: it must not be chosen
    cut         kill_all, then a file of the newest checkpoint is cut: it must not be chosen
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_qlrl.config.run_folder import checkpoint_of, checkpoints_of, step_of
from megatron_qlrl.errors import STOPPED

ROOT = Path(__file__).resolve().parents[1]
BLOWS = ("kill_all", "kill_rank", "stop_rank", "ask", "flip", "cut")
STEPS = 24
LIMIT_S = 900


class Failed(Exception):
    """A run did not behave as it must."""


@dataclass
class Chain:
    """One run that takes a blow in every start until it has finished."""

    folder: Path
    config: Path
    processes: int
    rng: random.Random
    blows: list[dict[str, Any]] = field(default_factory=list)
    damaged: tuple[Path, int] | None = None
    """The file that was damaged last, and when (ns)."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def until_finished(self, most_blows: int) -> None:
        """Starts the run again and again until it ends; at most `most_blows` starts take a blow."""
        while True:
            blow = self.rng.choice(BLOWS) if len(self.blows) < most_blows else None
            before, spoiled = newest(self.run), self._spoiled()
            process = start(self.config, self.processes, self.folder / "log.txt")
            mark = (self.folder / "log.txt").stat().st_size
            if blow is not None and self._wait_for_the_moment(process):
                record = self._strike(process, blow)
                waiting = self._waiting()
                self.blows.append(record | {"found": before, "waiting_responses": waiting})
            code = process.wait(timeout=LIMIT_S)
            text = (self.folder / "log.txt").read_text()[mark:]
            resumed = re.search(r"resuming from \S+/step_0*(\d+)", text)
            if resumed or code == 0:  # the start got as far as choosing a checkpoint
                check_start(int(resumed[1]) if resumed else None, before, spoiled)
            if code == 0:
                return
            if blow is None:
                raise Failed(f"an undisturbed start ended with {code}: {self.folder}/log.txt")

    def _wait_for_the_moment(self, process: subprocess.Popen[bytes]) -> bool:
        """Waits for a random moment, during the start or some steps after it. Returns whether the
        run still runs."""
        lines = self.run / "metrics.jsonl"
        size = lines.stat().st_size if lines.is_file() else 0
        if self.rng.random() < 0.8:
            while process.poll() is None:
                if lines.is_file() and lines.stat().st_size != size:
                    break
                time.sleep(0.01)
            time.sleep(self.rng.uniform(0, 3.0))
        else:
            time.sleep(self.rng.uniform(0, 15.0))
        return process.poll() is None

    def _strike(self, process: subprocess.Popen[bytes], blow: str) -> dict[str, Any]:
        record: dict[str, Any] = {"blow": blow, "at": newest(self.run)}
        ranks = children(process.pid)
        if blow in ("kill_rank", "stop_rank") and not ranks:
            record["blow"] = blow = "kill_all"  # no rank has been started yet
        if blow == "ask":
            process.send_signal(signal.SIGUSR1)
            record["code"] = process.wait(timeout=LIMIT_S)
            if record["code"] not in (0, STOPPED, 128 + signal.SIGUSR1, -signal.SIGUSR1):
                raise Failed(f"asked to stop, it ended with {record['code']}")
        elif blow == "kill_rank":
            with suppress(ProcessLookupError):
                os.kill(self.rng.choice(ranks), signal.SIGKILL)
            record["code"] = process.wait(timeout=LIMIT_S)
        elif blow == "stop_rank":
            rank = self.rng.choice(ranks)
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGSTOP)
                time.sleep(self.rng.uniform(0.1, 3.0))
                os.kill(rank, signal.SIGCONT)
            record["code"] = process.wait(timeout=LIMIT_S)
            if record["code"]:
                raise Failed(f"a rank was frozen for a moment, and it ended with {record['code']}")
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=LIMIT_S)
            if blow in ("flip", "cut"):
                step = newest(self.run)
                if step is not None:
                    file = damage(checkpoint_of(self.run, step), blow, self.rng)
                    self.damaged = (file, file.stat().st_mtime_ns)
                    record["damaged"] = str(file.relative_to(self.run))
        return record

    def _waiting(self) -> int:
        """Returns how many responses wait in the checkpoint that the next start goes on from."""
        step = newest(self.run)
        return 0 if step is None else waiting_responses(checkpoint_of(self.run, step))

    def _spoiled(self) -> int | None:
        """Returns the step of the damaged checkpoint, unless it was written again since."""
        if self.damaged is None:
            return None
        file, when = self.damaged
        if not file.exists() or file.stat().st_mtime_ns != when:
            return None
        return next(step_of(f) for f in file.parents if f.parent == self.run / "checkpoints")


def check_start(resumed: int | None, whole: int | None, spoiled: int | None) -> None:
    """Checks that a run resumed from its newest whole checkpoint, and not from a damaged one.

    All arguments are steps, or None if there is no such checkpoint.
    """
    if resumed is not None and resumed == spoiled:
        raise Failed(f"resumed at {resumed}, a checkpoint that was damaged")
    if resumed != whole:
        raise Failed(f"resumed at {resumed}, but the newest whole checkpoint was {whole}")


def damage(folder: Path, blow: str, rng: random.Random) -> Path:
    """Flips one bit of a random file in `folder`, or cuts the file. Returns the file."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size]
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    if blow == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    file.write_bytes(data)
    return file


def start(config: Path, processes: int, log: Path) -> subprocess.Popen[bytes]:
    """Starts `qlrl rl` in a session of its own."""
    command = [sys.executable, "-m", "megatron_qlrl", "rl", str(config)]
    with log.open("ab") as out:
        return subprocess.Popen(
            [*command, "--processes", str(processes)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(c) for c in path.read_text().split()] if path.exists() else []


def newest(run: Path) -> int | None:
    """Returns the step of the newest checkpoint that is whole by its checksums."""
    from megatron_qlrl.weights.checkpoint_folder import torn

    whole = (f for f in reversed(checkpoints_of(run)) if torn(f) is None)
    return next((step_of(f) for f in whole), None)


def waiting_responses(folder: Path) -> int:
    """Returns how many responses of a checkpoint go on in the next step."""
    from megatron_qlrl.weights.checkpoint_folder import read_state

    groups = read_state(folder)["sampler"]["waiting"]
    return sum(response["goes_on"] for group in groups for response in group["responses"])


def write_config(folder: Path, data: Path, *, model: Path, ep: int) -> Path:
    config = {
        "model": {"path": str(model)},
        "run": {"dir": str(folder / "run"), "seed": 7},
        "data": {"train_files": [str(data / "train.parquet")]},
        "phases": [
            {"name": "short", "max_input_tokens": 250, "steps": STEPS // 2},
            {"name": "long", "max_input_tokens": 1000, "steps": STEPS - STEPS // 2},
        ],
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_response_tokens": 24,
            "tokens_per_round": 8,
        },
        "curriculum": {"carried_share": 0.25},
        "policy": {"tp": 2, "ep": ep, "max_tokens_per_row": 2048},
        "algorithm": {"filter_groups": False, "entropy_coef": 0.01, "max_staleness": 3},
        "optimizer": {"lr": 5.0e-4},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "evaluation": {"max_input_tokens": 1000},
    }
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def differences(run: Path, reference: Path) -> list[str]:
    """Returns the names of files that differ by a bit; timings in the record are ignored."""

    def record(folder: Path) -> list[dict[str, Any]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        timed = ("timing_s/", "perf/")
        return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]

    files = [f.relative_to(reference) for f in sorted((reference / "rollouts").iterdir())]
    files.append(Path("hf/model.safetensors"))
    differing = [str(f) for f in files if (run / f).read_bytes() != (reference / f).read_bytes()]
    return differing + (["metrics.jsonl"] if record(run) != record(reference) else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--blows", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2, help="a multiple of 2")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/quickstart/base",
                        help="another model with the toy's tokenizer")  # fmt: skip
    parser.add_argument("--ep", type=int, default=1, help="policy.ep, for a model with experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result with every blow")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    data = args.out / "data"
    toy = ["data", "toy", str(data), "--train", "200", "--eval", "8"]
    subprocess.run([sys.executable, "-m", "megatron_qlrl", *toy], check=True, cwd=ROOT)
    made = partial(write_config, data=data, model=args.model, ep=args.ep)
    whole = Chain(args.out / "reference", made(args.out / "reference"), args.processes, rng)
    whole.until_finished(0)
    blows: list[dict[str, Any]] = []
    unequal: list[str] = []
    number = 0
    while len(blows) < args.blows:
        folder = args.out / f"run_{number}"
        chain = Chain(folder, made(folder), args.processes, rng)
        chain.until_finished(args.blows - len(blows))
        wrong = differences(chain.run, whole.run)
        unequal += [f"run_{number}: {name}" for name in wrong]
        blows += chain.blows
        print(f"run_{number}: {len(chain.blows)} blow(s), {len(wrong)} difference(s)", flush=True)
        number += 1
    result = {
        "blows": len(blows),
        "kinds": dict(Counter(b["blow"] for b in blows)),
        "with_waiting_responses": sum(b["waiting_responses"] > 0 for b in blows),
        "runs": number,
        "processes": args.processes,
        "seed": args.seed,
        "steps": STEPS,
        "unequal": unequal,
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result | {"all": blows}, indent=1) + "\n")
    sys.exit(1 if unequal else 0)


if __name__ == "__main__":
    main()
