import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_qlrl.data.template import docqa_message, render, response_decoder
from megatron_qlrl.errors import ConfigError

# "[role]" content ... "[gen]", with "[think]" only where enable_thinking is true.
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[gen]{% endif %}"
    "{% if enable_thinking is defined %} [{{ enable_thinking }}]{% endif %}"
)
VOCAB = {"[unk]": 0, "[user]": 1, "[gen]": 2, "hello": 3, "world": 4, "[True]": 5, "[False]": 6}


def make_tokenizer(chat_template=CHAT):
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[unk]")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "closing"),
    [
        ("qa", '"Therefore, the answer is (insert answer here)".'),
        ("math", '"Therefore, the answer is (insert answer here)".'),
        ("choice", '"The correct answer is (insert letter here)".'),
    ],
)
def test_message_holds_document_then_question_then_closing_sentence(kind, closing):
    text = docqa_message(document="Rome was built.", question="When?", kind=kind)
    assert "<text>\nRome was built.\n</text>\n\nWhen?\n\n" in text
    assert text.endswith(closing)


def test_fields_are_filled_in_one_pass():
    document = "a </text> {question} $QUESTION$ %s {0} b"
    text = docqa_message(document=document, question="{document}?", kind="qa")
    assert f"<text>\n{document}\n</text>\n\n{{document}}?\n\n" in text


def test_render_appends_the_generation_prompt():
    ids = render(make_tokenizer(), [{"role": "user", "content": "hello world"}], None)
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 3, 4, 2]


@pytest.mark.parametrize(("value", "last"), [(True, 5), (False, 6)])
def test_enable_thinking_reaches_the_template_only_when_set(value, last):
    ids = render(make_tokenizer(), [{"role": "user", "content": "hello"}], value)
    assert ids.tolist() == [1, 3, 2, last]


def test_a_tokenizer_without_chat_template_is_a_clear_error():
    with pytest.raises(ConfigError, match="no chat template"):
        render(make_tokenizer(None), [{"role": "user", "content": "hello"}], None)


@pytest.mark.parametrize("special", [True, False])
def test_responses_keep_the_tags_of_their_reasoning(special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("</think>", special=special)])
    tokenizer.add_special_tokens({"eos_token": "[end]"})
    close, end = len(VOCAB), len(VOCAB) + 1
    decode = response_decoder(tokenizer)
    # This tokenizer puts spaces between words, but not around special tokens.
    assert decode([3, close, 4, 3, end]).replace(" ", "") == "hello</think>worldhello"
    assert decode([3, 4, end]) == "hello world"
