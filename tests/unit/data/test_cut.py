"""What is left of prompts that are too long, worked out by hand with one word as one token."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_qlrl.data.cut import Limits, cut_and_render, cut_messages, middle_truncate
from megatron_qlrl.data.dataset import load_prompts
from megatron_qlrl.errors import DataError

WORDS = [str(n) for n in range(40)]
VOCAB = {w: i for i, w in enumerate(["[unk]", "[begin]", "[end]", "[user]", "[gen]", *WORDS])}
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}[gen]"


@pytest.fixture
def tokenizer() -> Any:
    """Puts [begin] before a text, as R1-Distill's does."""
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[begin] $A", special_tokens=[("[begin]", VOCAB["[begin]"])]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[unk]", bos_token="[begin]", eos_token="[end]"
    )
    made.chat_template = CHAT
    return made


def words(start: int, end: int) -> str:
    return " ".join(WORDS[start:end])


def chat(*texts: str, roles: str = "uauauau") -> list[dict[str, str]]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": names[r], "content": t} for r, t in zip(roles, texts, strict=False)]


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(6, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (4, [0, 1, 3, 4]), (3, [0, 3, 4]), (1, [4])],
)
def test_middle_truncation_keeps_head_and_tail(max_tokens: int, expected: list[int]) -> None:
    assert list(middle_truncate(range(5), max_tokens)) == expected


def test_a_message_keeps_its_first_and_last_half(tokenizer: Any) -> None:
    # [begin] and ten words are 11 tokens; of 6 the first three are [begin] 0 1.
    (kept,) = cut_messages(tokenizer, chat(words(0, 10)), 6)
    assert kept == {"role": "user", "content": "0 1 7 8 9"}
    assert cut_messages(tokenizer, chat(words(0, 10)), 11) == chat(words(0, 10))


def test_what_is_not_cut_keeps_every_character(tokenizer: Any) -> None:
    messages = chat("0  1\n2 [end] other")
    assert cut_messages(tokenizer, messages, 6) == messages


def test_control_tokens_of_the_text_are_decoded_away_as_in_the_release(tokenizer: Any) -> None:
    (kept,) = cut_messages(tokenizer, chat("0 [end] 1 2 3 4"), 6)
    assert kept["content"] == "0 2 3 4"  # [begin] 0 [end] | 2 3 4


def test_a_system_message_stays_whole(tokenizer: Any) -> None:
    messages = chat(words(20, 30), words(0, 10), roles="su")
    assert cut_messages(tokenizer, messages, 4) == chat(words(20, 30), "0 8 9", roles="su")


def test_the_last_message_of_a_conversation_stays_whole(tokenizer: Any) -> None:
    # The last message has 1 + 3 tokens, so 6 are left of the 12 before: 0 1 2 and 9 10 11.
    messages = chat(words(0, 4), words(4, 8), words(8, 12), words(20, 23), roles="uaau")
    kept = cut_messages(tokenizer, messages, 10)
    assert kept == chat("0 1 2", "9 10 11", words(20, 23), roles="uau")
    assert cut_messages(tokenizer, messages, 16) == messages
    # Of 9, the first four are message 0, and the second one goes up to the gap.
    kept = cut_messages(tokenizer, messages, 13)
    assert kept == chat(words(0, 4), "7", words(8, 12), words(20, 23), roles="uaau")


def test_messages_of_one_role_that_meet_are_joined(tokenizer: Any) -> None:
    messages = chat("0 1", "2 3", "4 5", "6 7", "8 9")
    kept = cut_messages(tokenizer, messages, 3 + 4)
    assert kept == chat("0 1", "6 7", "8 9")
    kept = cut_messages(tokenizer, messages, 3 + 6)  # 0 1 2 | 5 6 7
    assert kept == chat("0 1", "2", "5", "6 7", "8 9")
    kept = cut_messages(tokenizer, messages, 3 + 5)  # 0 1 | 5 6 7
    assert kept == chat("0 15", "6 7", "8 9")


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_roles_still_alternate(tokenizer: Any, max_tokens: int) -> None:
    kept = cut_messages(
        tokenizer, chat("0 1 2", "3", "4 5", "6 7 8", "9", "10 11", "12"), max_tokens
    )
    assert all(one["role"] != next_["role"] for one, next_ in pairwise(kept))
    assert kept[-1]["content"] == "12"


def test_a_last_message_that_is_too_long_itself_is_cut_alone(tokenizer: Any) -> None:
    messages = chat("30 31", "32", words(0, 10))
    assert cut_messages(tokenizer, messages, 11) == chat(words(0, 10))
    assert cut_messages(tokenizer, messages, 6) == chat("0 1 7 8 9")


def test_a_prompt_that_the_template_makes_too_long_is_cut_again(tokenizer: Any) -> None:
    # [user], [end] and [gen] are added: 13 tokens where 10 fit. 10 text tokens with [begin] give
    # 9 + 3, 8 give 7 + 3.
    kept, ids = cut_and_render(tokenizer, chat(words(0, 10)), None, Limits(20, 10))
    assert kept[0]["content"] == "0 1 2 6 7 8 9"
    assert ids.tolist() == [VOCAB[w] for w in ["[user]", *kept[0]["content"].split()]] + [2, 4]
    assert ids.dtype == np.int32
    whole, ids = cut_and_render(tokenizer, chat(words(0, 10)), None, Limits(11, 13))
    assert (whole, len(ids)) == (chat(words(0, 10)), 13)


def test_what_is_never_cut_must_fit(tokenizer: Any) -> None:
    messages = chat(words(0, 10), words(0, 10), roles="su")
    with pytest.raises(DataError, match="the system message alone have more than the 12 tokens"):
        cut_and_render(tokenizer, messages, None, Limits(20, 12))


def test_prompts_of_a_file_say_whether_they_were_cut(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "musique",
            "prompt": chat(text),
            "reward_model": {"style": "rule", "ground_truth": "0"},
        }
        for text in (words(0, 10), words(0, 3))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    prompts = load_prompts([tmp_path / "a.parquet"], tokenizer=tokenizer, limits=Limits(6))
    assert [p.cut for p in prompts] == [True, False]
    assert [p.num_tokens for p in prompts] == [5 + 3, 3 + 3]
    assert prompts[0].question == words(0, 10)
    assert not load_prompts([tmp_path / "a.parquet"], tokenizer=tokenizer)[0].cut
