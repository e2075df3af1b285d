"""`qlrl behaviours`: how often responses ground, plan, backtrack and verify, step by step."""

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_qlrl.cli.reward import judge_config
from megatron_qlrl.config.schema import JUDGE_MODEL
from megatron_qlrl.errors import DataError
from megatron_qlrl.platform.env import read_secret
from megatron_qlrl.platform.files import replaced

_TIMEOUT_S = 120.0


def behaviours(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or a JSONL file of responses.")
    ],
    judge_url: Annotated[
        list[str] | None, typer.Option(help="Judge server; repeatable. None: patterns alone.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="As the server names it.")] = JUDGE_MODEL,
    judge_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key.")
    ] = None,
    per_step: Annotated[
        int | None, typer.Option(min=1, help="The most responses of a step, spread over it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Count grounding, subgoal setting, backtracking and verification in logged responses.

    Writes behaviours.json (means by step) and behaviours.jsonl (a line a response) into the run
    folder, or beside the file as FILE.behaviours.json(l). A command that was killed goes on where
    it was.
    """
    from megatron_qlrl.behaviours.count import behaviour_lines, count_behaviours, response_files
    from megatron_qlrl.platform.lock import take_lock

    if not source.exists():
        raise DataError(f"{source} does not exist")
    files = response_files(source)
    stem = source / "behaviours" if source.is_dir() else Path(f"{source}.behaviours")
    with ExitStack() as stack:
        stack.enter_context(closing(take_lock(Path(f"{stem}.lock"), what=f"{stem}.json")))
        ask = None
        if judge_url:
            ask = _Asking(stem, judge_url, judge_model, judge_key_env, stack)
        fresh = stack.enter_context(replaced(Path(f"{stem}.jsonl")))
        with fresh.open("w", encoding="utf-8") as stream:
            result = count_behaviours(
                files,
                ask=ask,
                per_step=per_step,
                write=lambda record: print(json.dumps(record), file=stream),
            )
        shown = asdict(result) | {"judge": judge_model if judge_url else None}
        with replaced(Path(f"{stem}.json")) as summary:
            summary.write_text(json.dumps(shown, indent=1), encoding="utf-8")
    typer.echo(json.dumps(shown, indent=1) if as_json else "\n".join(behaviour_lines(result)))
    for note in result.notes:
        typer.echo(f"qlrl: {note}", err=True)
    missing = sum(step.no_verdict or 0 for step in result.steps)
    if ask is not None and missing:
        typer.echo(
            f"qlrl: {missing} responses have no verdict and are left out of the judge's means "
            f"(last: {ask.judge.last_failure}); the same command asks for them again",
            err=True,
        )


class _Asking:
    """Asks a judge from code without an event loop, and says how far it is."""

    def __init__(
        self, stem: Path, urls: list[str], model: str, key_env: str | None, stack: ExitStack
    ) -> None:
        from megatron_qlrl.behaviours.judge import BehaviourJudge, CountsJournal
        from megatron_qlrl.platform.progress import Progress, Tally

        config = judge_config(urls, model, key_env).model_copy(update={"timeout_s": _TIMEOUT_S})
        key = read_secret(key_env)
        journal = stack.enter_context(closing(CountsJournal(Path(f"{stem}.journal"))))
        self.judge = BehaviourJudge(config, journal, key=key)
        self._progress, self._tally = Progress.of_rank(0), Tally("responses")

    def __call__(self, asked: Sequence[Any]) -> Sequence[Any]:
        import asyncio

        with self._progress.doing(f"asking the judge about {len(asked)} responses", self._tally):
            self._tally.start()
            return asyncio.run(self.judge.counts(asked, self._tally))
