"""Prints the table of a run of this example or of smollm2-135m, and checks its Hugging Face folder
with transformers.

The last line is JSON:
- accuracies;
- `greedy_match`: the share of held-out prompts whose greedy answer by transformers, from the
  released folder, equals vLLM's, from the trainer's weights, apart from ties within rounding;
- `max_logprob_diff`: the largest difference between the log-probs that both give those answers;
- `max_logprob_rounding`: the same between transformers in float32 and float64, for comparison;
- `train_logprob_diff`: the difference between trainer and engine over all sampled tokens.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_qlrl.config.load import load_config

Answer = dict[str, Any]
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time")
    parser.add_argument(
        "--compare", type=int, help="prompts of each file to compare with transformers (all)"
    )
    parser.add_argument("--samples", type=int, default=0, help="answers of each file to print")
    args = parser.parse_args()

    answers = {stage: read_answers(path) for stage, path in stages(args.out).items()}
    scores = {stage: by_size(records, score) for stage, records in answers.items()}
    print_table("held-out accuracy (greedy)", scores)
    said = {stage: by_size(records, says_gold) for stage, records in answers.items()}
    print_table("the gold stands in the response", said)
    print_samples(answers, args.samples)

    folder = args.out / "rl/hf"
    last = list(answers.values())[-1]
    result = {
        "accuracy": {
            stage: {size: mean(values) for size, values in sizes.items()}
            for stage, sizes in scores.items()
        },
        "hf_folder": str(folder),
        **compare_with_transformers(args.out, folder, last, args.compare),
        "train_logprob_diff": train_logprob_diff(args.out / "rl/metrics.jsonl"),
        "seconds": round(time.time() - args.started, 1),
    }
    print(json.dumps(result))


def stages(out: Path) -> dict[str, Path]:
    """Returns the file of answers of each stage, in order."""
    phases = [phase.name for phase in load_config(out / "rl/config.yaml").phases]
    return {
        "start": out / "sft/eval/start.jsonl",
        "sft": out / "sft/eval/sft.jsonl",
        **{phase: out / f"rl/eval/{phase}.jsonl" for phase in phases},
    }


def read_answers(path: Path) -> dict[str, Answer]:
    """Returns the records of a run's answers by uid (file stem and row number)."""
    return {record["uid"]: record for record in map(json.loads, path.read_text().splitlines())}


def by_size(records: dict[str, Answer], value: Callable[[Answer], float]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for uid, record in records.items():
        size = uid.partition(":")[0].removeprefix("eval_")
        values.setdefault(size, []).append(value(record))
    return values


def score(record: Answer) -> float:
    return record["score"]


def says_gold(record: Answer) -> float:
    """Returns 1 if the gold stands anywhere in the response as words of its own: what a model knows
    that leaves out the sentence which the rule looks for."""
    gold = re.escape(record["ground_truth"])
    return float(re.search(rf"(?<![\w.]){gold}(?!\w|[.-]\w)", record["response"]) is not None)


def print_table(title: str, stages: dict[str, dict[str, list[float]]]) -> None:
    """Prints means with their standard errors."""
    print(f"\n{title:<32}" + "".join(f"{size:>16}" for size in stages["start"]))
    for stage, sizes in stages.items():
        cells = (f"{mean(v):.1%} ± {stdev(v) / len(v) ** 0.5:.1%}" for v in sizes.values())
        print(f"{stage:<32}" + "".join(f"{cell:>16}" for cell in cells))


def print_samples(answers: dict[str, dict[str, Answer]], count: int) -> None:
    """Prints the first questions of each file with the answer of every stage."""
    for uid, first in answers["start"].items():
        if int(uid.partition(":")[2]) < count:
            print(f"\n{uid}  {first['question']}  gold: {first['ground_truth']}")
            for stage, records in answers.items():
                print(f"  {stage:<8} {records[uid]['score']:.0f}  {records[uid]['response']!r}")


def train_logprob_diff(path: Path) -> dict[str, float]:
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    name = "training/rollout_logprobs_diff_"
    trained = [step for step in steps if f"{name}max" in step]
    return {
        "max": max(step[f"{name}max"] for step in trained),
        "mean": sum(step[f"{name}mean"] for step in trained) / len(trained),
    }


def compare_with_transformers(
    out: Path, folder: Path, vllm: dict[str, Answer], count: int | None
) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    exact, model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float64, torch.float32)
    )
    max_tokens = load_config(out / "rl/config.yaml").rollout.max_response_tokens
    equal, behind, difference, rounding = [], [], 0.0, 0.0
    for file in sorted((out / "data").glob("eval_*.parquet")):
        rows = pq.read_table(file).to_pylist()[:count]
        if f"{file.stem}:0" not in vllm:
            continue
        for start in range(0, len(rows), BATCH):
            chats = [row["prompt"] for row in rows[start : start + BATCH]]
            answers = [vllm[f"{file.stem}:{start + i}"] for i in range(len(chats))]
            texts = greedy(tokenizer, model, chats, max_tokens)
            equal += [a["response"] == t for a, t in zip(answers, texts, strict=True)]
            ids = [a["token_ids"] for a in answers]
            wide, narrow = (logprobs_of(tokenizer, m, chats, ids) for m in (exact, model))
            behind += [float((best - own).max()) for own, best in wide]
            for answer, (want, _), (own, _) in zip(answers, wide, narrow, strict=True):
                said = torch.tensor(answer["logprobs"])
                difference = max(difference, float((said - own).abs().max()))
                rounding = max(rounding, float((own - want).abs().max()))
    # Both sides of a tie may each be wrong by three times the rounding of transformers in float32.
    matches = [same or gap <= 6 * rounding for same, gap in zip(equal, behind, strict=True)]
    return {
        "greedy_match": sum(matches) / len(matches),
        "max_logprob_diff": difference,
        "max_logprob_rounding": rounding,
    }


@torch.no_grad()
def greedy(tokenizer, model, chats, max_tokens: int) -> list[str]:
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    done = model.generate(**batch, do_sample=False, max_new_tokens=max_tokens)
    return tokenizer.batch_decode(done[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def logprobs_of(tokenizer, model, chats, answers) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns for each answer (token ids) the log-probs of its tokens, and those of the best token
    in each place. Padding is on the right, where a causal model does not see it."""
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    tokens = [
        torch.tensor([*prompt, *answer])
        for prompt, answer in zip(prompts["input_ids"], answers, strict=True)
    ]
    logits = model(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)).logits
    pairs = []
    for row, ids, answer in zip(logits, tokens, answers, strict=True):
        num = len(answer)
        logprobs = row[len(ids) - num - 1 : len(ids) - 1].log_softmax(-1)
        pairs.append((logprobs.gather(1, ids[-num:, None])[:, 0], logprobs.max(-1).values))
    return pairs


if __name__ == "__main__":
    main()
