"""Chooses the responses of a run's rollout log that a page has room for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_qlrl.report.read import is_number, read_jsonl

MAX_TEXT = 6_000
"""Characters that are kept of a question or a response: its beginning and its end."""

FIELDS = ("uid", "data_source", "sample", "num_tokens", "finished", "score", "rule", "judge")
TEXTS = ("question", "prompt_end", "ground_truth", "response", "prediction", "matched")


def choose_samples(folder: Path, notes: list[str], *, max_bytes: int) -> list[dict[str, Any]]:
    """Returns responses by step, of steps spread evenly over the run, the newest and the oldest
    among them. Where not all fit, or texts are cut, `notes` say so."""
    files = sorted(folder.glob("step_*.jsonl"))
    chosen: dict[Path, list[dict[str, Any]]] = {}
    size = 0
    for index in spread(len(files)):
        kept = chosen[files[index]] = []
        for record in read_jsonl(files[index], notes):
            sample = _sample(files[index], record)
            size += len(json.dumps(sample))
            if size <= max_bytes:
                kept.append(sample)
        if size > max_bytes:
            shown = sum(map(bool, chosen.values()))  # the last one may have had no room at all
            notes.append(f"responses of {shown} of {len(files)} logged steps are shown")
            break
    samples = [sample for file in sorted(chosen) for sample in chosen[file]]
    if any([sample.pop("cut") for sample in samples]):
        notes.append(f"texts of more than {MAX_TEXT} characters are cut in the middle")
    return samples


def spread(count: int) -> Iterator[int]:
    """Yields 0 ... count - 1: the last, the first, then always the middle of a widest gap."""
    yield from [count - 1, 0][: min(count, 2)]
    gaps = [(0, count - 1)]
    while gaps:
        inner = [(low, high) for low, high in gaps if high - low > 1]
        yield from ((low + high) // 2 for low, high in inner)
        gaps = [g for a, b in inner for g in ((a, (a + b) // 2), ((a + b) // 2, b))]


def _sample(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    texts = {name: str(record.get(name, "")) for name in TEXTS}
    kept = {name: _shortened(text) for name, text in texts.items()}
    step = file.stem.removeprefix("step_")
    return {
        "step": int(step) if step.isdecimal() else 0,
        **{name: _plain(record.get(name)) for name in FIELDS},
        **kept,
        "cut": kept != texts,
    }


def _plain(value: Any) -> Any:
    return value if value is None or is_number(value) else _shortened(str(value))


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    gap = f"\n[... {len(text) - 2 * half} characters are left out ...]\n"
    return text[:half] + gap + text[-half:]
