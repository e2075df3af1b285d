"""Why does phase 2 of the quickstart, on long documents, forget short ones, and what keeps them?
Changes one thing of phase 2 at a time and prints what each run scores.

    python examples/ablations/forgetting.py runs/forgetting --jobs 2

All arms with seed 0; with the other seeds the quickstart as it is, and without carried prompts.
Each run is one `qlrl` process on one thread. The same command continues after an interruption.
`--table` prints the table of what is finished and trains nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from studies import Scores, differences, interval, qlrl, read_arguments, read_scores, train

CONFIG = Path(__file__).resolve().parents[1] / "quickstart" / "config.yaml"
ALONE, CARRIED = "no carried prompts", "carried_share 0.25"


def phase_2(settings: str) -> str:
    return f"phases.1.overrides={{{settings}}}"


ARMS = {
    ALONE: ("curriculum.carried_share=0",),
    CARRIED: (),
    "carried_share 0.5": ("curriculum.carried_share=0.5",),
    "learning rate 2e-4": ("curriculum.carried_share=0", phase_2("optimizer: {lr: 2.0e-4}")),
    "learning rate 4e-4, carried_share 0.25": (phase_2("optimizer: {lr: 4.0e-4}"),),
    "learning rate 2e-4, carried_share 0.5": (
        "curriculum.carried_share=0.5",
        phase_2("optimizer: {lr: 2.0e-4}"),
    ),
    "KL with coefficient 0.1": (
        "curriculum.carried_share=0",
        phase_2("algorithm: {kl_coef: 0.1}"),
    ),
}
"""Settings beside the quickstart's config, whose phase 2 has a quarter of carried prompts."""
SIZES = ("short", "long")


def main() -> None:
    args = read_arguments(__doc__ or "")
    out, seeds = args.out, range(args.seeds)
    if not args.table:
        data = out / "data"
        if not (data / "eval_long.parquet").exists():
            qlrl(out / "data.log", "data", "toy", data, "--train", 10000, "--eval", 1024)
        runs = [(arm, s) for s in seeds for arm in ARMS if s == 0 or arm in (ALONE, CARRIED)]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: train_sft(out, seed), seeds))
            list(pool.map(lambda run: train_rl(out, *run), runs))
    report(out)


def train_sft(out: Path, seed: int) -> None:
    train(
        CONFIG, out / "sft" / f"seed_{seed}", "sft", *files(out), f"run.seed={seed}",
        "optimizer.lr=1.0e-3", "optimizer.min_lr_ratio=0.1",
    )  # fmt: skip


def train_rl(out: Path, arm: str, seed: int) -> None:
    model = out / "sft" / f"seed_{seed}" / "hf"
    train(
        CONFIG, folder(out, arm) / f"seed_{seed}", "rl", *files(out), f"run.seed={seed}",
        f"model.path={model}", *ARMS[arm],
    )  # fmt: skip


def files(out: Path) -> list[str]:
    data = out / "data"
    return [
        f"data.train_files=[{data}/train.parquet]",
        f"data.sft_files=[{data}/sft.parquet]",
        f"data.eval_files=[{data}/eval_short.parquet,{data}/eval_long.parquet]",
    ]


def folder(out: Path, arm: str) -> Path:
    return out / arm.replace(", ", "_").replace(" ", "-")


def report(out: Path) -> None:
    """Prints, for each arm, what phase 2 scores by seed, and how far it is from SFT."""
    print("| phase 2 | seed | after SFT, short / long | phase 1 | phase 2 |")
    print("|---|---|---|---|---|")
    changes: dict[str, list[dict[str, list[float]]]] = {}
    for arm in ARMS:
        for run in sorted(folder(out, arm).glob("seed_*")):
            answers = [
                out / "sft" / run.name / "eval" / "sft.jsonl",
                *(run / "eval" / f"phase{number}.jsonl" for number in (1, 2)),
            ]
            if not all(file.exists() for file in answers):
                continue
            start, first, second = map(read_scores, answers)
            seed = run.name.removeprefix("seed_")
            print(f"| {arm} | {seed} | {points(start)} | {points(first)} | {points(second)} |")
            changes.setdefault(arm, []).append(
                {size: differences(second, start, size) for size in SIZES}
            )
    headers = "phase 2 minus SFT, points (95 % over documents and seeds) | seeds | short | long"
    print(f"\n| {headers} |")
    print("|---|---|---|---|")
    for arm, runs in changes.items():
        cells = [interval([run[size] for run in runs]) for size in SIZES]
        print(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")


def points(scores: Scores) -> str:
    return " / ".join(f"{100 * mean(scores[size].values()):.1f}" for size in SIZES)


if __name__ == "__main__":
    main()
