"""A run folder as a run writes it, small enough to work out by hand."""

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_qlrl.reward.pairs import pairs_digest
from megatron_qlrl.reward.verdict import prompt_digest

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</ScRiPt\n><img src=x onerror=alert(1)>",
    "<!--<script>",
    "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<meta http-equiv=refresh content='0;url=http://example.com'>",
    "<base href='http://example.com/'>",
    "<link rel=stylesheet href=http://example.com/a.css>",
    "<style>*{background:url(http://example.com)}</style>",
    "'\"><script>alert(1)</script>",
    '"};alert(1);//',
    "\u2028alert(1)\u2029",
    "{{script}}{{data}}{{policy}}",
    "<template><script>alert(1)</script></template>",
    "<math><mtext></mtext><mglyph><style><!--</style><img src onerror=alert(1)>",
    "\ud800<script>\x00alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]
"""Texts that would be script or markup if a page took them as such."""

STEP_S, TOKENS, PROCESSES = 10.0, 4_000, 2


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def step_line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "critic/rewards/mean": 0.1 * step,
        "timing_s/step": STEP_S,
        "timing_s/gen": 6.0,
        "timing_s/update_actor": 3.0,
        "perf/total_num_tokens": TOKENS,
        "perf/throughput": TOKENS / STEP_S / PROCESSES,
        **more,
    }


def sample(text: str = "the answer is 4", **more: Any) -> dict[str, Any]:
    return {
        "uid": "train:0",
        "data_source": "math",
        "sample": 0,
        "question": "2 + 2?",
        "prompt_end": "the end of the prompt: 2 + 2?",
        "ground_truth": "4",
        "response": text,
        "num_tokens": 5,
        "finished": True,
        "score": 1.0,
        "rule": 1.0,
        "judge": None,
        "matched": "words",
        "prediction": "4",
    } | more


def write_evaluation(
    folder: Path, name: str, scores: list[float], *, benchmark: str = "set"
) -> None:
    records = [
        {"uid": f"{benchmark}:{i}", "score": s, "question": f"q{i}", "ground_truth": "a"}
        for i, s in enumerate(scores)
    ]
    write_jsonl(folder / "eval" / f"{name}.jsonl", records)
    metrics = {f"val/{benchmark}/score": sum(scores) / len(scores), f"val/{benchmark}/masked": 0}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(metrics))


def write_certificate(file: Path, **fields: Any) -> Path:
    """Writes what `qlrl judge certify` would have written: 1 false positive among 50 pairs, 2
    false negatives among 40."""
    outcomes = {
        "equivalent": {"right": 38, "wrong": 2, "no_verdict": 0, "unasked": 0},
        "different": {"right": 49, "wrong": 1, "no_verdict": 0, "unasked": 3},
    }
    record = {
        "format": 1,
        "model": "judge",
        "urls": ["http://secret-host:2/v1"],
        "prompt": prompt_digest(),
        "pairs": pairs_digest(),
        "made": "2026-01-02T03:04:05+00:00",
        "software": "megatron_qlrl 1",
        "repeats": 3,
        "categories": {"names": outcomes},
        "agreeing": 90,
        "repeated": 90,
        "verdicts_per_s": 20.0,
        "mistakes": [1, 2, 3],
    }
    file.write_text(json.dumps(record | fields))
    return file


def write_run(folder: Path, *, steps: int = 4, lr: float = 1e-5) -> Path:
    """Writes a run of two phases of 2 steps, of which `steps` are done, evaluated at its start."""
    write_evaluation(folder, "start", [0.0, 1.0, 0.0, 1.0])
    config = {
        "model": {"path": "m"},
        "optimizer": {"lr": lr},
        "phases": [
            {"name": "short", "max_input_tokens": 100, "steps": 2},
            {"name": "long", "max_input_tokens": 200, "steps": 2},
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    test = {"step": 0, "val/set/score": 0.5, "timing_s/testing": 20.0}
    lines = [test, *(step_line(step) for step in range(steps))]
    write_jsonl(folder / "metrics.jsonl", lines)
    write_jsonl(folder / "starts.jsonl", [{"commit": "abc", "world_size": PROCESSES}])
    for step in range(steps):
        write_jsonl(folder / "rollouts" / f"step_{step:06d}.jsonl", [sample()])
    return folder


def change_config(folder: Path, /, **sections: Any) -> None:
    """Other settings in a run's config.yaml."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    file.write_text(yaml.safe_dump(config))
