"""Real texts that nobody wrote for us: the licences every Debian system carries, joined to
documents of about 2K, 8K and 30K tokens, through `qlrl data docs` and two phases of RL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity import Reference, transformers_model

LICENCES = Path("/usr/share/common-licenses")
# Characters of each document; the toy tokenizer needs about 0.57 tokens for one.
DOCUMENTS = {
    "short.txt": (["BSD", "Artistic"], 4_000),
    "middle.txt": (["GPL-1", "Apache-2.0"], 14_000),
    "long.txt": (["GPL-3", "LGPL-2.1"], 53_000),
}
QUESTIONS = [
    ("short.txt", "qa", "Which university's Regents hold the copyright?", "California"),
    ("short.txt", "choice", "May the name of the University be used to endorse products without "
     "permission? (A) Yes (B) No", "B"),
    ("middle.txt", "qa", "Which foundation published the GNU General Public License?",
     "Free Software Foundation"),
    ("middle.txt", "math", "Which version of the GNU General Public License is this?", "1"),
    ("middle.txt", "choice", "Does the program come with a warranty? (A) Yes (B) No", "B"),
    ("long.txt", "qa", "What is the propagation of a work that lets others make or receive copies "
     "called?", "convey"),
    ("long.txt", "math", "How many days after receipt of the first notice may a violation be cured "
     "to reinstate the license?", "30"),
    ("long.txt", "choice", "With which products must Installation Information be conveyed? (A) "
     "User Products (B) steam engines", "A"),
]  # fmt: skip
LIMITS = (10_000, 34_000)
RESPONSE_TOKENS = 8

pytestmark = pytest.mark.skipif(
    not (LICENCES / "GPL-3").is_file(), reason=f"{LICENCES} is not on this system"
)


@pytest.fixture(scope="module")
def parquet(qlrl: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for name, (parts, characters) in DOCUMENTS.items():
        text = "\n\n".join((LICENCES / p).read_text(encoding="utf-8") for p in parts)
        (folder / name).write_text(text[:characters], encoding="utf-8")
    lines = [
        json.dumps({"document": document, "kind": kind, "question": question, "answer": answer})
        for document, kind, question, answer in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = folder / "licences.parquet"
    done = qlrl("data", "docs", folder, folder / "questions.jsonl", out).check()
    assert "8 rows" in done.out
    return out


@pytest.fixture(scope="module")
def model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 40,960 positions with the toy tokenizer (byte-level: it encodes all)."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=40_960,
        initializer_range=0.1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(qlrl: Any, write_config: Any, parquet: Path, model: Path, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("real")
    config = write_config(
        folder,
        model={"path": str(model)},
        data={"train_files": [str(parquet)], "eval_files": []},
        phases=[
            {"name": "short", "max_input_tokens": LIMITS[0], "steps": 2},
            {"name": "long", "max_input_tokens": LIMITS[1], "steps": 1},
        ],
        rollout={
            "prompts_per_step": 2,
            "group_size": 2,
            "max_response_tokens": RESPONSE_TOKENS,
        },
        policy={"max_tokens_per_row": 36_000},
        algorithm={"rollout_is_threshold": 2.0},
    )
    done = qlrl("rl", config).check()
    (folder / "out.txt").write_text(done.out)
    return folder / "run"


def test_a_model_that_answers_nothing_is_named_in_the_first_step(run: Path) -> None:
    (warning,) = (
        line
        for line in (run.parent / "out.txt").read_text().splitlines()
        if "responses" in line and "almost nothing to learn" in line
    )
    assert warning.startswith("qlrl: warning: step 0: 4 of 4 responses")


def test_check_answers_and_scores_real_prompts_and_leaves_the_run_alone(
    run: Path, qlrl: Any
) -> None:
    before = sorted(run.rglob("*"))
    done = qlrl("check", run.parent / "config.yaml", "--sample", 2).check()
    assert sorted(run.rglob("*")) == before
    assert "answering 2 prompts" in done.err
    assert "[1/2] licences:" in done.out and "[2/2] licences:" in done.out
    assert "<|im_end|>\\n<|im_start|>assistant\\n<think>\\n'" in done.out
    assert done.out.count("score:    0") == 2
    assert "warning: 2 of 2 responses" in done.out


def test_prompts_of_each_phase_have_its_lengths(run: Path, read_jsonl: Any) -> None:
    *short, long = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in (*short, long)] == [0, 1, 2]
    for line in short:
        assert 1_500 < line["prompt_length/mean"] <= line["prompt_length/max"] <= LIMITS[0]
        assert line["curriculum/pool_prompts"] == 5
    assert 25_000 < long["prompt_length/mean"] <= long["prompt_length/max"] <= LIMITS[1]
    assert long["curriculum/pool_prompts"] == 3


def test_updates_happen_on_real_gradients(run: Path, model: Path, read_jsonl: Any) -> None:
    for line in read_jsonl(run / "metrics.jsonl"):
        assert line["actor/grad_norm"] is not None and line["actor/grad_norm"] > 0
        assert line["batch/kept_groups"] == 2
    start, end = (load_file(f / "model.safetensors") for f in (model, run / "hf"))
    assert start.keys() == end.keys()
    for name, tensor in end.items():
        assert torch.isfinite(tensor).all(), name
    assert not torch.equal(start["lm_head.weight"], end["lm_head.weight"])


@pytest.fixture(scope="module")
def bounds(parquet: Path, model: Path) -> Reference:
    """Of the log-probs of a document's last tokens; of the middle one: float64 takes a minute for
    the longest."""
    from transformers import AutoTokenizer

    text = (parquet.parent / "middle.txt").read_text(encoding="utf-8")
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text)["input_ids"]])
    logprobs = []
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            logits = transformers_model(model, dtype)(ids, logits_to_keep=257).logits[0, :-1]
        logprobs.append(logits.log_softmax(-1).gather(1, ids[0, -256:, None]))
    return Reference.of(*logprobs)


def test_trainer_and_engine_agree_at_every_length(
    run: Path, bounds: Reference, read_jsonl: Any
) -> None:
    """Each may be as far from the exact values as the bounds allow."""
    for line in read_jsonl(run / "metrics.jsonl"):
        assert line["training/rollout_logprobs_diff_mean"] <= 2 * bounds.rms_error
        assert line["training/rollout_logprobs_diff_max"] <= 2 * bounds.max_error
        assert line["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=3 * bounds.rms_error)
        assert line["rollout_corr/rollout_is_ratio_fraction_high"] == 0


def test_rollouts_are_logged_with_their_questions(run: Path, read_jsonl: Any) -> None:
    asked = {question: (document, answer) for document, _, question, answer in QUESTIONS}
    phase1 = {"short.txt", "middle.txt"}
    seen = set()
    for step, documents in enumerate([phase1, phase1, {"long.txt"}]):
        records = read_jsonl(run / "rollouts" / f"step_{step:06d}.jsonl")
        assert [r["sample"] for r in records] == [0, 1, 0, 1]
        for record in records:
            document, answer = asked[record["question"]]
            assert document in documents
            seen.add(document)
            assert record["ground_truth"] == answer
            assert record["weight_version"] == step
            assert 1 <= record["num_tokens"] <= RESPONSE_TOKENS
    assert seen == set(DOCUMENTS)


def test_checkpoint_and_model_folder_at_the_end(run: Path) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    assert (newest.name, state["step"], state["version"]) == ("step_00000003", 3, 3)
    config = json.loads((run / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 40_960
    assert (run / "hf" / "tokenizer.json").is_file()
