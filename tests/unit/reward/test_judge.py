"""The judge's client against a server by hand, over real HTTP."""

import asyncio
import socket
from collections import Counter
from contextlib import ExitStack

import pytest
from judge_server import MODEL, FakeJudge, Reply, running, same_initial

from megatron_qlrl.config.schema import JudgeConfig
from megatron_qlrl.errors import RewardError
from megatron_qlrl.reward import judge as judge_module
from megatron_qlrl.reward.judge import Judge, check_judge
from megatron_qlrl.reward.verdict import Claim


def config(*urls, **settings):
    settings = {"timeout_s": 5.0, "cooldown_s": 60.0, "model": MODEL} | settings
    return JudgeConfig.model_validate({"urls": urls, **settings})


def claims(*predictions, gold="Paris"):
    return [Claim("Which city?", gold, p) for p in predictions]


def ask(settings, asked, *, key=None):
    """Verdicts on all claims at once, and the judge that gave them."""

    async def work():
        judge = Judge(settings, key=key, pause_s=0.001)
        try:
            return await asyncio.gather(*map(judge.verdict, asked)), judge
        finally:
            await judge.close()

    return asyncio.run(work())


def refused_url():
    """Of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def failing(times, status=429):
    """Refuses each candidate so many times, then judges."""
    seen: Counter[str] = Counter()

    def answer(fields):
        seen[fields["candidate"]] += 1
        bad = seen[fields["candidate"]] <= times.get(fields["candidate"], 0)
        return Reply(status=status, body=b"busy") if bad else same_initial(fields)

    return answer


def test_verdicts_come_back_to_their_claims():
    with running(FakeJudge()) as server:
        found, judge = ask(config(server.url), claims("Pari", "Rome", "Paname"))
    assert found == [True, False, True]
    assert sorted(server.candidates) == ["Paname", "Pari", "Rome"]
    assert {r["model"] for r in server.requests} == {MODEL}
    counts = {k: v for k, v in judge.counts.items() if k != "latency_s"}
    assert counts == {"asked": 3, "cached": 0, "yes": 2, "failed": 0, "replies": 3}
    assert 0 < judge.counts["latency_s"] < 15


def test_the_same_claim_is_asked_once_also_while_it_is_in_flight():
    async def work(url):
        judge = Judge(config(url), key=None)
        first = await asyncio.gather(*map(judge.verdict, claims("Pari", "Pari", "Rome")))
        later = [await judge.verdict(claims("Pari")[0])]
        other_gold = [await judge.verdict(claims("Pari", gold="Rome")[0])]
        await judge.close()
        return first + later + other_gold, judge.counts

    with running(FakeJudge()) as server:
        found, counts = asyncio.run(work(server.url))
    assert found == [True, True, False, True, False]
    assert sorted(server.candidates) == ["Pari", "Pari", "Rome"]
    assert (counts["asked"], counts["cached"], counts["yes"]) == (5, 2, 3)


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(judge_module, "CACHE_SIZE", 2)

    async def work(url):
        judge = Judge(config(url), key=None)
        for claim in claims("a", "b", "c", "c", "b", "a"):
            await judge.verdict(claim)
        await judge.close()

    with running(FakeJudge()) as server:
        asyncio.run(work(server.url))
    assert server.candidates == ["a", "b", "c", "a"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_failing_server_is_tried_again_so_often_and_not_more(status):
    answer = failing({"Pari": 3, "Paname": 99}, status)
    with running(FakeJudge(answer)) as server:
        found, judge = ask(config(server.url, attempts=4), claims("Pari", "Paname", "Rome"))
    assert found == [True, None, False]
    assert Counter(server.candidates) == {"Pari": 4, "Paname": 4, "Rome": 1}
    assert judge.counts["failed"] == 1
    assert judge.last_failure == f"{server.url}: HTTP {status} busy"


def test_five_429_cost_one_sample_only():
    predictions = [f"P{n}" for n in range(40)]
    with running(FakeJudge(failing({"P7": 5}))) as server:
        found, _ = ask(config(server.url, attempts=5), claims(*predictions))
    assert found == [None if p == "P7" else True for p in predictions]


def test_a_failure_is_not_remembered():
    async def work(url):
        judge = Judge(config(url, attempts=1), key=None)
        found = [await judge.verdict(claims("Pari")[0]) for _ in range(3)]
        await judge.close()
        return found

    with running(FakeJudge(failing({"Pari": 1}))) as server:
        assert asyncio.run(work(server.url)) == [None, True, True]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("YES but [[NO]]"), "not a verdict: 'YES but"),
        (Reply('{"equivalent": true}', finish_reason="length"), "not a finished chat completion"),
        (Reply(body=b"<html>"), "not a finished chat completion"),
        (Reply(status=400, body=b"too long"), "HTTP 400 too long"),
        (Reply(status=422, body=b"no such field"), "HTTP 422 no such field"),
    ],
)
def test_a_reply_that_would_be_the_same_again_is_not_asked_for_again(reply, reason):
    with running(FakeJudge(lambda _: reply)) as server:
        found, judge = ask(config(server.url), claims("Pari"))
    assert found == [None]
    assert len(server.asked) == 1
    assert judge.last_failure.startswith(f"{server.url}: {reason}")


def test_a_silent_server_costs_the_time_limit():
    slow = FakeJudge(lambda _: Reply(wait_s=0.5))
    with running(slow) as server:
        found, judge = ask(config(server.url, timeout_s=0.1, attempts=2), claims("Pari"))
    assert found == [None]
    assert judge.last_failure == f"{server.url}: no reply within 0.1 s"
    assert len(server.asked) == 2


def test_redirects_are_not_followed():
    with running(FakeJudge(lambda _: Reply(status=307, body=b"elsewhere"))) as server:
        found, judge = ask(config(server.url, attempts=1), claims("Pari"), key="canary")
    assert found == [None]
    assert "HTTP 307" in judge.last_failure


def test_no_more_requests_in_flight_than_allowed():
    def answer(fields):
        return Reply(same_initial(fields).content, wait_s=0.01)

    with running(FakeJudge(answer)) as server:
        found, _ = ask(config(server.url, concurrency=3), claims(*(f"P{n}" for n in range(20))))
    assert found == [True] * 20
    assert server.most_in_flight == 3


def test_verdicts_do_not_depend_on_the_number_in_flight():
    predictions = [f"{'PR'[n % 3 == 0]}{n % 30}" for n in range(64)]
    found = []
    for concurrency in (1, 8, 64):
        with running(FakeJudge()) as server:
            verdicts, judge = ask(config(server.url, concurrency=concurrency), claims(*predictions))
        counts = {k: v for k, v in judge.counts.items() if k != "latency_s"}
        found.append((verdicts, counts))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [n % 3 != 0 for n in range(64)]


def test_servers_share_the_load_and_a_dead_one_is_passed_over():
    def answer(fields):
        return Reply(same_initial(fields).content, wait_s=0.02)

    with ExitStack() as stack:
        servers = [stack.enter_context(running(FakeJudge(answer))) for _ in range(2)]
        urls = [servers[0].url, refused_url(), servers[1].url]
        found, judge = ask(config(*urls, concurrency=8), claims(*(f"P{n}" for n in range(60))))
    assert found == [True] * 60
    assert judge.counts["failed"] == 0
    loads = [len(s.asked) for s in servers]
    assert sum(loads) == 60
    assert min(loads) >= 15


def test_a_server_that_is_back_is_used_again():
    async def work(urls):
        judge = Judge(config(*urls, cooldown_s=0.05, attempts=2), key=None, pause_s=0.001)
        first = await judge.verdict(claims("P1")[0])
        await asyncio.sleep(0.06)
        second = await judge.verdict(claims("P2")[0])
        await judge.close()
        return first, second

    flaky = FakeJudge(failing({"P1": 1}, 503))
    with running(flaky), running(FakeJudge()) as sound:
        assert asyncio.run(work([flaky.url, sound.url])) == (True, True)
    assert flaky.candidates == ["P1", "P2"]
    assert sound.candidates == ["P1"]


def test_when_the_judge_is_lost_the_rest_of_a_batch_does_not_wait(monkeypatch):
    monkeypatch.setattr(judge_module, "LOST_AFTER", 3)
    with running(FakeJudge(lambda _: Reply(status=500, body=b"down"))) as server:
        found, judge = ask(
            config(server.url, concurrency=1, attempts=2), claims(*(f"P{n}" for n in range(30)))
        )
    assert found == [None] * 30
    assert judge.counts["failed"] == 30
    assert Counter(server.candidates) == {"P0": 2, "P1": 2, "P2": 2}


def test_the_key_is_sent_and_never_shown():
    with running(FakeJudge(key="canary-4711")) as server:
        found, _ = ask(config(server.url), claims("Pari"), key="canary-4711")
        assert found == [True]
        wrong, judge = ask(config(server.url, attempts=1), claims("Pari"), key="canary-4712")
        with pytest.raises(RewardError) as caught:
            check_judge(config(server.url), key="canary-4712")
    assert wrong == [None]
    for text in (judge.last_failure, str(caught.value)):
        assert "HTTP 401" in text
        assert "wrong key: Bearer ***" in text
        assert "canary" not in text


def test_a_judge_in_order_passes_the_check():
    with running(FakeJudge()) as server:
        check_judge(config(server.url), key=None)
    assert [fields["reference"] for fields in server.asked] == ["Paris"]


def test_every_server_that_is_not_ready_is_named_with_the_reason():
    dead = refused_url()
    with running(FakeJudge()) as other, running(FakeJudge(lambda _: Reply("YES"))) as chatty:
        with pytest.raises(RewardError) as caught:
            check_judge(config(dead, chatty.url), key=None)
        with pytest.raises(RewardError, match="no model 'gpt', only fake-judge; set reward.judge"):
            check_judge(config(other.url, model="gpt"), key=None)
    message = str(caught.value)
    assert f"{dead}: " in message and "onnect" in message
    assert f"{chatty.url}: not a verdict: 'YES'" in message
    assert "qlrl judge serve" in message
