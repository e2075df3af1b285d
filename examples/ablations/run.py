"""Runs every arm of arms.py with several seeds on the toy task, and writes a report.

    python examples/ablations/run.py runs/ablations --seeds 3 --jobs 2

Each run is one `qlrl` process on one thread. The same command continues after an interruption:
finished runs are skipped, others resume. At the end report.py writes results.json, table.md and the
curves under OUT/report from the runs' records.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from arms import ARMS, LIMITS, SFT_STEPS, Arm, Start
from report import report
from studies import train

from megatron_qlrl.data.builders.toy import build_toy
from megatron_qlrl.platform.files import replaced

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "quickstart" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()

    make_data(args.out / "data")
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        for start in SFT_STEPS:
            list(pool.map(lambda seed, start=start: train_sft(args.out, start, seed), seeds))
        # Seed by seed, so that whole sets of arms can be compared early.
        list(
            pool.map(lambda pair: train_rl(args.out, *pair), [(a, s) for s in seeds for a in ARMS])
        )
    report(args.out, seeds)


def make_data(folder: Path) -> None:
    """Writes documents of three lengths, and the longest of the training set once more alone."""
    longest = folder / "train_longer.parquet"
    if longest.exists():
        return
    files = build_toy(folder, seed=0, num_train=15000, num_eval=256, lengths=list(LIMITS))
    table = pq.read_table(files["train"])
    lengths = pc.struct_field(table["extra_info"], "length")
    with replaced(longest) as fresh:
        pq.write_table(table.filter(pc.equal(lengths, "longer")), fresh)


def train_sft(out: Path, start: Start, seed: int) -> None:
    train(
        HERE / "config.yaml",
        out / start / f"seed_{seed}",
        "sft",
        f"data.sft_files=[{out}/data/sft.parquet]",
        f"sft.max_steps={SFT_STEPS[start]}",
        f"run.seed={seed}",
        f"model.path={BASE}",
        "algorithm.updates_per_step=1",
        "optimizer.lr=1.0e-3",
        "optimizer.min_lr_ratio=0.1",
        f"data.eval_files={eval_files(out)}",
    )


def train_rl(out: Path, arm: Arm, seed: int) -> None:
    train(
        HERE / "config.yaml",
        out / arm.name / f"seed_{seed}",
        "rl",
        f"data.train_files=[{out}/data/{arm.train_file}.parquet]",
        f"model.path={start_folder(out, arm.start, seed)}",
        f"run.seed={seed}",
        f"data.eval_files={eval_files(out)}",
        "evaluation.before_training=true",
        *arm.settings,
    )


def start_folder(out: Path, start: Start, seed: int) -> Path:
    return BASE if start == "base" else out / start / f"seed_{seed}" / "hf"


def eval_files(out: Path) -> str:
    return "[" + ",".join(f"{out}/data/eval_{size}.parquet" for size in LIMITS) + "]"


if __name__ == "__main__":
    main()
