"""`qlrl judge`: the LLM judge's server."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_qlrl.config.schema import JUDGE_MODEL

app = typer.Typer(help="The LLM judge.", no_args_is_help=True)


@app.command()
def serve(
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_OPTIONS]", help="For vLLM's server.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hugging Face name or folder.")] = JUDGE_MODEL,
    host: Annotated[str, typer.Option(help="0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key that clients must send (mode 0600); a missing one is written "
            "with a new key."
        ),
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds until it must be healthy.")] = 900,
) -> None:
    """Serve a judge with vLLM until Ctrl-C; prints a line when it is ready.

    Clients must send the key in --key-file, or that in VLLM_API_KEY; without either, none.
    """
    from megatron_qlrl.launch import judge

    code = judge.serve(
        model, host=host, port=port, limit_s=limit, key_file=key_file, extra=extra or []
    )
    sys.exit(code)
