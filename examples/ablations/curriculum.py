"""Is short first, then long, better than long alone, on the real model of examples/smollm2-135m?
Trains the arms of the question from the same starts, with the same number of RL steps, over several
seeds, and prints what they score.

    bash examples/smollm2-135m/run.sh                                     makes model and data
    python examples/ablations/curriculum.py runs/curriculum --jobs 2

Each run is one `qlrl` process on one thread. The same command continues after an interruption.
`--table` prints the table of what is finished and trains nothing.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from statistics import mean

from studies import differences, interval, percent, read_scores, train

CONFIG = Path(__file__).resolve().parents[1] / "smollm2-135m" / "config.yaml"
SHORT, LONG = 512, 1280  # input limits in tokens
PHASED = (
    f"phases=[{{name: short, max_input_tokens: {SHORT}, steps: 8}},"
    f" {{name: long, max_input_tokens: {LONG}, steps: 16}}]"
)
ARMS = {
    "phased": (PHASED,),
    "retrospective": (PHASED, "curriculum.carried_share=0.25"),
    "single": (f"phases=[{{name: long, max_input_tokens: {LONG}, steps: 24}}]",),
}
"""Settings of the arms. `single` has long documents alone; in the second phase `phased` has them
alone, too, and `retrospective` up to a quarter of short ones that were answered badly."""
SIZES = ("short", "long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2-135m"), help="OUT of run.sh")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--starts", nargs="+", choices=("sft", "base"), default=["sft"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            if "sft" in args.starts:
                list(pool.map(lambda seed: train_sft(args.run, args.out, seed), args.seeds))
            runs = [(s, a, seed) for seed in args.seeds for s in args.starts for a in args.arms]
            list(pool.map(lambda run: train_rl(args.run, args.out, *run), runs))
    report(args.out, args.seeds)


def train_sft(run: Path, out: Path, seed: int) -> None:
    data = run / "data"
    train(
        CONFIG, out / f"seed_{seed}" / "sft", "sft", *settings_of_all(run, seed),
        f"model.path={run}/model", f"data.sft_files=[{data}/sft.parquet]", "optimizer.lr=6.0e-5",
        "evaluation.before_training=true",
    )  # fmt: skip


def train_rl(run: Path, out: Path, start: str, arm: str, seed: int) -> None:
    sizes = SIZES if "short" in ARMS[arm][0] else ("long",)
    files = ",".join(f"{run}/data/train_{size}.parquet" for size in sizes)
    model = run / "model" if start == "base" else out / f"seed_{seed}" / "sft" / "hf"
    train(
        CONFIG, out / f"seed_{seed}" / f"{start}-{arm}", "rl", *settings_of_all(run, seed),
        f"model.path={model}", f"data.train_files=[{files}]", *ARMS[arm],
    )  # fmt: skip


def settings_of_all(run: Path, seed: int) -> list[str]:
    files = ",".join(f"{run}/data/eval_{size}.parquet" for size in SIZES)
    settings = [
        f"run.seed={seed}",
        f"data.eval_files=[{files}]",
        "evaluation.max_input_tokens=1280",
    ]
    if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()):
        settings.append("model.dtype=bfloat16")  # as run.sh
    return settings


def report(out: Path, seeds: list[int]) -> None:
    """Prints means over seeds and documents, and each pair of arms with the same start."""
    stages = {"start": "sft/eval/start", "sft": "sft/eval/sft"}
    stages |= {f"{s}-{a}": f"{s}-{a}/eval/long" for s in ("sft", "base") for a in ARMS}
    stages["sft-phased, after the short phase"] = "sft-phased/eval/short"
    scores = {
        stage: {
            seed: read_scores(file) for seed in seeds if (file := path(out, seed, name)).exists()
        }
        for stage, name in stages.items()
    }
    scores = {stage: runs for stage, runs in scores.items() if runs}
    print("| % right, mean over seeds ± their sample standard deviation | seeds | short | long |")
    print("|---|---|---|---|")
    for stage, runs in scores.items():
        cells = [percent([mean(run[size].values()) for run in runs.values()]) for size in SIZES]
        print(f"| {stage} | {len(runs)} | {' | '.join(cells)} |")
    print("\n| points, 95 % interval over documents and seeds | seeds | short | long |")
    print("|---|---|---|---|")
    arms = [stage for stage in scores if "-" in stage and "," not in stage]
    pairs = [(a, b) for a, b in combinations(arms, 2) if a.split("-")[0] == b.split("-")[0]]
    for one, two in [*((arm, "sft") for arm in arms if "sft" in scores), *pairs]:
        both = [seed for seed in scores[one] if seed in scores[two]]
        cells = [
            interval([differences(scores[one][s], scores[two][s], size) for s in both])
            for size in SIZES
        ]
        print(f"| {one} minus {two} | {len(both)} | {' | '.join(cells)} |")


def path(out: Path, seed: int, name: str) -> Path:
    return out / f"seed_{seed}" / f"{name}.jsonl"


if __name__ == "__main__":
    main()
