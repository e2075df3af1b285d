"""`qlrl judge`: the LLM judge's server, and what a judge is worth."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from megatron_qlrl.cli.reward import JUDGE_URL, judge_config
from megatron_qlrl.config.schema import JUDGE_MODEL
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.platform.files import check_output, replaced

app = typer.Typer(help="The LLM judge.", no_args_is_help=True)
_MAX_SHOWN = 5


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


@app.command()
def certify(
    url: Annotated[
        list[str] | None, typer.Option(help=f"Judge server; repeatable. Default: {JUDGE_URL}")
    ] = None,
    model: Annotated[str, typer.Option(help="As the server names it.")] = JUDGE_MODEL,
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="How often each pair is asked about.")
    ] = 3,
    concurrency: Annotated[int, typer.Option(min=1, help="The most requests in flight.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one request.")] = 30,
    out: Annotated[Path, typer.Option(help="The certificate, JSON.")] = Path(
        "judge_certificate.json"
    ),
) -> None:
    """Measure a judge on labelled pairs of answers, as training asks it, and write a certificate.

    A command that was killed goes on where it was. Pairs without a verdict do not fail the
    command; started again, it asks about them alone.
    """
    from megatron_qlrl.platform.lock import take_lock
    from megatron_qlrl.platform.progress import Progress, Tally
    from megatron_qlrl.reward.certificate import certificate_table
    from megatron_qlrl.reward.certify import VerdictJournal, rule_alone
    from megatron_qlrl.reward.certify import certify as measure
    from megatron_qlrl.reward.judge import check_judge
    from megatron_qlrl.reward.pairs import read_pairs

    config = judge_config(url or [JUDGE_URL], model, key_env).model_copy(
        update={"concurrency": concurrency, "timeout_s": timeout}
    )
    key = read_secret(key_env)
    check_output(out)
    check_judge(config, key=key)
    kept, pairs = Path(f"{out}.journal"), read_pairs()
    with closing(take_lock(Path(f"{out}.lock"), what=str(out))):
        tally = Tally("verdicts")
        with (
            closing(VerdictJournal(kept, config)) as journal,
            Progress.of_rank(0).doing(f"asking the judge about {len(pairs)} pairs", tally),
        ):
            result = measure(config, key=key, repeats=repeats, journal=journal, tally=tally)
        with replaced(out) as fresh:
            fresh.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if not result.no_verdict.wrong:
            kept.unlink()
    positives, negatives = rule_alone()
    typer.echo(certificate_table(result))
    typer.echo(f"{'the rule alone':<20}false positives {positives}, false negatives {negatives}")
    accepted = [pairs[n - 1] for n in result.mistakes if pairs[n - 1].label == "different"]
    for pair in accepted[:_MAX_SHOWN]:
        typer.echo(f"accepted: {pair.answer!r} for {pair.gold!r} ({pair.reason})")
    if len(accepted) > _MAX_SHOWN:
        typer.echo(f"accepted: {len(accepted) - _MAX_SHOWN} more, see `mistakes` in {out}")
