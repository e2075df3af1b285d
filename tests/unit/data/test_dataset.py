import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_qlrl.data.dataset import drop_overlong, load_examples, load_prompts
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.types import Prompt

VOCAB = {"[unk]": 0, "[user]": 1, "[gen]": 2, "[end]": 3, "who": 4, "me": 5, "<think>": 6}
CHAT = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} {% endfor %}[gen]"
    "{% if enable_thinking %} <think>{% endif %}"
)


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[unk]", eos_token="[end]")
    made.chat_template = CHAT
    return made


def make_row(**changes):
    row = {
        "data_source": "toy_musique",
        "prompt": [{"role": "user", "content": "who"}],
        "reward_model": {"style": "rule", "ground_truth": "me"},
    }
    return {key: value for key, value in (row | changes).items() if value != "drop"}


def write(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_a_row_becomes_a_prompt(tmp_path, tokenizer):
    row = make_row(
        ability="docqa",
        extra_info={"split": "train", "index": 7},
        question="who is it",
        document="unread",
    )
    (prompt,) = load_prompts([write(tmp_path / "a.parquet", row)], tokenizer=tokenizer)
    assert prompt.uid == "a:0"
    assert prompt.token_ids.tolist() == [1, 4, 2]
    assert prompt.token_ids.dtype == np.int32
    assert (prompt.data_source, prompt.question, prompt.ground_truth) == (
        "toy_musique",
        "who is it",
        "me",
    )
    assert prompt.extra == {"split": "train", "index": 7}


def test_rows_of_all_files_in_order(tmp_path, tokenizer):
    files = [
        write(tmp_path / "b.parquet", make_row(), make_row()),
        str(write(tmp_path / "a.parquet", make_row())),
    ]
    prompts = load_prompts(files, tokenizer=tokenizer)
    assert [p.uid for p in prompts] == ["b:0", "b:1", "a:0"]


def test_rows_are_numbered_over_read_batches(tmp_path, tokenizer):
    rows = [make_row(question=f"q{i}") for i in range(150)]
    prompts = load_prompts([write(tmp_path / "a.parquet", *rows)], tokenizer=tokenizer)
    assert [(p.uid, p.question) for p in prompts] == [(f"a:{i}", f"q{i}") for i in range(150)]


def test_enable_thinking_reaches_the_template(tmp_path, tokenizer):
    file = write(tmp_path / "a.parquet", make_row())
    (prompt,) = load_prompts([file], tokenizer=tokenizer, enable_thinking=True)
    assert prompt.token_ids.tolist() == [1, 4, 2, 6]


@pytest.mark.parametrize(
    ("changes", "question"),
    [
        ({"question": "q", "extra_info": {"question": "e"}}, "q"),
        ({"question": None, "extra_info": {"question": "e"}}, "e"),
        ({"question": " ", "extra_info": {"question": "e"}}, "e"),
        ({"extra_info": {"question": None}}, "who"),
        ({"extra_info": None}, "who"),
    ],
)
def test_where_the_question_comes_from(tmp_path, tokenizer, changes, question):
    file = write(tmp_path / "a.parquet", make_row(**changes))
    assert load_prompts([file], tokenizer=tokenizer)[0].question == question


def test_the_last_user_message_is_the_question_uncut(tmp_path, tokenizer):
    text = "<text>\na </text> b\n</text>\nwho? Format your response"
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": text},
    ]
    file = write(tmp_path / "a.parquet", make_row(prompt=messages))
    assert load_prompts([file], tokenizer=tokenizer)[0].question == text


@pytest.mark.parametrize(("gold", "text"), [("me", "me"), (5, "5"), (-0.25, "-0.25")])
def test_numbers_are_accepted_as_gold(tmp_path, tokenizer, gold, text):
    row = make_row(reward_model={"style": "rule", "ground_truth": gold})
    file = write(tmp_path / "a.parquet", row)
    assert load_prompts([file], tokenizer=tokenizer)[0].ground_truth == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_source": ""}, "row 1: `data_source` must be a string that is not empty, found ''"),
        ({"data_source": None}, "row 1: `data_source` must be"),
        ({"prompt": None}, "row 1: `prompt` must be a non-empty list .* found None"),
        ({"prompt": []}, "row 1: `prompt` must be a non-empty list"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 1: every message"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "row 1: there is no question; fill"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "row 1: there is no question"),
        ({"prompt": [{"role": "robot", "content": "x"}], "question": "q"}, "row 1.*no robots"),
        ({"reward_model": None}, "row 1: `reward_model` must be a struct"),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "row 1: .*ground_truth` must"),
        ({"reward_model": {"style": "rule", "ground_truth": " "}}, "row 1: .*ground_truth` must"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, changes, message):
    good = make_row(question="q") if "question" in changes else make_row()
    file = write(tmp_path / "a.parquet", good, make_row(**changes))
    with pytest.raises(DataError, match=f"a.parquet, {message}"):
        load_prompts([file], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a string"}, "`prompt` must be a non-empty list .* found 'a string'"),
        ({"prompt": ["a string"]}, "every message of `prompt` needs"),
        ({"reward_model": "me"}, "`reward_model` must be a struct .* found 'me'"),
        ({"reward_model": {"style": "rule", "ground_truth": ["me"]}}, r".* found \['me'\]"),
        ({"data_source": 5}, "`data_source` must be a string that is not empty, found 5"),
        ({"extra_info": "x"}, "`extra_info` must be a struct or null, found 'x'"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(tmp_path, tokenizer, changes, message):
    file = write(tmp_path / "a.parquet", make_row(**changes))
    with pytest.raises(DataError, match=f"row 0: {message}"):
        load_prompts([file], tokenizer=tokenizer)


def test_missing_columns_are_named_with_what_was_found(tmp_path, tokenizer):
    file = write(tmp_path / "a.parquet", make_row(prompt="drop", reward_model="drop"))
    with pytest.raises(DataError, match="no column prompt, reward_model; found data_source;"):
        load_prompts([file], tokenizer=tokenizer)
    file = write(tmp_path / "b.parquet", make_row())
    with pytest.raises(DataError, match="no column response"):
        load_examples([file], tokenizer=tokenizer)


def test_unusable_files_are_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match="gone.parquet does not exist"):
        load_prompts([tmp_path / "gone.parquet"], tokenizer=tokenizer)
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match="text.parquet cannot be read as a parquet file"):
        load_prompts([tmp_path / "text.parquet"], tokenizer=tokenizer)
    torn = write(tmp_path / "torn.parquet", make_row())
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(DataError, match="torn.parquet cannot be read"):
        load_prompts([torn], tokenizer=tokenizer)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist([make_row()]).slice(0, 0), empty)
    with pytest.raises(DataError, match="empty.parquet has no rows"):
        load_prompts([empty], tokenizer=tokenizer)


def test_two_files_of_one_name_are_refused(tmp_path, tokenizer):
    (tmp_path / "x").mkdir()
    first = write(tmp_path / "a.parquet", make_row())
    second = write(tmp_path / "x" / "a.parquet", make_row())
    with pytest.raises(DataError, match="x/a.parquet and .*a.parquet have the same name"):
        load_prompts([first, second], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("response", "ids"), [("me me", [5, 5, 3]), ("me [end]", [5, 3]), ("me [end]\n", [5, 3])]
)
def test_examples_end_with_the_end_token_once(tmp_path, tokenizer, response, ids):
    file = write(tmp_path / "a.parquet", make_row(response=response))
    (example,) = load_examples([file], tokenizer=tokenizer)
    assert example.response_ids.tolist() == ids
    assert example.response_ids.dtype == np.int32
    assert example.prompt.token_ids.tolist() == [1, 4, 2]


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_a_control_token_that_cannot_be_plain_text_is_refused(tmp_path, tokenizer, field):
    text = "me [end] me"
    value = [{"role": "user", "content": text}] if field == "prompt" else text
    file = write(tmp_path / "a.parquet", make_row(**({"response": "me"} | {field: value})))
    with pytest.raises(DataError, match=r"row 0: a text holds '\[end\]', which this tokenizer"):
        load_examples([file], tokenizer=tokenizer)


@pytest.mark.parametrize("column", ["data_source", "response"])
def test_a_text_that_is_no_utf8_is_refused(tmp_path, tokenizer, column):
    table = pa.Table.from_pylist([make_row(response="me")])
    bad = pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False)
    table = table.set_column(table.schema.names.index(column), column, bad)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as a parquet file: .*UTF8"):
        load_examples([tmp_path / "a.parquet"], tokenizer=tokenizer)


def test_reasoning_opened_twice_is_refused(tmp_path, tokenizer):
    file = write(tmp_path / "a.parquet", make_row(response="<think> me"))
    assert load_examples([file], tokenizer=tokenizer)[0].response_ids.tolist() == [6, 5, 3]
    with pytest.raises(DataError, match="row 0: `response` starts with <think>"):
        load_examples([file], tokenizer=tokenizer, enable_thinking=True)


def test_an_empty_response_and_a_missing_end_token_are_errors(tmp_path, tokenizer):
    file = write(tmp_path / "a.parquet", make_row(response=""))
    with pytest.raises(DataError, match="row 0: `response` must be a string"):
        load_examples([file], tokenizer=tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        load_examples([file], tokenizer=tokenizer)


def test_overlong_prompts_are_reported_together():
    prompts = [
        Prompt(f"a:{i}", np.zeros(n, np.int32), "s", "q", "g")
        for i, n in enumerate([60, 61, 10, 90, 70, 80])
    ]
    prompts.append(Prompt("b:0", np.zeros(65, np.int32), "s", "q", "g"))
    assert drop_overlong(prompts, 90) == (prompts, "")
    kept, report = drop_overlong(prompts, 60)
    assert [p.uid for p in kept] == ["a:0", "a:2"]
    assert report == (
        "5 of 7 prompts are longer than every phase allows (60 tokens) and are left out "
        "(a: 4, b: 1); the longest: a:3 with 90 tokens"
    )


def test_nothing_left_is_an_error():
    prompts = [Prompt("a:0", np.zeros(61, np.int32), "s", "q", "g")]
    with pytest.raises(DataError, match="1 of 1 prompts.*Nothing is left: raise max_input_tokens"):
        drop_overlong(prompts, 60)


def test_the_end_of_the_last_user_message_is_kept(tmp_path, tokenizer):
    chat = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "x" * 500 + "who"},
    ]
    file = write(tmp_path / "a.parquet", make_row(prompt=chat), make_row())
    long, short = load_prompts([file], tokenizer=tokenizer)
    assert long.end == "x" * 397 + "who"
    assert short.end == "who"
