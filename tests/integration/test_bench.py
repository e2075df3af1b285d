"""`qlrl bench` and tools/gpu_check.py on tiny shapes: the JSON and what must hold at any size."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
UNITS = 8 * 2.0**-23  # units in the last place of float32, relative
MODEL = ["--layers=2", "--hidden=64", "--heads=4", "--kv-heads=2", "--ffn=128", "--vocab=300"]


def bench(qlrl: Callable[..., Any], *argv: str) -> dict[str, Any]:
    return json.loads(qlrl("bench", *argv).check().out)


ROUNDING = """
import json, torch
from megatron_qlrl.bench.policy import LOSS, make_group, make_shape, random_policy
from megatron_qlrl.packing.distribute import group_rows

shape = make_shape(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=300, positions=320)
group = make_group(vocab=300, prompt_tokens=200, response_tokens=10, group=4)
rows = group_rows(group, max_tokens=210, share_prompt=False, cost=lambda prompt, responses: 1.0)
gradients = []
for dtype in (torch.float64, torch.float32):
    with random_policy(shape, dtype=dtype) as policy:
        policy.update(rows, LOSS, lr=0.0, permit=lambda _: False)  # gradients stay as they are
        gradients.append([p.main_grad.double() for p in policy.model.parameters()])
print(json.dumps([float((b - a).norm() / a.norm()) for a, b in zip(*gradients)]))
"""


@pytest.fixture(scope="module")
def rounding() -> float:
    """What float32 does to gradients of MODEL here: the largest norm of the difference from float64
    over the norm of any parameter's gradient."""
    done = subprocess.run(
        [sys.executable, "-c", ROUNDING], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return max(json.loads(done.stdout.splitlines()[-1]))


def test_update(qlrl: Callable[..., Any], rounding: float) -> None:
    found = bench(
        qlrl, "update", "--prompt-tokens=200", "--response-tokens=10", "--group=4", "--rounds=1",
        *MODEL,
    )  # fmt: skip
    # By hand, per layer: linear 2 * 64 * (2 * 64 + 2 * 32 + 3 * 128) = 73,728 a token, attention
    # 4 * 64 = 256 a pair; LM head 2 * 64 * 300 = 38,400 a response token.
    # Shared: 240 tokens, pairs 20,100 + 4 * (55 + 2,000). Separate: 4 * 210 tokens,
    # pairs 4 * 22,155. Both: 40 response tokens.
    shared = 2 * (73_728 * 240 + 256 * (20_100 + 4 * 2_055)) + 38_400 * 40
    separate = 2 * (73_728 * 840 + 256 * 4 * 22_155) + 38_400 * 40
    assert found["flop_ratio"] == pytest.approx(separate / shared)
    assert found["grad_rel_error"] <= found["max_grad_rel_error"] <= 3 * rounding + UNITS
    assert found["speedup"] > 0
    assert found["peak_memory_ratio"] > 0
    assert {"shared", "separate"} == set(found["sides"])
    # An update is three times the forward pass.
    floor, attention = found["floor"], 3 * 2 * 256 * (20_100 + 4 * 2_055)
    assert (floor["flops"], floor["attention_flops"]) == (3 * shared, attention)
    least = (3 * shared - attention) / floor["matmul_flops_per_s"]
    least += attention / floor["attention_flops_per_s"]
    assert floor["seconds"] == pytest.approx(least)
    assert found["share_of_floor"] == pytest.approx(least / found["sides"]["shared"]["cpu_s"])
    assert 0 < found["host_share"] < 1


def test_logprob(qlrl: Callable[..., Any]) -> None:
    found = bench(qlrl, "logprob", "--vocab=40000", "--tokens=512", "--hidden=32", "--rounds=1")
    # Of log-probs of about -log(40,000) = -10.6, whose unit is 8 times that of 1.
    assert found["max_error"] <= 3 * found["full_logits_max_error"] + 8 * UNITS
    # One tensor of full logits has 78 MiB; two blocks of ours have 8 MiB.
    assert found["added_peak_bytes"]["full_logits"] > 3 * 40_000 * 512 * 4
    assert found["added_peak_ratio"] < 1 / 13
    assert set(found["added_peak_bytes_by_tokens"]) == {"128", "512", "2048"}


def test_pack(qlrl: Callable[..., Any]) -> None:
    found = bench(qlrl, "pack", "--mixes=100")
    assert found["max_over_mean_worst"] <= 1.01
    assert found["cap_violations"] == 0
    assert 10_000 < found["mean_prompt_tokens"] < 12_500


def test_row_does_not_depend_on_context_parallel_ranks(
    qlrl: Callable[..., Any], rounding: float
) -> None:
    shape = ["row", "--prompt-tokens=300", "--response-tokens=20", "--group=3", *MODEL]
    one, two = (bench(qlrl, *shape, f"--cp={cp}") for cp in (1, 2))
    assert one["row_tokens"] == two["row_tokens"] == 360
    assert len(two["peak_gib_per_rank"]) == 2
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=3 * rounding + UNITS)
    assert one["entropy"] == pytest.approx(two["entropy"], rel=UNITS)


def test_shape_that_does_not_fit_is_one_message(qlrl: Callable[..., Any]) -> None:
    done = qlrl("bench", "update", "--hidden=100", "--heads=8")
    assert done.code == 2
    assert len(done.messages) == 1
    assert "heads must divide hidden" in done.messages[0]


def test_reward(qlrl: Callable[..., Any]) -> None:
    found = bench(qlrl, "reward", "--samples=64", "--latency-ms=20", "--in-flight=8", "--rounds=1")
    assert found["identical"] is True
    assert 0 < found["verdicts_per_s"] < 8 / 0.02
    assert found["rule_answers_per_s"] > 1000


def test_checkpoint(qlrl: Callable[..., Any], tmp_path: Path) -> None:
    found = bench(
        qlrl, "checkpoint", "--prompt-tokens=64", "--rounds=1", f"--folder={tmp_path}", *MODEL
    )
    # By hand: 2 layers of 12,288 + 128 + 24,576 + 2 * 64, 2 * 300 * 64 for the vocabulary, 64;
    # weights and two moments in float32.
    assert found["checkpoint_bytes"] > 12 * (2 * 37_120 + 38_400 + 64)
    assert found["snapshot_s"] > 0
    assert found["stall_ratio"] == found["stall_s"] / found["waited_s"]
    assert list(tmp_path.iterdir()) == []


def test_step(
    qlrl: Callable[..., Any], write_config: Callable[..., Path], base_model: Path, tmp_path: Path
) -> None:
    weights = load_file(base_model / "model.safetensors").values()
    sizes = ("--prompt-tokens=200", "--response-tokens=16", "--rounds=1")
    figures = bench(qlrl, "step", str(write_config(tmp_path)), *sizes)
    assert figures["sync"]["bytes"] == 4 * sum(tensor.numel() for tensor in weights)
    assert figures["sync"]["s"] > figures["sync"]["stream_s"] > 0
    # Siblings take theirs from the cache, except what is left behind the last block of 32 tokens.
    assert figures["prefill"]["tokens"] == 4 * 200 + 12 * 8
    assert figures["update"]["tokens"] == 4 * (200 + 4 * 16)
    assert 0 < figures["decode"]["tokens"] < 4 * 4 * 16
    assert not (tmp_path / "run").exists()
    refused = qlrl("bench", "step", str(tmp_path / "config.yaml"), "--prompt-tokens=5000")
    assert refused.code == 2
    assert "--prompt-tokens 5000 and --response-tokens 64 are more than" in refused.messages[0]


def test_gpu_check_runs_every_part(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_check.py", "--out", out],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert [line for line in done.stdout.splitlines() if line.endswith(": ok")] == [
        f"{name}: ok" for name in found if name not in ("machine", "command")
    ]
    assert found["sharing"]["layers"] == 4


def test_rollout(qlrl: Callable[..., Any]) -> None:
    found = bench(
        qlrl, "rollout", "examples/quickstart/config.yaml", "rollout.prompts_per_step=4",
        "rollout.group_size=2", "rollout.tokens_per_round=8", "algorithm.max_staleness=2",
        "--steps=4", "--median-tokens=6", "--rounds=1",
    )  # fmt: skip
    assert (found["engines"], set(found["sides"])) == (2, {"plain", "sorted", "partial"})
    plain, longest_first, partial = (found["sides"][s] for s in ("plain", "sorted", "partial"))
    # 16 groups of two, of 6 e^(1/2) tokens on average, cut at 32. Partial rollouts begin fewer
    # where what waits fills the last step.
    assert plain["tokens"] == longest_first["tokens"] >= partial["tokens"] > 100
    assert plain["staleness_max"] == longest_first["staleness_max"] == 0
    assert 0 < partial["staleness_max"] <= 2
    for side in found["sides"].values():
        assert 0 <= side["engine_idle_share"] < 1
        assert 0 <= side["idle_share"] < 1
    assert found["speedup"]["plain"] == 1
    assert found["speedup"]["partial"] > 0


@pytest.mark.parametrize(("layout", "engine"), [((1, 1), 1), ((2, 1), 2)])
def test_sync_reports_every_layout(
    qlrl: Callable[..., Any], layout: tuple[int, int], engine: int
) -> None:
    tp, pp = layout
    figures = bench(
        qlrl, "sync", *MODEL, f"--tp={tp}", f"--pp={pp}", f"--engine-tp={engine}", "--rounds=3"
    )
    assert figures["speedup_over_per_tensor"] > 0  # tiny shapes: a matter of luck
    assert figures["share_of_memcpy"] > 0
    assert figures["extra_buckets"] < 2
    assert figures["bytes_kept"] > 0
