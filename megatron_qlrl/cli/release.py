"""`qlrl release check | push`: a Hugging Face folder that is handed on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_qlrl.config.shape import read_json, read_shape
from megatron_qlrl.release.static import Check, static_checks

app = typer.Typer(help="A model folder that is handed on.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Hugging Face folder of a run or an export.")]


@app.command()
def check(
    folder: Folder,
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_OPTIONS]", help="For vLLM's server.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, or the run's folder, whose weights and tokenizer this must be. "
            "Default: the run that FOLDER lies in as hf/."
        ),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Load nothing; read files.")] = False,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for vLLM's start.")] = 900,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Check a model folder: its files, byte for byte against the checkpoint, then the model in
    transformers and in vLLM's server. Exit code 1 if something does not hold."""
    steps: list[Callable[[], Iterator[Check]]] = [lambda: static_checks(folder)]
    if not static:
        steps.append(lambda: _against_checkpoint(folder, checkpoint))
        steps.append(lambda: _answers(folder, limit, extra or []))
    results: list[Check] = []
    for step in steps:
        for result in step():
            results.append(result)
            if not as_json:
                typer.echo(f"{result.status:<8} {result.name}: {result.detail}")
        if any(result.status == "failed" for result in results):
            break  # what is loaded next would fail in a way that is harder to read
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=1))
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload. Without it: a dry run.")] = False,
) -> None:
    """Upload a model folder to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN.
    Without --yes it checks the files, says what would go where, and sends nothing."""
    from huggingface_hub import HfApi

    from megatron_qlrl.release.push import files_to_push, listing
    from megatron_qlrl.release.push import push as upload

    hub: Any = HfApi()  # its overloads fit no protocol
    files = files_to_push(folder, repo)
    typer.echo("\n".join(listing(files, repo, private=private, endpoint=hub.endpoint)))
    if not yes:
        typer.echo("dry run: nothing was sent; --yes uploads")
        return
    upload(folder, repo, private=private, hub=hub)
    typer.echo(f"uploaded: {hub.endpoint}/{repo}")


def _answers(folder: Path, limit_s: float, extra: list[str]) -> Iterator[Check]:
    """The server is asked first and has ended when transformers loads the model: memory holds one
    of them."""
    from megatron_qlrl.data.tokenizer import load_tokenizer
    from megatron_qlrl.errors import QlrlError
    from megatron_qlrl.launch.completions import NAME, served
    from megatron_qlrl.release import answers
    from megatron_qlrl.release.static import run_check

    dtype = str(read_json(folder / "config.json")["dtype"])
    max_positions = read_shape(folder, rope_scaling=None).max_positions
    try:
        prompts = answers.fixed_prompts(load_tokenizer(folder), max_positions)
        max_tokens = max(map(len, prompts)) + answers.ANSWER_TOKENS
        with served(
            folder, dtype=dtype, max_tokens=max_tokens, limit_s=limit_s, extra=extra
        ) as complete:
            given = list(answers.ask(complete, NAME, prompts))
    except QlrlError as error:
        yield Check("vLLM", "failed", str(error))
        return
    yield Check("vLLM", "ok", f"its server answered {len(given)} prompts")
    try:
        exact = answers.score(folder, answers.wider(dtype), given)
        peer = answers.score(folder, answers.torch_dtype(dtype), given)
    except QlrlError as error:
        yield Check("transformers", "failed", str(error))
        return
    yield Check("transformers", "ok", f"loads the folder; compared in {dtype} and wider")
    yield run_check("log-probs", lambda: answers.compare_logprobs(given, exact, peer))
    yield run_check("greedy answers", lambda: answers.compare_choices(given, exact, peer))


def _against_checkpoint(folder: Path, checkpoint: Path | None) -> Iterator[Check]:
    run = folder.resolve().parent
    if checkpoint is None and folder.resolve().name == "hf" and (run / "checkpoints").is_dir():
        checkpoint = run
    if checkpoint is None:
        reason = "no checkpoint at hand, so that bytes were compared with nothing; --checkpoint RUN"
        yield Check("checkpoint", "skipped", reason)
        return
    from megatron_qlrl.commands import run_release_compare
    from megatron_qlrl.errors import QlrlError

    try:
        yield from run_release_compare(checkpoint, folder)
    except QlrlError as error:
        yield Check("checkpoint", "failed", str(error))
