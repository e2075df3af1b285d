"""`qlrl reward`: scores files of responses as training would."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from megatron_qlrl.config.schema import JUDGE_MODEL, JudgeConfig, RewardConfig
from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.platform.files import check_output, replaced

app = typer.Typer(help="The reward.", no_args_is_help=True)
JUDGE_URL = "http://127.0.0.1:8000/v1"


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="JSONL or parquet.")],
    out: Annotated[Path | None, typer.Option(help="JSONL file for the scored rows.")] = None,
    no_judge: Annotated[bool, typer.Option("--no-judge", help="Rules alone.")] = False,
    judge_url: Annotated[
        list[str] | None, typer.Option(help=f"Judge server; repeatable. Default: {JUDGE_URL}")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="As the server names it.")] = JUDGE_MODEL,
    judge_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key.")
    ] = None,
    custom: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODULE:FUNCTION",
            help="Own reward for the sources with NAME, as reward.custom has it; repeatable.",
        ),
    ] = None,
    reasoning: Annotated[
        Literal["required", "optional"] | None,
        typer.Option(
            help="For rows without the field `reasoning`: `required` if the prompt ended in an "
            "open <think>."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder whose chat template decides that instead.")
    ] = None,
) -> None:
    """Score rows {data_source, question, ground_truth, response} as training would.

    With --out every row is written with rule, judge, score, matched and masked. Rows that cannot
    be read are named on stderr and left out; the exit code is then 1. If no row can be read, it is
    2, and the file that --out names is not changed.
    """
    from megatron_qlrl.reward.audit import audit
    from megatron_qlrl.reward.score import Scorer

    if out:
        check_output(out, [file])  # before the judge is asked
    opened = _reasoning_open(reasoning, model)
    judge = None if no_judge else _judge(judge_url or [JUDGE_URL], judge_model, judge_key_env)
    with ExitStack() as stack:
        stream = stack.enter_context(_opened(out, file)) if out else None
        own = Scorer.with_functions(judge, _own_rewards(custom or []))
        scorer = stack.enter_context(closing(own))

        def write(row: dict[str, Any]) -> None:
            if stream is not None:
                stream.write(json.dumps(row) + "\n")

        result = audit(file, scorer, write, reasoning_open=opened)
        if scorer.last_failure:
            typer.echo(f"the last failure: {scorer.last_failure}", err=True)
    typer.echo(result.table())
    for line in result.bad:
        typer.echo(line, err=True)
    if result.bad:
        typer.echo(f"{len(result.bad)} row(s) could not be scored", err=True)
        sys.exit(1)


@contextmanager
def _opened(out: Path, source: Path) -> Iterator[TextIO]:
    with replaced(out, inputs=[source]) as fresh, fresh.open("w", encoding="utf-8") as stream:
        yield stream


def _own_rewards(named: list[str]) -> RewardConfig:
    from pydantic import ValidationError

    try:
        parts = [option.partition("=") for option in named]
        return RewardConfig.model_validate({"custom": {name: f for name, _, f in parts}})
    except ValidationError as error:
        raise ConfigError(
            f"--custom takes NAME=package.module:function, found {', '.join(named)}"
        ) from error


def _reasoning_open(reasoning: str | None, model: Path | None) -> bool | None:
    if model is None:
        return None if reasoning is None else reasoning == "required"
    if reasoning is not None:
        raise ConfigError("--reasoning and --model say the same thing; pass one of them")
    from megatron_qlrl.data.template import opens_reasoning, render
    from megatron_qlrl.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    return opens_reasoning(tokenizer, render(tokenizer, [{"role": "user", "content": "?"}], None))


def _judge(urls: list[str], model: str, key_env: str | None) -> Any:
    """Returns a judge, after checking that its servers answer."""
    from megatron_qlrl.reward.judge import Judge, check_judge

    config = judge_config(urls, model, key_env)
    key = read_secret(key_env)
    check_judge(config, key=key)
    return Judge(config, key=key)


def judge_config(urls: list[str], model: str, key_env: str | None) -> JudgeConfig:
    """Returns the config of judge servers that options name.

    Raises:
        ConfigError: an option cannot be used.
    """
    from pydantic import ValidationError

    try:
        return JudgeConfig(urls=tuple(urls), model=model, api_key_env=key_env)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        problems = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
        raise ConfigError("; ".join(problems)) from None
