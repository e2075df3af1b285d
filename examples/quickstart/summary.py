"""Prints the table of a quickstart run, and checks its Hugging Face folder with transformers.

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
        **compare_with_transformers(args.out, folder),
        "train_logprob_diff": train_logprob_diff(args.out / "rl/metrics.jsonl"),
        "seconds": round(time.time() - args.started, 1),
    }
    print(json.dumps(result))


def read_scores(path: Path) -> dict[str, float]:
    metrics = json.loads(path.read_text())
    return {size: metrics[f"val/eval_{size}/score"] for size in ("short", "long")}


def train_logprob_diff(path: Path) -> dict[str, float]:
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    name = "training/rollout_logprobs_diff_"
    trained = [step for step in steps if f"{name}max" in step]
    return {
        "max": max(step[f"{name}max"] for step in trained),
        "mean": sum(step[f"{name}mean"] for step in trained) / len(trained),
    }


def compare_with_transformers(out: Path, folder: Path) -> dict[str, float]:
    lines = (out / "rl/eval/phase2.jsonl").read_text().splitlines()
    vllm = {record["uid"]: record for record in map(json.loads, lines)}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    exact, model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float64, torch.float32)
    )
    equal, behind, difference, rounding = [], [], 0.0, 0.0
    for file in sorted((out / "data").glob("eval_*.parquet")):
        rows = pq.read_table(file).to_pylist()
        for start in range(0, len(rows), BATCH):
            chats = [row["prompt"] for row in rows[start : start + BATCH]]
            answers = [vllm[f"{file.stem}:{start + i}"] for i in range(len(chats))]
            texts = greedy(tokenizer, model, chats)
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
def greedy(tokenizer, model, chats) -> list[str]:
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    done = model.generate(**batch, do_sample=False, max_new_tokens=32)
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
