"""Reads verl's parquet files into `Prompt` and `Example`.

Columns of a file: `data_source` (string), `prompt` (chat: list of {role, content}),
`reward_model` ({style, ground_truth}), optionally `extra_info` (struct), `question` (string)
and, for SFT, `response` (string). Other columns are not read.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from megatron_qlrl.data.control import encode_plain
from megatron_qlrl.data.cut import Limits, cut_and_render
from megatron_qlrl.data.template import opens_reasoning, render
from megatron_qlrl.errors import ConfigError, DataError
from megatron_qlrl.types import Example, Prompt

_REQUIRED = ("data_source", "prompt", "reward_model")
_OPTIONAL = ("extra_info", "question")
_BATCH_ROWS = 64
_END_CHARS = 400


@dataclass(frozen=True)
class TextRow:
    """One row as text. `response` is None in a file without that column."""

    uid: str
    data_source: str
    messages: list[dict[str, str]]
    document: str
    question: str
    ground_truth: str
    response: str | None


def verl_schema(extra_info: Mapping[str, pa.DataType], *, has_response: bool) -> pa.Schema:
    """Returns the columns of the files that the builders write, with these fields of
    `extra_info`."""
    text = pa.string()
    columns = {
        "data_source": text,
        "prompt": pa.list_(pa.struct({"role": text, "content": text})),
        "ability": text,
        "reward_model": pa.struct({"style": text, "ground_truth": text}),
        "extra_info": pa.struct(extra_info),
        "document": text,
        "question": text,
    }
    return pa.schema(columns | ({"response": text} if has_response else {}))


def load_prompts(
    files: Sequence[str | Path],
    *,
    tokenizer: Any,
    enable_thinking: bool | None = None,
    limits: Limits | None = None,
) -> list[Prompt]:
    """Returns all rows of the files, in order, as tokenized prompts.

    The question is `question`, or else `extra_info.question`, or else the whole last user message.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        enable_thinking: passed to the chat template unless it is None.
        limits: longer prompts lose their middle; None cuts none.

    Raises:
        DataError: a file, a column or a row cannot be used. The message names the file and the row.
        ConfigError: the tokenizer has no chat template.
    """
    rows = _rows(files, _REQUIRED)
    return [
        _prompt(where, uid, row, tokenizer, enable_thinking, limits) for where, uid, row in rows
    ]


def load_examples(
    files: Sequence[str | Path], *, tokenizer: Any, enable_thinking: bool | None = None
) -> list[Example]:
    """Returns rows as `load_prompts` does, with the `response` column tokenized and the end token
    appended.

    `response` is what follows the generation prompt: if the chat template opens `<think>` itself,
    it starts inside the reasoning.

    Raises:
        DataError, ConfigError: as `load_prompts`.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end token; set eos_token in its "
            "tokenizer_config.json"
        )
    examples = []
    for where, uid, row in _rows(files, (*_REQUIRED, "response")):
        prompt = _prompt(where, uid, row, tokenizer, enable_thinking)
        response = _text(where, "response", row["response"])
        if response.lstrip().startswith("<think>") and prompt.reasoning_open:
            raise DataError(
                f"{where}: `response` starts with <think>, and the chat template opens <think> "
                "already; take it off the response"
            )
        with _located(where):
            ids = response_ids(tokenizer, response)
        examples.append(Example(prompt, ids))
    return examples


def response_ids(tokenizer: Any, response: str) -> np.ndarray:
    """Returns the token ids (int32 [R]) of a response, ending with exactly one end token. Other
    control tokens in the response are plain text.

    Raises:
        DataError: the tokenizer cannot write one of them as plain text.
    """
    whole = response.rstrip()
    if whole.endswith(tokenizer.eos_token):
        response = whole.removesuffix(tokenizer.eos_token)
    ids = [*encode_plain(tokenizer, response), tokenizer.eos_token_id]
    return np.asarray(ids, dtype=np.int32)


def load_rows(files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Returns the rows of `load_prompts`, in the same order, as they are in the files.

    Raises:
        DataError: a file or column cannot be used.
    """
    return [row for _, _, row in _rows(files, _REQUIRED)]


def iter_texts(files: Sequence[str | Path]) -> Iterator[TextRow]:
    """Yields all rows of the files as text, a few of them in memory at a time.

    Without a column `document` the document is what stands between the first `<text>` and the last
    `</text>` of the last user message, or the whole message if it has no such tags; without a
    question of its own the question is what follows these tags.

    Raises:
        DataError: a file, a column or a row cannot be used. The message names the file and the row.
    """
    optional = (*_OPTIONAL, "document", "response")
    for where, uid, row in _rows(files, _REQUIRED, optional):
        messages = _messages(where, row["prompt"])
        asked = [message["content"] for message in messages if message["role"] == "user"]
        document, question = _parted(asked[-1] if asked else "")
        extra = row.get("extra_info")
        own = (row.get("question"), extra.get("question") if isinstance(extra, Mapping) else None)
        response = row.get("response")
        yield TextRow(
            uid=uid,
            data_source=_text(where, "data_source", row["data_source"]),
            messages=messages,
            document=row["document"] if isinstance(row.get("document"), str) else document,
            question=next((q for q in own if isinstance(q, str) and q.strip()), question),
            ground_truth=_ground_truth(where, row["reward_model"]),
            response=None if response is None else _text(where, "response", response),
        )


def _parted(message: str) -> tuple[str, str]:
    """Returns the document and the question of a message."""
    start, end = message.find("<text>"), message.rfind("</text>")
    if not 0 <= start < end:
        return message, message
    return message[start + len("<text>") : end].strip(), message[end + len("</text>") :].strip()


def drop_overlong(prompts: Sequence[Prompt], max_tokens: int) -> tuple[list[Prompt], str]:
    """Returns the prompts of at most `max_tokens`, and one line that counts the others by file, or
    "" if there are none. No prompt is cut.

    Raises:
        DataError: no prompt is left.
    """
    kept = [prompt for prompt in prompts if prompt.num_tokens <= max_tokens]
    over = [prompt for prompt in prompts if prompt.num_tokens > max_tokens]
    if not over:
        return kept, ""
    longest = max(over, key=lambda prompt: prompt.num_tokens)
    counts = Counter(prompt.uid.rpartition(":")[0] for prompt in over)
    by_file = ", ".join(f"{file}: {count}" for file, count in counts.items())
    report = (
        f"{len(over)} of {len(prompts)} prompts are longer than every phase allows ({max_tokens} "
        f"tokens) and are left out ({by_file}); the longest: {longest.uid} with "
        f"{longest.num_tokens} tokens"
    )
    if not kept:
        raise DataError(
            f"{report}. Nothing is left: raise max_input_tokens of the last phase, or take other "
            "data.train_files"
        )
    return kept, report


def _rows(
    files: Sequence[str | Path],
    required: Sequence[str],
    optional: Sequence[str] = _OPTIONAL,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (where to look, uid, row) over all files."""
    by_stem: dict[str, Path] = {}
    for path in map(Path, files):
        if path.stem in by_stem:
            raise DataError(
                f"{path} and {by_stem[path.stem]} have the same name: rows are identified by file "
                "name and number, so list a file once and rename one of two different files"
            )
        by_stem[path.stem] = path
    for stem, path in by_stem.items():
        for index, row in enumerate(_read(path, required, optional)):
            yield f"{path}, row {index}", f"{stem}:{index}", row


def check_file(path: Path, *, has_response: bool) -> None:
    """Checks that a data file has rows and the columns that it needs, without reading its rows.

    Raises:
        DataError: it lacks rows or a column, or is no parquet file.
    """
    with _opened(path, (*_REQUIRED, "response") if has_response else _REQUIRED):
        pass


def _read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _opened(path, required) as file:
        names = file.schema_arrow.names
        columns = [*required, *(name for name in optional if name in names)]
        # One group at a time: pyarrow keeps the bytes of all the groups that one call reads.
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                batch.validate(full=True)  # a text that is no UTF-8 is refused here
                yield from batch.to_pylist()


@contextmanager
def _opened(path: Path, required: Sequence[str]) -> Iterator[pq.ParquetFile]:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; pass the path of a parquet file")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in required if name not in names]
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}; found {', '.join(names)}; needed "
                    f"are {', '.join(required)} (verl's format)"
                )
            if not file.metadata.num_rows:
                raise DataError(f"{path} has no rows")
            yield file
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as a parquet file: {error}") from error


def _prompt(
    where: str,
    uid: str,
    row: dict[str, Any],
    tokenizer: Any,
    enable_thinking: bool | None,
    limits: Limits | None = None,
) -> Prompt:
    messages = _messages(where, row["prompt"])
    extra = row.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise DataError(f"{where}: `extra_info` must be a struct or null, found {_shown(extra)}")
    question = _question(where, row, extra, messages)
    data_source = _text(where, "data_source", row["data_source"])
    ground_truth = _ground_truth(where, row["reward_model"])
    kept = messages
    with _located(where):
        if limits is None:
            token_ids = render(tokenizer, messages, enable_thinking)
        else:
            kept, token_ids = cut_and_render(tokenizer, messages, enable_thinking, limits)
    return Prompt(
        uid,
        token_ids,
        data_source,
        question,
        ground_truth,
        dict(extra),
        reasoning_open=opens_reasoning(tokenizer, token_ids),
        cut=kept != messages,
        end=next((m["content"][-_END_CHARS:] for m in kept[::-1] if m["role"] == "user"), ""),
    )


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses `prompt`: {error}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _messages(where: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: `prompt` must be a non-empty list of {{role, content}}, found "
            f"{_shown(value)}"
        )
    for message in value:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{where}: every message of `prompt` needs the strings role and content, found "
                f"{_shown(message)}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _question(
    where: str, row: Mapping[str, Any], extra: Mapping[str, Any], messages: list[dict[str, str]]
) -> str:
    asked = [message["content"] for message in messages if message["role"] == "user"]
    candidates = (row.get("question"), extra.get("question"), asked[-1] if asked else None)
    for candidate in candidates:
        if isinstance(candidate, str) and candidate.strip():
            return candidate
    raise DataError(
        f"{where}: there is no question; fill the column `question`, or extra_info.question, or "
        "end `prompt` with a user message that is not empty"
    )


def _ground_truth(where: str, reward_model: Any) -> str:
    if not isinstance(reward_model, Mapping):
        raise DataError(
            f"{where}: `reward_model` must be a struct {{style, ground_truth}}, found "
            f"{_shown(reward_model)}"
        )
    value = reward_model.get("ground_truth")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return _text(where, "reward_model.ground_truth", value)


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: `{name}` must be a string that is not empty, found {_shown(value)}"
        )
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
