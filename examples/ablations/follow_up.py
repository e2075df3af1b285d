"""What do the options of the follow-up paper (QwenLong-L1.5, arXiv 2512.12967) bring on the toy
task? Adds one at a time to GRPO, and all together, at equal RL tokens, and prints what they score.

    python examples/ablations/follow_up.py runs/follow_up --jobs 2

The training data hold two tasks, nine short documents for each long one. Each run is one `qlrl`
process on one thread. The same command continues after an interruption. `--table` prints the table
of what is finished and trains nothing.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from studies import differences, interval, percent, read_arguments, read_scores, spread, train

from megatron_qlrl.data.builders.toy import build_toy
from megatron_qlrl.platform.files import replaced

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "quickstart" / "base"
SIZES = ("short", "long")
SHORT_FOR_EACH_LONG = 9

# A step generates 32 groups of 8: about 14.4K tokens at the data's own shares, each prompt counted
# once, and 19.4K at equal shares. The table shows the tokens that were really used.
STEPS, STEPS_AT_EQUAL_SHARES = 66, 49
TASKS = "curriculum.tasks={toy_short: 1, toy_long: 1}"
BY_TASK, BY_GROUP = "algorithm.advantage_std=task", "algorithm.aggregation=group_mean"
BAND = "algorithm.entropy_band=[0.08, 0.10]"
"""The entropy of GRPO alone begins at 0.10 nats, has its highest near 0.11 and ends at 0.07."""
GRPO = "GRPO"
ARMS: dict[str, tuple[str, ...]] = {
    GRPO: (),
    "equal shares of tasks": (TASKS,),
    "deviation of the task": (BY_TASK,),
    "loss by group": (BY_GROUP,),
    "entropy control": (BAND,),
    "all four": (TASKS, BY_TASK, BY_GROUP, BAND),
}


def main() -> None:
    args = read_arguments(__doc__ or "")
    out, seeds = args.out, range(args.seeds)
    if not args.table:
        make_data(out / "data")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: train_sft(out, seed), seeds))
            list(pool.map(lambda run: train_rl(out, *run), [(a, s) for s in seeds for a in ARMS]))
    report(out, args.seeds)


def make_data(folder: Path) -> None:
    """Writes the toy data, and train_tasks.parquet, whose `data_source` says the length."""
    mixed = folder / "train_tasks.parquet"
    if mixed.exists():
        return
    files = build_toy(folder, seed=0, num_train=10_000, num_eval=256, lengths=SIZES)
    table = pq.read_table(files["train"])
    long = pc.equal(pc.struct_field(table["extra_info"], "length"), "long").to_numpy()
    # Rows are short and long in turn; most of the long ones are left out.
    kept = ~long | (long.cumsum() % SHORT_FOR_EACH_LONG == 0)
    names = pa.array([f"toy_docqa_toy_{SIZES[int(is_long)]}" for is_long in long])
    table = table.set_column(table.schema.get_field_index("data_source"), "data_source", names)
    with replaced(mixed) as fresh:
        pq.write_table(table.filter(pa.array(kept)), fresh)


def train_sft(out: Path, seed: int) -> None:
    train(
        HERE / "config.yaml", out / "sft" / f"seed_{seed}", "sft", *of_all(out, seed),
        f"data.sft_files=[{out}/data/sft.parquet]", f"model.path={BASE}", "sft.max_steps=30",
        "algorithm.updates_per_step=1", "optimizer.lr=1.0e-3", "optimizer.min_lr_ratio=0.1",
    )  # fmt: skip


def train_rl(out: Path, arm: str, seed: int) -> None:
    steps = STEPS_AT_EQUAL_SHARES if TASKS in ARMS[arm] else STEPS
    train(
        HERE / "config.yaml", folder(out, arm) / f"seed_{seed}", "rl", *of_all(out, seed),
        f"data.train_files=[{out}/data/train_tasks.parquet]",
        f"model.path={out}/sft/seed_{seed}/hf", *ARMS[arm],
        f"phases=[{{name: all, max_input_tokens: 3500, steps: {steps}}}]",
    )  # fmt: skip


def of_all(out: Path, seed: int) -> list[str]:
    files = ",".join(f"{out}/data/eval_{size}.parquet" for size in SIZES)
    return [f"run.seed={seed}", f"data.eval_files=[{files}]"]


def folder(out: Path, arm: str) -> Path:
    return out / arm.replace(" ", "-")


def report(out: Path, seeds: int) -> None:
    """Prints each arm's scores, and how far they are from those of GRPO with the same seed."""
    usage_of = "RL tokens | long groups, % | masking, %"
    print(f"| arm | seeds | {usage_of} | short | long | short - GRPO | long - GRPO |")
    print("|---|---|---|---|---|---|---|---|---|")
    folders = [out / "sft" / f"seed_{seed}" for seed in range(seeds)]
    starts = [read_scores(run / "eval" / "sft.jsonl") for run in folders]
    cells = [percent([mean(scores[size].values()) for scores in starts]) for size in SIZES]
    print(f"| (after SFT) | {len(starts)} | | | | {' | '.join(cells)} | | |")
    for arm in ARMS:
        pairs = [(folder(out, arm) / run.name, folder(out, GRPO) / run.name) for run in folders]
        pairs = [pair for pair in pairs if all(map(Path.exists, map(answers, pair)))]
        if not pairs:
            continue
        runs = [run for run, _ in pairs]
        scores, others = (
            [read_scores(answers(run)) for run in side] for side in zip(*pairs, strict=True)
        )
        used = [usage(run) for run in runs]
        row = [
            arm,
            str(len(runs)),
            spread([use["tokens"] / 1e6 for use in used], 2) + " M",
            *(percent([use[name] for use in used]) for name in ("long", "masking")),
            *(percent([mean(own[size].values()) for own in scores]) for size in SIZES),
        ]
        for size in SIZES:
            both = zip(scores, others, strict=True)
            apart = [differences(own, other, size) for own, other in both]
            row.append("" if arm == GRPO else interval(apart))
        print(f"| {' | '.join(row)} |")


def answers(run: Path) -> Path:
    return run / "eval" / "all.jsonl"


def usage(run: Path) -> dict[str, float]:
    """Returns what a run used: RL tokens, the share of its groups with long documents, the share of
    its updates that masked."""
    lines: list[dict[str, Any]] = [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "perf/total_num_tokens" in line
    ]
    long = "source/toy_docqa_toy_long/batch/groups"
    return {
        "tokens": sum(line["perf/total_num_tokens"] for line in lines),
        "long": sum(line.get(long, 0) for line in lines) / sum(x["batch/groups"] for x in lines),
        "masking": mean(line.get("actor/aepo_masking", 0.0) for line in lines),
    }


if __name__ == "__main__":
    main()
