"""`qlrl judge`: the LLM judge's server."""

import sys
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
    limit: Annotated[float, typer.Option(min=1, help="Seconds until it must be healthy.")] = 900,
) -> None:
    """Serve a judge with vLLM until Ctrl-C; prints a line when it is ready.

    With VLLM_API_KEY in the environment the server asks for that key.
    """
    from megatron_qlrl.launch import judge

    sys.exit(judge.serve(model, host=host, port=port, limit_s=limit, extra=extra or []))
