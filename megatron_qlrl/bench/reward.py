"""Measures the scorer with a judge of fixed latency, and the rules alone.

1,024 wrong answers -> the scorer of training -> HTTP -> a server in another process, which
answers by the candidate's text after `latency_s`
"""

import asyncio
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.reward.judge import Judge
from megatron_qlrl.reward.score import Scorer, score_response
from megatron_qlrl.types import Score

_CONCURRENCIES = (1, 8, 64)
# Source, gold, and right and wrong final answers as models write them.
_PLAIN = (
    ("musique", "Barack Obama", ("Barack Obama", "(George Bush)", "**barack obama**.")),
    ("docmath", "1234.5", ("1,234.5", "$1,234.50", "-1234.5", "(17%)")),
    ("long_toc_choices", "C", ("(C).", "(D)", "C")),
)


def bench_reward(*, samples: int, latency_s: float, in_flight: int, rounds: int) -> dict[str, Any]:
    """Returns `verdicts_per_s`, `rule_answers_per_s` and `identical`.

    `verdicts_per_s` is the median of `rounds` with `in_flight` requests, both sides of HTTP on this
    machine; at most in_flight / latency_s is possible. `rule_answers_per_s` on one core is the best
    of short rounds, because other processes only slow it down. `identical` says whether all scores
    are right and the same with 1, 8 and 64 requests in flight.
    """
    answers = [f"candidate {n}" for n in range(samples)]
    with _judge_server(latency_s) as url:
        rates = [_judged(url, answers, in_flight)[0] for _ in range(rounds)]
    with _judge_server(0.0) as url:
        first, *others = (_judged(url, answers, number)[1] for number in _CONCURRENCIES)
    right = [float(_accepts(answer)) for answer in answers]
    return {
        "bench": "reward",
        "verdicts_per_s": median(rates),
        "rule_answers_per_s": max(_rule_rate() for _ in range(5 * rounds)),
        "identical": all(scores == first for scores in others)
        and [score.value for score in first] == right,
        "shape": {"samples": samples, "latency_s": latency_s, "in_flight": in_flight},
        "machine": {"python": platform.python_version(), "device": "cpu"},
    }


def _judged(url: str, answers: Sequence[str], in_flight: int) -> tuple[float, list[Score]]:
    """Returns verdicts per second, and the scores."""
    config = JudgeConfig.model_validate({"urls": [url], "model": "bench", "concurrency": in_flight})
    with closing(Scorer(Judge(config, key=None))) as scorer:
        start = time.perf_counter()
        futures = [
            scorer.submit(
                data_source="musique",
                question="Which one is it?",
                ground_truth="none of them",
                response=f"<think>hm</think>Therefore, the answer is {answer}.",
                reasoning_open=False,
            )
            for answer in answers
        ]
        wait(futures)  # this thread wakes once instead of once for each future
        scores = [future.result() for future in futures]
        return len(answers) / (time.perf_counter() - start), scores


def _rule_rate(num: int = 20_000) -> float:
    """Returns how many plain answers per second the rules score."""
    cases = [
        (source, gold, f"<think>hm</think>Therefore, the answer is {answer}")
        for source, gold, answers in _PLAIN
        for answer in answers
    ]
    work = [cases[n % len(cases)] for n in range(num)]
    start = time.perf_counter()
    for source, gold, response in work:
        score_response(
            data_source=source, ground_truth=gold, response_text=response, reasoning_open=False
        )
    return num / (time.perf_counter() - start)


def _accepts(candidate: str) -> bool:
    return int(candidate.rsplit(" ", 1)[1]) % 3 == 0


@contextmanager
def _judge_server(latency_s: float) -> Iterator[str]:
    """Yields the base URL of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, latency_s), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, latency_s: float) -> None:
    async def work() -> None:
        server = await asyncio.start_server(partial(_answer, latency_s), "127.0.0.1", 0)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(work())


async def _answer(
    latency_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answers chat completions over one HTTP/1.1 connection that stays open."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split()[0])
            request = json.loads(await reader.readexactly(length))
            fields = json.loads(request["messages"][-1]["content"])
            await asyncio.sleep(latency_s)
            verdict = json.dumps({"equivalent": _accepts(fields["candidate"])})
            choice = {"index": 0, "message": {"content": verdict}, "finish_reason": "stop"}
            body = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
