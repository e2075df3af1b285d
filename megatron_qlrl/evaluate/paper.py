"""Scores of the paper, as published: QwenLong-L1 (arXiv 2505.17667 v2), Table 4.

None of these numbers was measured with this package. They hold for the paper's judge, answer
extraction and truncation.
"""

SOURCE = "QwenLong-L1, arXiv 2505.17667 v2, Table 4"
COLUMNS = ("docmath", "frames", "2wikimqa", "hotpotqa", "musique", "narrativeqa", "qasper")
"""Names of the benchmarks, as `qlrl data benchmark` knows them."""

TABLE_4: dict[str, tuple[float, ...]] = {
    "o1-preview": (64.5, 80.8, 87.5, 83.5, 69.0, 68.0, 57.0),
    "Claude-3.7-Sonnet-Thinking": (67.5, 70.9, 86.5, 84.4, 68.3, 61.5, 56.0),
    "o3-mini": (66.5, 75.5, 86.5, 83.5, 66.5, 59.0, 55.0),
    "Qwen3-Plus": (66.0, 73.6, 90.5, 82.4, 69.8, 57.5, 52.5),
    "QwQ-Plus": (64.5, 73.5, 89.0, 81.0, 66.5, 62.0, 53.5),
    "Gemini-2.0-Flash-Thinking": (63.0, 69.8, 82.9, 79.5, 62.5, 57.0, 45.5),
    "DeepSeek-R1": (66.0, 79.6, 89.9, 82.5, 74.5, 59.5, 53.0),
    "Qwen3-235B-A22B": (67.5, 74.6, 91.5, 84.4, 63.3, 60.0, 53.0),
    "QwQ-32B": (59.5, 72.9, 90.5, 78.5, 66.0, 58.0, 57.5),
    "Qwen3-32B": (58.0, 70.0, 87.0, 83.4, 62.8, 57.5, 56.0),
    "R1-Distill-Qwen-32B": (62.5, 67.0, 84.0, 80.5, 61.0, 54.0, 50.0),
    "R1-Distill-Qwen-14B": (61.0, 64.2, 87.0, 77.5, 58.0, 51.0, 51.0),
    "R1-Distill-Qwen-32B-SFT": (65.0, 71.6, 87.0, 80.5, 65.5, 57.5, 54.0),
    "QwenLong-L1-32B-GRPO": (68.0, 72.2, 87.0, 82.0, 66.0, 61.0, 56.0),
    "QwenLong-L1-32B-DAPO": (67.5, 70.1, 90.5, 83.0, 69.0, 56.0, 58.5),
}
MEANS = {
    "o1-preview": 72.9,
    "Claude-3.7-Sonnet-Thinking": 70.7,
    "o3-mini": 70.4,
    "Qwen3-Plus": 70.3,
    "QwQ-Plus": 70.0,
    "Gemini-2.0-Flash-Thinking": 65.7,
    "DeepSeek-R1": 72.1,
    "Qwen3-235B-A22B": 70.6,
    "QwQ-32B": 69.0,
    "Qwen3-32B": 67.8,
    "R1-Distill-Qwen-32B": 65.6,
    "R1-Distill-Qwen-14B": 64.2,
    "R1-Distill-Qwen-14B-SFT": 65.0,
    "QwenLong-L1-14B-GRPO": 68.2,
    "QwenLong-L1-14B-DAPO": 68.3,
    "R1-Distill-Qwen-32B-SFT": 68.7,
    "QwenLong-L1-32B-GRPO": 70.3,
    "QwenLong-L1-32B-DAPO": 70.7,
}
"""Means as printed; of some models only the mean is recorded here."""


def paper_lines() -> list[str]:
    """Returns the table as lines of text, marked as the paper's."""
    lines = [
        f"From the paper, not measured here ({SOURCE}):",
        f"{'model':<28}" + "".join(f"{name:>12}" for name in COLUMNS) + f"{'mean':>7}",
    ]
    for model, mean in MEANS.items():
        cells = TABLE_4.get(model)
        shown = [f"{cell:.1f}" for cell in cells] if cells else ["-"] * len(COLUMNS)
        lines.append(f"{model:<28}" + "".join(f"{cell:>12}" for cell in shown) + f"{mean:>7.1f}")
    return lines
