"""The engine's own logic, with a stand-in for vLLM (the real one is in the integration tests)."""

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_qlrl.errors import StopRequested, SyncError
from megatron_qlrl.rollout import vllm_engine
from megatron_qlrl.rollout.vllm_engine import Request, Sampling, VllmEngine

MANIFEST = {"a": (2, 3), "b": (4,)}
A, B = torch.zeros(2, 3), torch.zeros(4)


class FakeLLM:
    """Records the calls; `reload_weights` consumes the weights like the real one."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        worker = SimpleNamespace(reload_weights=self.reload, get_model=torch.nn.Module)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def reload(self, *, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.calls.append(("reload", [name for name, _ in weights_iterator]))

    def wake_up(self, *, tags: list[str]) -> None:
        self.calls.append(("wake", tags))

    def sleep(self, *, level: int) -> None:
        self.calls.append(("sleep", level))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


def engine_with(llm: FakeLLM) -> VllmEngine:
    engine = VllmEngine.__new__(VllmEngine)
    engine._manifest = dict(MANIFEST)
    engine._llm = llm  # pyright: ignore[reportAttributeAccessIssue]
    engine._stop = [2]
    engine._counts = dict.fromkeys(vllm_engine.COUNTS, 0.0)
    engine._block_tokens = 1
    engine._version = 5
    return engine


def test_weights_that_fit_the_manifest_pass_in_any_order() -> None:
    engine = engine_with(FakeLLM())
    found = list(engine._checked([("b", B), ("a", A)]))
    assert [name for name, _ in found] == ["b", "a"]
    assert found[0][1] is B
    # the check starts anew with every update
    assert len(list(engine._checked([("a", A), ("b", B)]))) == 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("a", A)], "1 tensors missing, e.g. b"),
        ([], "2 tensors missing, e.g. a"),
        ([("a", A), ("c", B), ("b", B)], r"c \(4,\) was not expected; .* no such tensor"),
        ([("a", A), ("a", A), ("b", B)], r"a \(2, 3\) was not expected"),
        ([("a", A.t()), ("b", B)], r"a \(3, 2\) was not expected; the model has \(2, 3\)"),
        ([("a", A), ("b", B[None])], r"b \(1, 4\) was not expected; the model has \(4,\)"),
    ],
    ids=["missing", "nothing", "unknown", "doubled", "transposed", "another rank"],
)
def test_weights_that_do_not_fit(weights: list[tuple[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(SyncError, match=message):
        list(engine_with(FakeLLM())._checked(weights))


def test_awake_loads_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: False)
    llm = FakeLLM()
    with engine_with(llm).awake([("a", A), ("b", B)], 0):
        assert llm.calls == [("reload", ["a", "b"])]
    assert llm.calls == [("reload", ["a", "b"])]


def test_on_a_gpu_the_cache_wakes_after_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: True)
    llm = FakeLLM()
    with engine_with(llm).awake([("a", A), ("b", B)], 0):
        pass
    assert llm.calls == [
        ("wake", ["weights"]),
        ("reload", ["a", "b"]),
        ("wake", ["kv_cache"]),
        ("sleep", 2),
    ]


class Half(FakeLLM):
    """Its weights are half replaced: it cannot load the rest, nor sleep."""

    failure: BaseException

    def reload(self, *, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().reload(weights_iterator=weights_iterator)
        raise self.failure

    def sleep(self, *, level: int) -> None:
        super().sleep(level=level)
        raise RuntimeError("CUDA error: cannot sleep")


@pytest.mark.parametrize(
    "failure",
    [
        KeyError("layers.0.qkv"),
        ValueError("There is no module or parameter named layers.0.qkv"),
        AssertionError("layers.0.qkv"),
        RuntimeError("The size of tensor layers.0.qkv must match"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_weights_that_the_engine_cannot_load(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: True)
    llm = Half()
    llm.failure = failure
    with (
        pytest.raises(SyncError, match=rf"could not load .*{type(failure).__name__}.*layers.0.qkv"),
        engine_with(llm).awake([("a", A), ("b", B)], 0),
    ):
        pass
    assert llm.calls[-1] == ("sleep", 2)


def test_no_error_of_going_to_sleep_hides_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: True)
    llm = Half()
    llm.failure = torch.OutOfMemoryError("CUDA out of memory")  # no disagreement about weights
    both = [("a", A), ("b", B)]
    with pytest.raises(torch.OutOfMemoryError), engine_with(llm).awake(both, 0):
        pass
    with pytest.raises(SyncError, match="1 tensors missing"), engine_with(llm).awake([("a", A)], 0):
        pass
    llm.reload = FakeLLM.reload.__get__(llm)  # pyright: ignore
    llm.llm_engine.model_executor.driver_worker.reload_weights = llm.reload
    with pytest.raises(StopRequested), engine_with(llm).awake(both, 0):
        raise StopRequested("asked")
    with pytest.raises(RuntimeError, match="cannot sleep"), engine_with(llm).awake(both, 0):
        pass
    assert llm.calls.count(("sleep", 2)) == 4


@pytest.mark.parametrize("where", ["weights", "generation"])
def test_engine_sleeps_after_an_error(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: True)
    llm = FakeLLM()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", A
        if where == "weights":
            raise OSError(where)
        yield "b", B

    with pytest.raises(OSError, match=where), engine_with(llm).awake(weights(), 0):
        raise OSError(where)
    assert llm.calls[-1] == ("sleep", 2)


@pytest.mark.parametrize(("reason", "finished"), [("stop", True), ("length", False)])
def test_completion_takes_the_sampled_tokens_logprob(reason: str, finished: bool) -> None:
    # vLLM may list more candidates than the sampled one at a position
    output = SimpleNamespace(
        token_ids=[7, 5],
        logprobs=[
            {7: SimpleNamespace(logprob=-0.5)},
            {9: SimpleNamespace(logprob=-0.1), 5: SimpleNamespace(logprob=-3.0)},
        ],
        finish_reason=reason,
    )
    found = vllm_engine._completion(output)
    assert found.token_ids.tolist() == [7, 5]
    assert found.logprobs.tolist() == [-0.5, -3.0]
    assert (found.token_ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    assert found.finished is finished


class FakeEngine:
    """Request k has k + 1 tokens, of which the step that reads its prompt samples the first; the
    calls are recorded. Each step admits `admits` requests."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.admits = 100
        self.scheduler = SimpleNamespace(running=[], waiting=[])
        core = SimpleNamespace(scheduler=self.scheduler, batch_queue=None)
        self.engine_core = SimpleNamespace(engine_core=core)

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.calls.append((request_id, prompt, params.get("seed"), params["output_kind"]))
        request = SimpleNamespace(
            name=request_id,
            num_computed_tokens=0,
            num_prompt_tokens=2,
            num_output_tokens=0,
            num_preemptions=0,
        )
        self.scheduler.waiting.append(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def abort_request(self, request_ids: list[str]) -> None:
        self.calls.append(("abort", request_ids))

    def step(self) -> list[Any]:
        self.calls.append("step")
        running, waiting = self.scheduler.running, self.scheduler.waiting
        running += waiting[: self.admits]
        del waiting[: self.admits]
        batch = list(running)
        for request in batch:
            request.num_computed_tokens = 2 + request.num_output_tokens
        queue = self.engine_core.engine_core.batch_queue
        if queue is not None:
            queue.append(batch)
            if len(queue) < 2:
                return []
            batch = queue.pop(0)
        batch = [request for request in batch if request in running]
        for request in batch:
            request.num_output_tokens += 1
        ended = [r for r in batch if r.num_output_tokens > int(r.name)]
        self.scheduler.running = [r for r in running if r not in ended]
        token = {7: SimpleNamespace(logprob=-0.5)}
        return [
            SimpleNamespace(
                request_id=r.name,
                outputs=[
                    SimpleNamespace(
                        token_ids=[7] * r.num_output_tokens,
                        logprobs=[token] * r.num_output_tokens,
                        finish_reason="stop",
                    )
                ],
                num_cached_tokens=1,
            )
            for r in ended
        ]


@pytest.fixture
def generating(monkeypatch: pytest.MonkeyPatch, lone_group: Any) -> VllmEngine:
    """An engine around a FakeEngine (its `_llm.llm_engine`)."""
    fake = ModuleType("vllm")
    fake.SamplingParams = dict  # pyright: ignore[reportAttributeAccessIssue]
    inputs, params = ModuleType("vllm.inputs"), ModuleType("vllm.sampling_params")
    inputs.tokens_input = lambda ids, *, cache_salt: (*ids, cache_salt)  # pyright: ignore
    kinds = SimpleNamespace(FINAL_ONLY="final only")
    params.RequestOutputKind = kinds  # pyright: ignore[reportAttributeAccessIssue]
    for module in (fake, inputs, params):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    engine = engine_with(FakeLLM())
    fake_engine = FakeEngine()
    engine._llm = SimpleNamespace(  # pyright: ignore
        llm_engine=fake_engine, reset_prefix_cache=lambda: fake_engine.calls.append("reset")
    )
    engine._progress = False
    engine.leads = True
    engine._read_before = False
    engine._ranks = lone_group
    engine._give_up = lambda: ""
    return engine


def requests(num: int) -> list[Request]:
    return [Request(np.array([n, n + 1], np.int32), seed=10 + n) for n in range(num)]


def test_each_response_is_handed_out_while_others_go_on(generating: VllmEngine) -> None:
    """What scoring stands on: nothing waits for the last response of a batch."""
    calls = generating._llm.llm_engine.calls  # pyright: ignore
    for number, done in generating._generate(requests(3), Sampling(1.0, 1.0, 4, 1)):
        calls.append((number, done))
    assert calls[0] == "reset"
    added, rest = calls[1:4], calls[4:]
    assert added == [(str(n), (n, n + 1, "5"), 10 + n, "final only") for n in range(3)]
    assert rest[0::2] == ["step"] * 3
    assert [number for number, _ in rest[1::2]] == [0, 1, 2]
    assert [done.token_ids.tolist() for _, done in rest[1::2]] == [[7], [7] * 2, [7] * 3]


def test_prompts_are_counted_without_what_the_cache_held(generating: VllmEngine) -> None:
    list(generating._generate(requests(3), Sampling(1.0, 1.0, 4, 1)))
    counts = generating.take_counts()
    assert (counts["prefill_tokens"], counts["decode_tokens"]) == (3, 3)  # one of two was cached
    assert counts["prefill_s"] > 0 and counts["decode_s"] > 0
    assert (counts["prompt_tokens"], counts["cached_tokens"]) == (6, 3)
    assert counts["generate_s"] >= counts["prefill_s"] + counts["decode_s"]
    assert set(generating.take_counts().values()) == {0.0}
    generating.leads = False
    list(generating._generate(requests(1), Sampling(1.0, 1.0, 4, 1)))
    assert generating.take_counts() == {}


def test_siblings_are_counted_by_full_blocks_of_a_prompt_seen_before() -> None:
    long, short = np.arange(9, dtype=np.int32), np.arange(8, dtype=np.int32)
    asked = [Request(ids, 0) for ids in (long, short, long, long, short)]
    # The last token of a prompt is always computed: of 8 tokens only one block of 4 can be reused.
    assert vllm_engine._sibling_tokens(asked, 4) == [0, 0, 8, 8, 4]


def test_siblings_that_the_cache_served(generating: VllmEngine) -> None:
    """The stand-in has one of two tokens in its cache; a block is one token."""
    one = requests(1)[0]
    list(generating._generate([one, one, one], Sampling(1.0, 1.0, 4, 1)))
    counts = generating.take_counts()
    assert (counts["sibling_tokens"], counts["sibling_cached_tokens"]) == (2, 2)


def test_preemptions_are_counted(generating: VllmEngine) -> None:
    fake: Any = generating._llm.llm_engine
    step = fake.step

    def preempting() -> list[Any]:
        """As vLLM does, it takes the last of those that were running before the step."""
        for request in fake.scheduler.running[-1:]:
            request.num_preemptions += 1
        return step()

    fake.step = preempting
    list(generating._generate(requests(3), Sampling(1.0, 1.0, 4, 1)))
    assert generating.take_counts()["preemptions"] == 2  # not in the first of three steps


def test_loading_is_timed_and_its_bytes_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: False)
    engine = engine_with(FakeLLM())
    engine.leads = True
    with engine.awake([("a", A), ("b", B)], 0):
        pass
    counts = engine.take_counts()
    assert counts["sync_bytes"] == 4 * (6 + 4)
    assert counts["sync_s"] > 0


@pytest.mark.parametrize("queue", [None, []], ids=["synchronous", "a batch ahead"])
@pytest.mark.parametrize(("admits", "tokens"), [(100, 3), (1, 2)])
def test_decode_speed_leaves_out_tokens_sampled_beside_a_prompt(
    generating: VllmEngine, queue: Any, admits: int, tokens: int
) -> None:
    """Of 1 + 2 + 3 tokens, each request's first comes with its prompt; admitted one by one, the
    second request's last one comes with the prompt of the third."""
    fake: Any = generating._llm.llm_engine
    fake.admits, fake.engine_core.engine_core.batch_queue = admits, queue
    list(generating._generate(requests(3), Sampling(1.0, 1.0, 4, 1)))
    assert generating.take_counts()["decode_tokens"] == tokens


def test_the_version_of_the_weights_is_part_of_the_caches_key(
    generating: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: False)
    fake: Any = generating._llm.llm_engine
    worker = SimpleNamespace(reload_weights=FakeLLM().reload, get_model=torch.nn.Module)
    fake.model_executor = SimpleNamespace(driver_worker=worker)
    salts = []
    for version in (8, 9):
        with generating.awake([("a", A), ("b", B)], version) as generate:
            list(generate(requests(1), Sampling(1.0, 1.0, 4, 1)))
        salts += [call[1][-1] for call in fake.calls if len(call) == 4 and call[0] == "0"]
    assert salts == ["8", "8", "9"]


def test_probe_gives_the_prompts_and_the_continuations_logprobs(generating: VllmEngine) -> None:
    fake: Any = generating._llm.llm_engine

    def step() -> list[Any]:
        fake.scheduler.waiting.clear()
        token = [{t: SimpleNamespace(logprob=-float(t))} for t in range(10)]
        output = SimpleNamespace(token_ids=[7, 8], logprobs=token[7:9], finish_reason="length")
        return [SimpleNamespace(outputs=[output], prompt_logprobs=[None, token[4], token[6]])]

    fake.step = step
    answer = generating.probe(np.array([3, 4, 6], np.int32), 2)
    assert answer.token_ids.tolist() == [3, 4, 6, 7, 8]
    assert answer.logprobs.tolist() == [-4, -6, -7, -8]
    assert (answer.token_ids.dtype, answer.logprobs.dtype) == (np.int32, np.float32)
    assert answer.num_prompt == 3
    assert set(generating.take_counts().values()) == {0.0}


@pytest.mark.parametrize("refused", ["by the check", "by the engine"])
def test_a_stream_is_read_to_its_end_though_a_tensor_is_refused(
    monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """The other ranks gather with this one."""
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: False)
    seen: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            seen.append(name)
            yield name, A.t() if name == "a" and refused == "by the check" else A

    llm = FakeLLM()
    if refused == "by the engine":

        def reload(*, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
            next(iter(weights_iterator))
            raise KeyError("a")

        llm.llm_engine.model_executor.driver_worker.reload_weights = reload
    with pytest.raises(SyncError), engine_with(llm).awake(weights(), 0):
        pass
    assert seen == ["a", "b", "c"]


def test_generation_is_given_up_soon(generating: VllmEngine) -> None:
    done: list[int] = []
    generating._give_up = lambda: "asked" if len(done) > 1 else ""
    with pytest.raises(StopRequested, match="asked"):
        done += (n for n, _ in generating._generate(requests(40), Sampling(1.0, 1.0, 4, 1)))
    assert done == list(range(vllm_engine.STOP_EVERY))
    calls = generating._llm.llm_engine.calls  # pyright: ignore
    assert calls[-1] == ("abort", sorted(str(n) for n in range(vllm_engine.STOP_EVERY, 40)))
