"""The comparison of the server with transformers, on numbers made by hand and on a tiny model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_qlrl.errors import ReleaseError
from megatron_qlrl.release.answers import (
    Answer,
    Scored,
    ask,
    compare_choices,
    compare_logprobs,
    fixed_prompts,
    score,
)

PROMPT, TOKENS = [5, 6, 7], [8, 9]
EXACT = [-1.0, -2.0, -0.5, -0.25]


def scored(logprobs: list[float], best: list[float] | None = None) -> Scored:
    return Scored(np.array(logprobs), np.array(best or logprobs))


def off(by: float) -> list[float]:
    return [value + by for value in EXACT]


def answer(by: float = 0.0) -> Answer:
    return Answer(PROMPT, TOKENS, off(by))


def test_as_near_as_the_peer_passes() -> None:
    # the peer is 0.01 off everywhere: 0.03 at most, and 0.02 in the root mean square
    peer = scored(off(0.01))
    text = compare_logprobs([answer(0.0199)], scored(EXACT), peer)
    assert text.startswith("largest difference 0.02 (at most 0.03), root mean square 0.02 (at most")
    assert text.endswith("in nats over 4 tokens")
    with pytest.raises(ReleaseError, match="vLLM and transformers disagree about this folder"):
        compare_logprobs([answer(0.021)], scored(EXACT), peer)
    one_wrong = Answer(PROMPT, TOKENS, [-1.0, -2.0, -0.5, -0.285])
    with pytest.raises(ReleaseError, match=r"largest difference 0\.035 \(at most 0\.03\)"):
        compare_logprobs([one_wrong], scored(EXACT), peer)


def test_nan_is_no_agreement() -> None:
    with pytest.raises(ReleaseError, match="disagree"):
        compare_logprobs([answer(float("nan"))], scored(EXACT), scored(off(0.01)))


def test_an_exact_peer_leaves_room_for_rounding() -> None:
    assert compare_logprobs([answer(1e-7)], scored(EXACT), scored(EXACT))
    with pytest.raises(ReleaseError):
        compare_logprobs([answer(1e-5)], scored(EXACT), scored(EXACT))


def test_ties_are_told_and_pass() -> None:
    peer = scored(off(0.01))
    assert compare_choices([answer()], scored(EXACT), peer) == (
        "2 tokens of 1 answers are transformers' own choice"
    )
    # the last token is 0.05 nats behind the best: a tie, for both sides may be wrong by 0.03
    text = compare_choices([answer()], scored(EXACT, [-1.0, -2.0, -0.5, -0.2]), peer)
    assert text.endswith(
        "but for 1 tie(s); first: prompt 1, token 2 of the answer: vLLM's choice is 0.05 nats less "
        "likely than transformers'"
    )


def test_another_choice_than_the_likeliest_fails() -> None:
    exact = scored(EXACT + EXACT, [0.0, 0.0, -0.5, -0.25, 0.0, 0.0, -0.1, -0.25])
    with pytest.raises(
        ReleaseError,
        match=r"differ at prompt 2, token 1 of the answer: .* is 0\.4 nats less .*0\.06 would be a",
    ):
        compare_choices([answer(), answer()], exact, scored(off(0.01) * 2))


REPLY = {
    "choices": [
        {
            "token_ids": TOKENS,
            "logprobs": {"token_logprobs": [-0.5, -0.25]},
            "prompt_logprobs": [
                None,
                {"6": {"logprob": -1.0}, "3": {"logprob": -0.1}},
                {"7": {"logprob": -2.0}},
            ],
        }
    ]
}


def test_a_reply_is_read() -> None:
    asked: list[Mapping[str, Any]] = []

    def complete(body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append(body)
        return REPLY

    assert list(ask(complete, "m", [PROMPT])) == [answer()]
    assert asked[0]["prompt"] == PROMPT and asked[0]["temperature"] == 0


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"choices": []},
        {"choices": [REPLY["choices"][0] | {"prompt_logprobs": None}]},
        {"choices": [REPLY["choices"][0] | {"token_ids": [8]}]},
        {"choices": [REPLY["choices"][0] | {"prompt_logprobs": [None, {"6": {"logprob": -1.0}}]}]},
    ],
)
def test_a_reply_without_log_probs_is_named(reply: Mapping[str, Any]) -> None:
    with pytest.raises(ReleaseError, match="vLLM's server sent no log-probs"):
        list(ask(lambda body: reply, "m", [PROMPT]))


class Letters:
    """A tokenizer of one token for each character."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in messages[0]["content"]]}


def test_prompts_are_fixed_and_fit() -> None:
    prompts = fixed_prompts(Letters(), 4096)
    assert len(prompts) == 4 and 1400 < len(prompts[3]) <= 1500
    assert prompts == fixed_prompts(Letters(), 4096)
    assert [len(p) for p in fixed_prompts(Letters(), 80)] == [len(prompts[0])]
    with pytest.raises(ReleaseError, match="no test prompt fits into 40 positions"):
        fixed_prompts(Letters(), 40)


def test_transformers_scores_what_it_computes(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    answers = [Answer([1, 2, 3], [4], []), Answer([5, 6], [], [])]
    result = score(tmp_path, torch.float64, answers)
    with torch.no_grad():
        logits = model.double()(torch.tensor([[1, 2, 3, 4]])).logits[0]
    want = logits.log_softmax(-1)
    assert result.logprobs.shape == result.best.shape == (4,)
    np.testing.assert_allclose(result.logprobs[:3], [want[0, 2], want[1, 3], want[2, 4]], rtol=1e-6)
    np.testing.assert_allclose(result.best[2], want[2].max(), rtol=1e-6)


def test_a_folder_that_transformers_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="transformers cannot load"):
        score(tmp_path, torch.float32, [answer()])
