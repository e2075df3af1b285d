#!/usr/bin/env python
"""The first day on GPUs: runs the product part by part, in order of worth, and says what it proved.

    python tools/gpu_day.py OUT                     all parts
    python tools/gpu_day.py OUT --parts toy repeat  these; later ones use what earlier ones left
    python tools/gpu_day.py --list                  the parts and what they do

Every part runs commands with a time limit. A part that fails is recorded with the end of its
output, the others still run, and the exit code is 1. OUT/day.json is written after each part,
OUT/logs/PART.log holds the output, and the end shows a table. docs/first-gpu-day.md says what each
part proves and what to do when it fails. Without a GPU the same parts run in small sizes.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = 6
KILL_AFTER = 5
"""The step after which the run is killed; it saves every second step."""
DETERMINISTIC = "policy.deterministic=true"


class Failed(Exception):
    """A part did not do what it must."""


@dataclass
class Done:
    """A command that has ended, or that was killed (code None)."""

    code: int | None
    seconds: float
    output: str


@dataclass
class Day:
    """What all parts know.

    Attributes:
        tokenizer: folder of the tokenizer of the rehearsal.
        hardware: name of the GPU for `qlrl plan`.
        part: the part that runs.
    """

    out: Path
    processes: int
    gpu: bool
    tokenizer: Path
    hardware: str
    results: dict[str, Any] = field(default_factory=dict)
    part: str = ""

    def run(
        self, command: list[str], *, limit_s: float, until: Callable[[], bool] = lambda: False
    ) -> Done:
        """Runs a command, its output in the part's log. It is killed with all its children at the
        limit, or as soon as `until` says so."""
        log = self.out / "logs" / f"{self.part}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # The rehearsal's folder holds its reward.
        paths = [str(ROOT), str(self.out / "rehearsal"), os.environ.get("PYTHONPATH", "")]
        began = time.monotonic()
        with log.open("ab") as stream:
            stream.write(f"\n$ {' '.join(command)}\n".encode())
            stream.flush()
            at = stream.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={
                    # At this level the engine says what sleep and wake-up free and take.
                    "VLLM_LOGGING_LEVEL": "INFO",
                    **os.environ,
                    "PYTHONPATH": ":".join(filter(None, paths)),
                },
                start_new_session=True,
            )
            killed = False
            try:
                while process.poll() is None and not killed:
                    time.sleep(0.05)
                    killed = until() or time.monotonic() - began > limit_s
            finally:  # also when this program is told to end
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        output = log.read_bytes()[at:].decode(errors="replace")
        code = None if killed else process.returncode
        return Done(code, round(time.monotonic() - began, 1), output)

    def must(self, command: list[str], *, limit_s: float) -> Done:
        """Runs a command that must end well.

        Raises:
            Failed: it did not; the message ends with the end of its output.
        """
        done = self.run(command, limit_s=limit_s)
        if done.code != 0:
            how = "was killed at its limit" if done.code is None else f"ended with {done.code}"
            told = f"{' '.join(command[:6])} ... {how} after {done.seconds} s"
            raise Failed(f"{told}\n{done.output[-2500:]}")
        return done

    def qlrl(self, *arguments: str) -> list[str]:
        """Returns a command of the product."""
        return [sys.executable, "-m", "megatron_qlrl", *arguments]

    def on_ranks(self, *arguments: str) -> list[str]:
        """Returns a command of the product that runs on all ranks."""
        return self.qlrl(*arguments, "--processes", str(self.processes))

    def toy_data(self) -> Path:
        """Returns the folder with the toy's data, which is made at its first use."""
        folder = self.out / "data"
        if not (folder / "train.parquet").is_file():
            sizes = ("--train", "4000" if self.gpu else "400", "--eval", "16")
            self.must(self.qlrl("data", "toy", str(folder), *sizes), limit_s=300)
        return folder

    def toy(self, name: str, *settings: str) -> list[str]:
        """Returns the command of a run of the toy in the folder `name`."""
        config = toy_config(self, self.out / name)
        return self.on_ranks("rl", str(config), *settings)

    def fresh(self, name: str) -> Path:
        """Returns the folder of a run, without what an earlier one left there."""
        shutil.rmtree(self.out / name, ignore_errors=True)
        return self.out / name


def machine(day: Day) -> dict[str, Any]:
    """GPUs, driver, versions, and what `qlrl check` says."""
    figures: dict[str, Any] = {}
    if day.gpu:
        query = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit"
        for name, command in {
            "gpus": ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            "topology": ["nvidia-smi", "topo", "-m"],
            "loaded": [sys.executable, "-c", LOADED],
        }.items():
            figures[name] = day.must(command, limit_s=60).output.splitlines()
    figures["check"] = day.must(day.qlrl("check"), limit_s=180).output.splitlines()
    figures["packages"] = {name: version_of(name) for name in PACKAGES}
    return figures | {"says": "; ".join(figures.get("gpus", ["no GPU"])[-1:])}


LOADED = """
import torch
print("nccl", torch.cuda.nccl.version(), "cudnn", torch.backends.cudnn.version())
"""
"""Says which libraries torch has loaded; others of the same name may be installed, too."""
PACKAGES = (
    "torch", "triton", "vllm", "megatron-core", "transformer-engine", "flash-attn",
    "flashinfer-python", "transformers", "numpy", "nvidia-nccl-cu13", "nvidia-cudnn-cu13",
)  # fmt: skip


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def sft(day: Day) -> dict[str, Any]:
    """Warm-up SFT of the toy: policy, optimizer, checkpoint and release, without the engine."""
    data, run = day.toy_data(), day.fresh("sft")
    settings = [
        f"data.sft_files=[{data / 'sft.parquet'}]", f"run.dir={run}",
        f"sft.max_steps={30 if day.gpu else 2}", "optimizer.lr=1.0e-3",
        "optimizer.min_lr_ratio=0.1", "checkpoint.every_steps=1000",
    ]  # fmt: skip
    command = day.on_ranks("sft", str(QUICKSTART / "config.yaml"), *settings)
    done = day.must(command, limit_s=240)
    losses = [line["sft/nll"] for line in record(run)]
    says = f"nll {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    return {"says": says, "command_s": done.seconds, "nll": losses}


def toy(day: Day) -> dict[str, Any]:
    """RL with the co-located engine, which sleeps, wakes and reloads in each step; its log-probs
    are compared with the trainer's after every weight sync."""
    run = day.fresh("toy")
    day.must(day.toy("toy"), limit_s=240)
    return steps_of(run)


def repeat(day: Day) -> dict[str, Any]:
    """The same run again: what differs, bit for bit."""
    return again(day, "toy", "repeat")


def kill(day: Day) -> dict[str, Any]:
    """kill -9 after a step, then a second start: does the run end like the undisturbed one?"""
    return killed(day, "toy", "kill")


def rehearse(day: Day) -> dict[str, Any]:
    """Steps at 20K and 60K with 8 responses of a prompt, beside what `qlrl plan` says."""
    config, run = prepared(day), day.fresh("rehearse")
    # A row is cut over all ranks.
    cut = f"policy.cp={day.processes}"
    sizes = ["--gpus", str(day.processes), "--hardware", day.hardware, "--json"]
    planned = day.run(day.qlrl("plan", str(config), cut, *sizes), limit_s=60)
    # One phase, because a phase's end saves a checkpoint.
    phase = {"name": "mixed", "max_input_tokens": 60_000 if day.gpu else 2000, "steps": 99}
    own = [cut, f"run.dir={run}", f"phases={json.dumps([phase])}"]
    done = day.run(
        day.on_ranks("rl", str(config), *own),
        limit_s=420,
        until=lambda: len(record(run)) >= 4,  # two prompts of each length
    )
    if not record(run):
        raise Failed(f"no step ended in {done.seconds} s\n{done.output[-2500:]}")
    plan = last_json(planned.output) if planned.code == 0 else planned.output
    return steps_of(run) | {"plan": plan}


def engine(day: Day) -> dict[str, Any]:
    """GPU memory at each point of sleep, wake-up and reload; what seeds and log-probs cost; weight
    sync, prefill, decode and update beside a copy and a matmul."""
    figures = written(day, "gpu_engine.py", "measure", str(prepared(day)), limit_s=300)
    used = {point["at"]: point["used"] for point in figures["memory"]}
    told = [f"{at} {used[at]}" for at in ("engine started, asleep", "generated") if at in used]
    return {"says": f"GiB in use on the GPU: {'; '.join(told) or 'no GPU'}", **figures}


def graphs(day: Day) -> dict[str, Any]:
    """The toy with torch.compile and CUDA graphs in the engine, at the recipes' temperature and
    top-p."""
    run = day.fresh("graphs")
    own = ("rollout.enforce_eager=false", "rollout.temperature=0.7", "rollout.top_p=0.95")
    day.must(day.toy("graphs", *own), limit_s=300)
    return steps_of(run)


def deterministic(day: Day) -> dict[str, Any]:
    """Twice with deterministic kernels, then with kill -9."""
    name = day.fresh("deterministic").name
    day.must(day.toy(name, DETERMINISTIC), limit_s=240)
    twice = again(day, name, f"{name}_again", DETERMINISTIC)
    resumed = killed(day, name, f"{name}_kill", DETERMINISTIC)
    says = f"again: {twice['says']}; killed: {resumed['says']}"
    return {"says": says, "again": twice, "killed": resumed}


def kernels(day: Day) -> dict[str, Any]:
    """Attention kernels forward and backward, and the rate of a large matmul."""
    return written(day, "gpu_check.py", "--parts", "kernels", limit_s=180)


def sync(day: Day) -> dict[str, Any]:
    """The stream of weights into the engine, against a copy."""
    sizes = {"layers": 28, "hidden": 2048, "heads": 16, "kv-heads": 8, "ffn": 6144, "vocab": 49_152}
    options = [f"--{name}={size}" for name, size in sizes.items()] if day.gpu else ["--layers=1"]
    figures = bench(day, day.qlrl("bench", "sync", *options), limit_s=180)
    return {"says": f"{figures['share_of_memcpy']:.2f} of a copy's rate", **figures}


def rollout(day: Day) -> dict[str, Any]:
    """Generation with responses of many lengths: plain, sorted, partial."""
    config = toy_config(day, day.out / "rollout")
    more = [
        "rollout.tokens_per_round=16", "algorithm.max_staleness=4",
        "rollout.max_response_tokens=64", "--steps=2", "--rounds=1",
    ]  # fmt: skip
    return bench(day, day.on_ranks("bench", "rollout", str(config), *more), limit_s=240)


def fp8(day: Day) -> dict[str, Any]:
    """Transformer Engine's layers in bfloat16 and FP8 against Megatron's own."""
    parts = ("engine_tensorwise", "engine_blockwise")
    return written(day, "gpu_check.py", "--parts", *parts, limit_s=300)


def update(day: Day) -> dict[str, Any]:
    """An update with shared prompts, against separate ones."""
    sizes = [] if day.gpu else ["--layers=1", "--prompt-tokens=64"]
    figures = bench(day, day.qlrl("bench", "update", *sizes), limit_s=180)
    says = f"{figures['speedup']:.2f} times as fast; FLOP ratio {figures['flop_ratio']:.2f}"
    return {"says": says, **figures}


PARTS: dict[str, Callable[[Day], dict[str, Any]]] = {
    part.__name__: part
    for part in (
        machine, sft, toy, repeat, kill, rehearse, engine, graphs, deterministic, kernels, sync,
        rollout, fp8, update,
    )
}  # fmt: skip
"""In order of worth."""


def again(day: Day, name: str, copy: str, *settings: str) -> dict[str, Any]:
    """Runs the toy once more, as `copy`, and compares it with `name`."""
    run = day.fresh(copy)
    done = day.must(day.toy(copy, *settings), limit_s=240)
    return differences(run, day.out / name) | {"command_s": done.seconds}


def killed(day: Day, name: str, copy: str, *settings: str) -> dict[str, Any]:
    """Runs the toy as `copy`, kills it, starts it again, and compares it with `name`."""
    run, command = day.fresh(copy), day.toy(copy, *settings)
    first = day.run(command, limit_s=240, until=lambda: len(record(run)) >= KILL_AFTER)
    steps = len(record(run))
    if first.code is not None or steps < KILL_AFTER:
        how = "was killed at its limit" if first.code is None else f"ended with {first.code}"
        raise Failed(f"the run {how} after {steps} steps\n{first.output[-2500:]}")
    second = day.must(command, limit_s=240)
    resumed = re.search(r"resuming from \S+/step_0*(\d+)", second.output)
    return differences(run, day.out / name) | {
        "killed_after": steps,
        "resumed_at": int(resumed[1]) if resumed else None,
        "restart_s": second.seconds,
    }


def toy_config(day: Day, run: Path) -> Path:
    """Writes the config of a run of the toy. It starts from the weights of part sft, if there."""
    start = day.out / "sft" / "hf"
    config = {
        "model": {"path": str(start if start.is_dir() else QUICKSTART / "base"), "name": "toy"},
        "run": {"dir": str(run), "seed": 7},
        "data": {"train_files": [str(day.toy_data() / "train.parquet")]},
        "phases": [
            {"name": "short", "max_input_tokens": 250, "steps": STEPS // 2},
            {"name": "long", "max_input_tokens": 800, "steps": STEPS - STEPS // 2},
        ],
        "curriculum": {"carried_share": 0.25},
        "rollout": {
            "prompts_per_step": 32 if day.gpu else 2,
            "group_size": 8 if day.gpu else 2,
            "max_response_tokens": 32,
            "temperature": 1.0,
            "top_p": 1.0,
            # The toy's cache is tiny, and a large one costs seconds to set up.
            "gpu_memory_utilization": 0.1,
            "enforce_eager": True,
        },
        "policy": {"max_tokens_per_row": 8192},
        "algorithm": {"filter_groups": False},
        "optimizer": {"lr": 8.0e-4, "weight_decay": 0.0},
        "checkpoint": {"every_steps": 2, "keep": 10},
        "logging": {"rollouts_per_step": 1000},
    }
    file = day.out / "configs" / f"{run.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))
    return file


def prepared(day: Day) -> Path:
    """Returns the config of the rehearsal, whose model and documents are made at its first use."""
    folder = day.out / "rehearsal"
    if not (folder / "config.json").is_file():
        sizes = [] if day.gpu else ["--small"]
        command = ["prepare", str(folder), "--tokenizer", str(day.tokenizer), *sizes]
        day.must([sys.executable, str(ROOT / "tools" / "gpu_engine.py"), *command], limit_s=240)
    return folder / "config.json"


def bench(day: Day, command: list[str], *, limit_s: float) -> dict[str, Any]:
    return last_json(day.must(command, limit_s=limit_s).output)


def last_json(output: str) -> dict[str, Any]:
    """Returns the last JSON object of an output, which begins and ends at the start of a line."""
    lines = output.splitlines()
    end = max(number for number, line in enumerate(lines) if line == "}")
    begin = max(number for number, line in enumerate(lines[:end]) if line == "{")
    return json.loads("\n".join(lines[begin : end + 1]))


def written(day: Day, tool: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Runs a tool and returns the JSON that it writes, also what it wrote before it failed."""
    file = day.out / f"{day.part}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tools" / tool), *arguments, "--out", str(file)]
    try:
        day.must(command, limit_s=limit_s)
    except Failed as failure:
        if not file.is_file():
            raise
        return {"failed": str(failure), **json.loads(file.read_text())}
    return json.loads(file.read_text())


def record(run: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each step so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


RECORDED = (
    "timing_s/", "perf/", "training/", "actor/grad_norm", "actor/entropy", "critic/rewards/mean",
    "response_length/mean", "prompt_length/mean",
)  # fmt: skip
SHOWN = ("timing_s/step", "timing_s/gen", "timing_s/update_actor",
         "training/rollout_probs_diff_mean")  # fmt: skip


def steps_of(run: Path) -> dict[str, Any]:
    """Returns the metrics of a run that say most; those of its last step are shown."""
    steps = record(run)
    last = ", ".join(f"{name} {steps[-1][name]:.3g}" for name in SHOWN if name in steps[-1])
    kept = [{k: v for k, v in s.items() if k == "step" or k.startswith(RECORDED)} for s in steps]
    return {"says": f"{len(steps)} steps; last: {last}", "steps": kept}


def differences(run: Path, reference: Path) -> dict[str, Any]:
    """Compares two runs bit for bit: rollouts, metrics (timings left out) and released weights.
    Says of each metric the first step at which it differs."""
    ours, theirs = record(run), record(reference)
    metrics: dict[str, dict[str, Any]] = {}
    for mine, other in zip(ours, theirs, strict=False):
        for name in sorted(mine.keys() | other.keys()):
            pair = {"run": mine.get(name), "reference": other.get(name)}
            if not name.startswith(("timing_s/", "perf/")) and pair["run"] != pair["reference"]:
                metrics.setdefault(name, {"first_step": mine["step"], **pair})
    first = sorted(metrics, key=lambda name: metrics[name]["first_step"])[:12]
    rollouts: dict[str, Any] = {}
    for file in sorted((reference / "rollouts").iterdir()):
        copy = run / "rollouts" / file.name
        a, b = (f.read_text().splitlines() if f.is_file() else [] for f in (copy, file))
        if a != b:
            texts = ([json.loads(line)["response"] for line in lines] for lines in (a, b))
            same = sum(x == y for x, y in zip(*texts, strict=False))
            rollouts[file.name] = {"responses": len(b), "equal": same}
    weights = weight_difference(run, reference)
    equal = not (weights or metrics or rollouts) and len(ours) == len(theirs)
    differing = ", ".join(f"{name} from step {metrics[name]['first_step']}" for name in first[:2])
    return {
        "says": "bitwise equal" if equal else f"differs: {differing or 'rollouts or weights'}",
        "bitwise_equal": equal,
        "steps": [len(ours), len(theirs)],
        "largest_weight_difference": weights,
        "first_metrics_that_differ": {name: metrics[name] for name in first},
        "metrics_that_differ": len(metrics),
        "rollouts_that_differ": rollouts,
    }


def weight_difference(run: Path, reference: Path) -> float:
    from safetensors.torch import load_file

    ours, theirs = (load_file(f / "hf" / "model.safetensors") for f in (run, reference))
    return max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in theirs)


def table(results: Mapping[str, Any]) -> str:
    """One line for each part: its seconds, and the figures that say most."""
    lines = ["| part | s | result |", "|---|---|---|"]
    for name in PARTS:
        if result := results.get(name):
            lines.append(f"| {name} | {result['part_s']:.0f} | {headline(result)} |")
    return "\n".join(lines)


ERROR = re.compile(r"qlrl: error: |[\w.]*(?:Error|Exception|Failed|Interrupt)\b")


def headline(result: Mapping[str, Any]) -> str:
    """Returns one line: what the part says, or the last error in the output of one that failed, or
    how that ended if its output names no error."""
    if "failed" not in result:
        return result.get("says", "ok")
    lines = result["failed"].strip().splitlines()
    errors = [line for line in lines if ERROR.match(line)]
    return f"FAILED: {(errors[-1:] or lines[:1])[0][:160]}"


def run_part(day: Day, name: str) -> dict[str, Any]:
    """Runs one part and records it."""
    day.part = name
    began = time.monotonic()
    result: dict[str, Any]
    try:
        result = PARTS[name](day)
    except Failed as failure:
        result = {"failed": str(failure)}
    except Exception:  # one broken part must not hide the results of the others
        result = {"failed": traceback.format_exc()}
    result["part_s"] = round(time.monotonic() - began, 1)
    day.results[name] = result
    (day.out / "day.json").write_text(json.dumps(day.results, indent=1))
    print(f"{name}: {result['part_s']} s, {headline(result)}", flush=True)
    if "failed" in result:
        print(result["failed"][-2000:], flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, nargs="?", help="folder for everything")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these parts alone, in order")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--processes", type=int, help="ranks of a run; default: one per GPU")
    parser.add_argument("--tokenizer", type=Path, default=QUICKSTART / "base",
                        help="folder of the tokenizer of the rehearsal")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.list:
        for name, part in PARTS.items():
            print(f"{name:14} {' '.join((part.__doc__ or '').split())}")
        return 0
    if arguments.out is None:
        parser.error("OUT is missing")
    names = arguments.parts or list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    gpus = gpu_names()
    day = Day(
        out=arguments.out.resolve(),
        processes=arguments.processes or max(len(gpus), 1),
        gpu=bool(gpus),
        tokenizer=arguments.tokenizer.resolve(),
        hardware="h200-141g" if "H200" in str(gpus) else "h100-80g",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    day.out.mkdir(parents=True, exist_ok=True)
    if (day.out / "day.json").is_file():
        day.results = json.loads((day.out / "day.json").read_text())
    results = [run_part(day, name) for name in names]
    print(table(day.results))
    return int(any("failed" in result for result in results))


def gpu_names() -> list[str]:
    """Returns the names of the GPUs here, without loading torch."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")]


if __name__ == "__main__":
    sys.exit(main())
