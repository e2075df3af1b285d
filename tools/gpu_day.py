#!/usr/bin/env python
"""The first day on GPUs: runs the product part by part, in order of worth, and says what it proved.

    python tools/gpu_day.py OUT                     all parts
    python tools/gpu_day.py OUT --parts toy repeat  these; later ones use what earlier ones left
    python tools/gpu_day.py --list                  the parts and what they do

Every part is a command of its own with a time limit. One that fails is recorded with the end of its
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(__file__).resolve().parent
STEPS = 6
KILL_AFTER = 5
"""The step after which the run is killed; it saves every second step."""
ATTEMPTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "as it is": ({}, ()),
    "vLLM's older model runner": ({"VLLM_USE_V2_MODEL_RUNNER": "0"}, ()),
    "no check of the weight sync": ({}, ("rollout.check_sync=false",)),
}
"""What the toy run tries, one after the other, until one works: environment and settings."""
DETERMINISTIC = (
    "import torch; torch.use_deterministic_algorithms(True, warn_only=True); "
    "from megatron_qlrl.cli import main; main()"
)
DETERMINISTIC_ENV = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "VLLM_BATCH_INVARIANT": "0",
}


class Failed(Exception):
    """A part did not do what it must."""


@dataclass
class Done:
    """A command that has ended, or that was killed at its limit (code None)."""

    code: int | None
    seconds: float
    output: str


@dataclass
class Day:
    """What all parts know.

    Attributes:
        worked: environment and settings with which the toy run works.
    """

    out: Path
    processes: int
    gpu: bool
    start: Path | None
    data: Path | None
    tokenizer: Path
    hardware: str
    results: dict[str, Any] = field(default_factory=dict)
    part: str = ""

    def run(
        self,
        command: list[str],
        *,
        limit_s: float,
        env: Mapping[str, str] | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> Done:
        """Runs a command, its output in the part's log. It is killed with all its children at the
        limit, or as soon as `until` says so."""
        log = self.out / "logs" / f"{self.part}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("ab") as stream:
            stream.write(f"\n$ {' '.join(command)}   # {dict(env or {})}\n".encode())
            stream.flush()
            at = stream.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment(), **(env or {})},
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

    def must(self, command: list[str], **options: Any) -> Done:
        """Runs a command that must end well.

        Raises:
            Failed: it did not; the message ends with the end of its output.
        """
        done = self.run(command, **options)
        if done.code != 0:
            how = "was killed at its limit" if done.code is None else f"ended with {done.code}"
            raise Failed(
                f"{' '.join(command[:6])} ... {how} after {done.seconds} s\n{done.output[-2500:]}"
            )
        return done

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        # At this level the engine says what sleep and wake-up free and take.
        return {"PYTHONPATH": ":".join(filter(None, paths)), "VLLM_LOGGING_LEVEL": "INFO"}

    def qlrl(self, *arguments: str, deterministic: bool = False) -> list[str]:
        own = ["-c", DETERMINISTIC] if deterministic else ["-m", "megatron_qlrl"]
        return [sys.executable, *own, *arguments]

    @property
    def worked(self) -> tuple[dict[str, str], tuple[str, ...]]:
        return ATTEMPTS[self.results.get("toy", {}).get("attempt", "as it is")]

    def ranks(self) -> list[str]:
        return ["--processes", str(self.processes)]

    def toy_data(self) -> Path:
        """Returns the folder with the toy's data, which is made at its first use."""
        folder = self.data or self.out / "data"
        if not (folder / "train.parquet").is_file():
            sizes = ("400", "16") if not self.gpu else ("4000", "64")
            command = self.qlrl("data", "toy", str(folder), "--train", sizes[0], "--eval", sizes[1])
            self.must(command, limit_s=300)
        return folder

    def toy_start(self) -> Path:
        """Returns the weights that the toy's RL starts from: those of part sft, if it ran."""
        own = self.out / "sft" / "hf"
        if self.start is not None:
            return self.start
        return own if own.is_dir() else ROOT / "examples" / "quickstart" / "base"


def machine(day: Day) -> dict[str, Any]:
    """GPUs, driver, versions, and what `qlrl check` says."""
    figures: dict[str, Any] = {}
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit"
        for name, command in {
            "gpus": ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            "topology": ["nvidia-smi", "topo", "-m"],
        }.items():
            figures[name] = day.run(command, limit_s=30).output.splitlines()
    figures["check"] = day.run(day.qlrl("check"), limit_s=180).output.splitlines()
    done = day.must([sys.executable, "-c", VERSIONS], limit_s=180)
    return figures | json.loads(done.output.splitlines()[-1])


VERSIONS = """
import importlib, json, time
from importlib.metadata import version
import torch
result = {"versions": {}, "imports": {}}
for name in ("torch triton vllm megatron-core transformer-engine flash-attn flashinfer-python "
             "transformers numpy nvidia-nccl-cu13 nvidia-cudnn-cu13").split():
    try: result["versions"][name] = version(name)
    except Exception: result["versions"][name] = "absent"
if torch.cuda.is_available():
    result["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "device": torch.cuda.get_device_name(), "cxx11_abi": torch.compiled_with_cxx11_abi()}
for name in ("transformer_engine.pytorch vllm.platforms.cuda vllm.vllm_flash_attn "
             "vllm.device_allocator.cumem flash_attn").split():
    began = time.perf_counter()
    try: importlib.import_module(name); said = "ok"
    except Exception as error: said = f"{type(error).__name__}: {error}"
    result["imports"][name] = [said, round(time.perf_counter() - began, 1)]
print(json.dumps(result))
"""


def sft(day: Day) -> dict[str, Any]:
    """Warm-up SFT of the toy: policy, optimizer, checkpoint and release, without the engine."""
    data, run = day.toy_data(), day.out / "sft"
    config = str(ROOT / "examples" / "quickstart" / "config.yaml")
    settings = [
        f"data.sft_files=[{data / 'sft.parquet'}]", f"run.dir={run}", "sft.max_steps=30",
        "optimizer.lr=1.0e-3", "optimizer.min_lr_ratio=0.1", "checkpoint.every_steps=1000",
    ]  # fmt: skip
    done = day.must(day.qlrl("sft", config, *settings, *day.ranks()), limit_s=240)
    losses = [line["sft/nll"] for line in record(run)]
    return {"command_s": done.seconds, "first_nll": losses[0], "last_nll": losses[-1]}


def toy(day: Day) -> dict[str, Any]:
    """RL with the co-located engine, which sleeps, wakes and reloads in each step; its log-probs
    are compared with the trainer's after every weight sync."""
    failures: dict[str, str] = {}
    for attempt, (env, settings) in ATTEMPTS.items():
        shutil.rmtree(day.out / "toy", ignore_errors=True)
        done = day.run(toy_command(day, "toy", settings), limit_s=240, env=env)
        if done.code == 0:
            run = day.out / "toy"
            figures = {"attempt": attempt, "failures": failures, "command_s": done.seconds}
            return figures | {"steps": steps_of(run), "sleep": sleep_lines(run)}
        failures[attempt] = done.output[-2500:]
    raise Failed(json.dumps(failures, indent=1))


def repeat(day: Day) -> dict[str, Any]:
    """The same run again: what differs, bit for bit."""
    return again(day, "toy", "repeat")


def kill(day: Day) -> dict[str, Any]:
    """kill -9 after a step, then a second start: does the run end like the undisturbed one?"""
    return killed(day, "toy", "kill")


def deterministic(day: Day) -> dict[str, Any]:
    """Twice with torch's deterministic algorithms, then with kill -9."""
    name = "deterministic"
    env, settings = day.worked
    command = toy_command(day, name, settings, deterministic=True)
    day.must(command, limit_s=240, env=env | DETERMINISTIC_ENV)
    twice = again(day, name, f"{name}_again", deterministic=True)
    return {"again": twice, "killed": killed(day, name, f"{name}_kill", deterministic=True)}


def graphs(day: Day) -> dict[str, Any]:
    """The toy with torch.compile and CUDA graphs in the engine, at the recipes' temperature and
    top-p."""
    env, settings = day.worked
    own = ("rollout.enforce_eager=false", "rollout.temperature=0.7", "rollout.top_p=0.95")
    done = day.must(toy_command(day, "graphs", (*settings, *own)), limit_s=300, env=env)
    return {"command_s": done.seconds, "steps": steps_of(day.out / "graphs")}


def rehearse(day: Day) -> dict[str, Any]:
    """Steps at 20K and 60K with 8 responses of a prompt, beside what `qlrl plan` says."""
    config, run = prepared(day), day.out / "rehearse"
    env, settings = day.worked
    shutil.rmtree(run, ignore_errors=True)
    planned = day.run(
        day.qlrl("plan", str(config), "--gpus", str(day.processes), "--hardware", day.hardware,
                 "--json"),
        limit_s=60,
    )  # fmt: skip
    # One phase, because a phase's end saves a checkpoint.
    phase = {"name": "mixed", "max_input_tokens": 60_000 if day.gpu else 2000, "steps": 99}
    own = [*settings, f"run.dir={run}", f"phases={json.dumps([phase])}"]
    done = day.run(
        day.qlrl("rl", str(config), *own, *day.ranks()),
        limit_s=420,
        env=env,
        until=lambda: len(record(run)) >= 4,  # two prompts of each length
    )
    steps = steps_of(run)
    if len(steps) < 1:
        raise Failed(done.output[-2500:])
    text = planned.output
    plan = json.loads(text[text.index("{") : text.rindex("}") + 1]) if "{" in text else text
    return {"steps": steps, "plan": plan, "sleep": sleep_lines(run), "command_s": done.seconds}


def engine(day: Day) -> dict[str, Any]:
    """GPU memory at each point of sleep, wake-up and reload; what seeds and log-probs cost; weight
    sync, prefill, decode and update beside a copy and a matmul."""
    return inner(day, "gpu_engine.py", "measure", str(prepared(day)), limit_s=300)


def sync(day: Day) -> dict[str, Any]:
    """The stream of weights into the engine, against a copy."""
    sizes = {"layers": 28, "hidden": 2048, "heads": 16, "kv-heads": 8, "ffn": 6144, "vocab": 49_152}
    options = [f"--{name}={size}" for name, size in sizes.items()] if day.gpu else ["--layers=1"]
    return bench(day, "sync", *options, limit_s=180)


def rollout(day: Day) -> dict[str, Any]:
    """Generation with responses of many lengths: plain, sorted, partial."""
    env, settings = day.worked
    config = toy_config(day, day.out / "rollout")
    more = [
        "rollout.tokens_per_round=16",
        "algorithm.max_staleness=4",
        "rollout.max_response_tokens=64",
    ]
    sizes = ["--steps=2", "--rounds=1"]
    return bench(day, "rollout", str(config), *settings, *more, *sizes, *day.ranks(),
                 limit_s=240, env=env)  # fmt: skip


def update(day: Day) -> dict[str, Any]:
    """An update with shared prompts, against separate ones."""
    return bench(day, "update", *([] if day.gpu else ["--layers=1", "--prompt-tokens=64"]),
                 limit_s=180)  # fmt: skip


def kernels(day: Day) -> dict[str, Any]:
    """Attention kernels forward and backward, and the rate of a large matmul."""
    return checked(day, "kernels", limit_s=180)


def fp8(day: Day) -> dict[str, Any]:
    """Transformer Engine's layers in bfloat16 and FP8 against Megatron's own."""
    return checked(day, "engine_tensorwise", "engine_blockwise", limit_s=300)


PARTS: dict[str, Callable[[Day], dict[str, Any]]] = {
    part.__name__: part
    for part in (
        machine,
        sft,
        toy,
        repeat,
        kill,
        rehearse,
        engine,
        graphs,
        deterministic,
        kernels,
        sync,
        rollout,
        fp8,
        update,
    )  # fmt: skip
}
"""In order of worth."""


def again(day: Day, name: str, copy: str, *, deterministic: bool = False) -> dict[str, Any]:
    """Runs the toy once more, as `copy`, and compares it with `name`."""
    env, settings = day.worked
    shutil.rmtree(day.out / copy, ignore_errors=True)
    command = toy_command(day, copy, settings, deterministic=deterministic)
    done = day.must(command, limit_s=240, env=env | (DETERMINISTIC_ENV if deterministic else {}))
    return {"command_s": done.seconds, **differences(day.out / copy, day.out / name)}


def killed(day: Day, name: str, copy: str, *, deterministic: bool = False) -> dict[str, Any]:
    """Runs the toy as `copy`, kills it, starts it again, and compares it with `name`."""
    env, settings = day.worked
    env = env | (DETERMINISTIC_ENV if deterministic else {})
    run = day.out / copy
    shutil.rmtree(run, ignore_errors=True)
    command = toy_command(day, copy, settings, deterministic=deterministic)
    first = day.run(command, limit_s=240, env=env, until=lambda: len(record(run)) >= KILL_AFTER)
    if first.code is not None:
        raise Failed(
            f"the run ended with {first.code} before it was killed\n{first.output[-2500:]}"
        )
    second = day.must(command, limit_s=240, env=env)
    resumed = re.search(r"resuming from \S+/step_0*(\d+)", second.output)
    return {
        "killed_after": len(record(run)) and KILL_AFTER,
        "resumed_at": int(resumed[1]) if resumed else None,
        "restart_s": second.seconds,
        **differences(run, day.out / name),
    }


def toy_config(day: Day, run: Path) -> Path:
    config = {
        "model": {"path": str(day.toy_start()), "name": "toy"},
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


def toy_command(
    day: Day, name: str, settings: tuple[str, ...], *, deterministic: bool = False
) -> list[str]:
    config = toy_config(day, day.out / name)
    return day.qlrl("rl", str(config), *settings, *day.ranks(), deterministic=deterministic)


def prepared(day: Day) -> Path:
    """Returns the config of the rehearsal, whose model and documents are made at its first use."""
    folder = day.out / "rehearsal"
    config = folder / "config.json"
    if not config.is_file():
        command = [sys.executable, str(TOOLS / "gpu_engine.py"), "prepare", str(folder),
                   "--tokenizer", str(day.tokenizer)]  # fmt: skip
        day.must([*command, *([] if day.gpu else ["--small"])], limit_s=240)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"  # the own reward
    return config


def bench(day: Day, *arguments: str, limit_s: float, env: Mapping[str, str] | None = None) -> Any:
    output = day.must(day.qlrl("bench", *arguments), limit_s=limit_s, env=env).output
    return json.loads(_json(output))


def _json(output: str) -> str:
    """Returns the last JSON object of an output, which begins and ends at the start of a line."""
    end = output.rindex("\n}")
    begin = output.rindex("\n{", 0, end) if "\n{" in output[:end] else output.index("{")
    return output[begin : end + 2]


def inner(day: Day, tool: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Runs a tool that writes JSON."""
    file = day.out / f"{day.part}.json"
    env, _ = day.worked
    command = [sys.executable, str(TOOLS / tool), *arguments, "--out", str(file)]
    try:
        day.must(command, limit_s=limit_s, env=env)
    except Failed as failure:
        # Whatever it measured before it failed is worth having.
        if file.is_file():
            return {"failed": str(failure), **json.loads(file.read_text())}
        raise
    return json.loads(file.read_text())


def checked(day: Day, *parts: str, limit_s: float) -> dict[str, Any]:
    figures = inner(day, "gpu_check.py", "--parts", *parts, limit_s=limit_s)
    return {name: figures[name] for name in parts if name in figures} | {
        name: figures[name] for name in ("failed",) if name in figures
    }


def record(run: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each step so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


SHOWN = (
    "timing_s/", "perf/", "training/", "actor/grad_norm", "actor/entropy", "critic/rewards/mean",
    "response_length/mean", "prompt_length/mean", "sync/",
)  # fmt: skip


TOLD = (
    "timing_s/step", "timing_s/gen", "timing_s/update_actor", "perf/max_memory_reserved_gb",
    "training/rollout_probs_diff_mean",
)  # fmt: skip


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith(SHOWN)}
        for line in record(run)
    ]


def sleep_lines(run: Path) -> list[str]:
    """Returns what the engine said on sleep, wake-up and reload."""
    words = re.compile(r"Sleep mode freed.*|It took .* (?:asleep|wake up).*|Reloading and.*")
    files = sorted((run / "logs").glob("*")) if (run / "logs").is_dir() else []
    found = [m for f in files for m in words.findall(f.read_text(errors="replace"))]
    return found[:40]


def differences(run: Path, reference: Path) -> dict[str, Any]:
    """Compares two runs bit for bit: rollouts, metrics (timings left out) and released weights.
    Says of each the first step at which it differs."""
    ours, theirs = record(run), record(reference)
    by_metric: dict[str, dict[str, Any]] = {}
    for mine, other in zip(ours, theirs, strict=False):
        for name in sorted(mine.keys() | other.keys()):
            if name.startswith(("timing_s/", "perf/")) or mine.get(name) == other.get(name):
                continue
            by_metric.setdefault(
                name,
                {"first_step": mine["step"], "run": mine.get(name), "reference": other.get(name)},
            )
    texts: dict[str, Any] = {}
    for file in sorted((reference / "rollouts").iterdir()):
        pair = [f.read_text() if f.is_file() else "" for f in (run / "rollouts" / file.name, file)]
        if pair[0] != pair[1]:
            a, b = ([json.loads(line)["response"] for line in text.splitlines()] for text in pair)
            same = sum(x == y for x, y in zip(a, b, strict=False))
            texts[file.name] = {"responses": len(b), "equal": same}
    weights = [f / "hf" / "model.safetensors" for f in (run, reference)]
    equal = weights[0].read_bytes() == weights[1].read_bytes()
    first = sorted((m["first_step"], name) for name, m in by_metric.items())
    return {
        "bitwise_equal": equal and not by_metric and not texts and len(ours) == len(theirs),
        "steps": [len(ours), len(theirs)],
        "weights_equal": equal,
        "largest_weight_difference": 0.0 if equal else weight_difference(*weights),
        "first_metrics_that_differ": {name: by_metric[name] for _, name in first[:12]},
        "metrics_that_differ": len(by_metric),
        "rollouts_that_differ": texts,
    }


def weight_difference(ours: Path, theirs: Path) -> float | str:
    code = (
        "import sys; from safetensors.torch import load_file as l; a, b = map(l, sys.argv[1:]); "
        "print(max(float((a[k].double() - b[k].double()).abs().max()) for k in a))"
    )
    command = [sys.executable, "-c", code, str(ours), str(theirs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else done.stderr[-300:]


def table(results: Mapping[str, Any]) -> str:
    """One line for each part: its seconds, and the figures that say most."""
    lines = ["| part | s | result |", "|---|---|---|"]
    for name, result in results.items():
        if name in PARTS:
            lines.append(f"| {name} | {result['seconds']:.0f} | {headline(name, result)} |")
    return "\n".join(lines)


def headline(name: str, result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return "FAILED: " + result["failed"].strip().splitlines()[-1][:160]
    if "bitwise_equal" in result:
        first = list(result["first_metrics_that_differ"].items())[:2]
        differing = ", ".join(f"{k} from step {v['first_step']}" for k, v in first)
        return "bitwise equal" if result["bitwise_equal"] else f"differs: {differing or 'rollouts'}"
    if "steps" in result and isinstance(result["steps"], list) and result["steps"]:
        last = result["steps"][-1]
        parts = {k.split("/")[1]: round(last[k], 3) for k in TOLD if k in last}
        return f"{len(result['steps'])} steps; last {parts}"
    if name == "deterministic":
        return "; ".join(
            f"{k}: {headline('', v)}" for k, v in result.items() if isinstance(v, dict)
        )
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, nargs="?", help="folder for everything")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these parts alone, in order")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--processes", type=int, help="ranks of a run; default: one per GPU")
    parser.add_argument("--start", type=Path, help="weights the toy's RL starts from")
    parser.add_argument("--data", type=Path, help="folder that `qlrl data toy` wrote")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples" / "quickstart" / "base",
                        help="tokenizer of the rehearsal")  # fmt: skip
    parser.add_argument("--hardware", help="of `qlrl plan`; default: as the GPU's name says")
    arguments = parser.parse_args()
    if arguments.list:
        print(
            "\n".join(f"{name:14} {part.__doc__.splitlines()[0]}" for name, part in PARTS.items())
        )
        return 0
    if arguments.out is None:
        parser.error("OUT is missing")
    if unknown := set(arguments.parts or ()) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    gpus = gpu_names()
    day = Day(
        out=arguments.out.resolve(),
        processes=arguments.processes or max(len(gpus), 1),
        gpu=bool(gpus),
        start=arguments.start and arguments.start.resolve(),
        data=arguments.data and arguments.data.resolve(),
        tokenizer=arguments.tokenizer.resolve(),
        hardware=arguments.hardware or ("h200-141g" if "H200" in str(gpus) else "h100-80g"),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    file = day.out / "day.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        day.results = json.loads(file.read_text())
    names = arguments.parts or list(PARTS)
    for name in names:
        day.part = name
        began = time.monotonic()
        try:
            result = PARTS[name](day)
        except Exception as error:  # one broken part must not hide the results of the others
            told = str(error) if isinstance(error, Failed) else traceback.format_exc()
            result = {"failed": told}
        day.results[name] = result | {"seconds": round(time.monotonic() - began, 1)}
        file.write_text(json.dumps(day.results, indent=1))
        print(f"{name}: {day.results[name]['seconds']} s, {headline(name, result)}", flush=True)
        if "failed" in result:
            print(result["failed"][-2000:], flush=True)
    print(table(day.results))
    return int(any("failed" in day.results[name] for name in names))


def gpu_names() -> list[str]:
    """Returns the names of the GPUs here, without loading torch."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")]


if __name__ == "__main__":
    sys.exit(main())
