"""One right and one wrong answer through the chat templates of the model families: parquet row ->
rendered prompt -> score. The templates are the families' generation prompts, written out here."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_qlrl.data.dataset import load_prompts
from megatron_qlrl.reward.score import score_response

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
R1 = "{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜><think>\n"
QWEN3 = (
    CHATML + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
PLAIN = "The text on tar says so. Therefore, the answer is ({}).{}"
AFTER_OPEN = "The text on tar says so.\n</think>\n\nTherefore, the answer is ({}).{}"
WITH_TAGS = "<think>\nThe text says so.\n</think>\n\nTherefore, the answer is ({}).{}"

# name: (template, enable_thinking, the prompt ends in an open <think>, how the model answers)
FAMILIES = {
    "R1-Distill": (R1, None, True, AFTER_OPEN),
    "Qwen2.5-Instruct": (CHATML + "<|im_start|>assistant\n", None, False, PLAIN),
    "Qwen3, thinking on": (QWEN3, True, False, WITH_TAGS),
    "Qwen3, thinking off": (QWEN3, False, False, PLAIN),
    "Llama 3": (LLAMA3, None, False, PLAIN),
    "ChatML, SmolLM2": (CHATML + "<|im_start|>assistant\n", None, False, PLAIN),
}


def tokenizer(template: str, *, think_is_a_token: bool) -> PreTrainedTokenizerFast:
    """Byte level without merges; `<think>` as one added token (R1, Qwen3) or as plain bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if think_is_a_token:
        inner.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


@pytest.mark.parametrize("think_is_a_token", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_the_same_right_answer_1_and_the_wrong_one_0(
    tmp_path: Path, family: str, think_is_a_token: bool
) -> None:
    template, enable_thinking, opens, response = FAMILIES[family]
    row = {
        "data_source": "debian_musique",
        "prompt": [{"role": "user", "content": "Which section has tar?"}],
        "reward_model": {"style": "rule", "ground_truth": "utils"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (prompt,) = load_prompts(
        [tmp_path / "rows.parquet"],
        tokenizer=tokenizer(template, think_is_a_token=think_is_a_token),
        enable_thinking=enable_thinking,
    )
    assert prompt.reasoning_open is opens

    def rule(text: str) -> float:
        return score_response(
            data_source=prompt.data_source,
            ground_truth=prompt.ground_truth,
            response_text=text,
            reasoning_open=prompt.reasoning_open,
        ).rule

    assert rule(response.format("utils", "")) == 1.0
    assert rule(response.format("misc", "")) == 0.0
    # A right answer inside reasoning that goes on does not count in any family.
    assert rule(response.format("utils", " <think> But wait")) == 0.0
    if opens:
        assert rule(PLAIN.format("utils", "")) == 0.0
