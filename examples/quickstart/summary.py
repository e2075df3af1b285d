"""Table of a quickstart run, and a check of its Hugging Face folder with transformers.

The last line is JSON: accuracies, the share of held-out prompts for which transformers' greedy
answer from the released folder is the one vLLM gave from the trainer's weights, and the largest
trainer/engine log-prob difference of the RL run.
"""

import argparse
import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STAGES = {
    "start": "sft/eval/start.json",
    "sft": "sft/eval/sft.json",
    "phase1": "rl/eval/phase1.json",
    "phase2": "rl/eval/phase2.json",
}
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time")
    args = parser.parse_args()

    accuracy = {stage: read_scores(args.out / path) for stage, path in STAGES.items()}
    print("\nheld-out accuracy (greedy)   short    long")
    for stage, score in accuracy.items():
        print(f"{stage:<26} {score['short']:7.1%} {score['long']:7.1%}")

    folder = args.out / "rl/hf"
    result = {
        "accuracy": accuracy,
        "hf_folder": str(folder),
        "greedy_match": greedy_match(args.out, folder),
        "max_logprob_diff": max_logprob_diff(args.out / "rl/metrics.jsonl"),
        "seconds": round(time.time() - args.started, 1),
    }
    print(json.dumps(result))


def read_scores(path: Path) -> dict[str, float]:
    metrics = json.loads(path.read_text())
    return {size: metrics[f"val/eval_{size}/score"] for size in ("short", "long")}


def max_logprob_diff(path: Path) -> float:
    name = "training/rollout_logprobs_diff_max"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    return max(step[name] for step in steps if name in step)


def greedy_match(out: Path, folder: Path) -> float:
    """Share of the held-out prompts with the same greedy text from transformers and vLLM."""
    records = [json.loads(x) for x in (out / "rl/eval/phase2.jsonl").read_text().splitlines()]
    vllm = {r["uid"]: r["response"] for r in records}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    equal = []
    for file in sorted((out / "data").glob("eval_*.parquet")):
        rows = pq.read_table(file).to_pylist()
        for start in range(0, len(rows), BATCH):
            texts = greedy(tokenizer, model, [r["prompt"] for r in rows[start : start + BATCH]])
            equal += [
                vllm[f"{file.stem}:{start + i}"] == text for i, text in enumerate(texts)
            ]
    return sum(equal) / len(equal)


@torch.no_grad()
def greedy(tokenizer, model, chats) -> list[str]:
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    done = model.generate(**batch, do_sample=False, max_new_tokens=32)
    return tokenizer.batch_decode(done[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
