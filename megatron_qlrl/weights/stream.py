"""Streams weights: from a Hugging Face folder into the model, and from the model as Hugging Face
tensors in bounded buckets, for the rollout engine and for releases."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from stat import S_IMODE

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_qlrl.config.folder import INDEX, find_tensors
from megatron_qlrl.config.shape import ModelShape, hf_shapes, padded_vocab
from megatron_qlrl.errors import CheckpointError, SyncError
from megatron_qlrl.parallel.collectives import gather_objects, on_all_ranks
from megatron_qlrl.parallel.context import Axis, ParallelContext
from megatron_qlrl.weights.hf_map import Entry, entry_of, local_shard, to_hf, to_hf_slices


def _entry(name: str, shape: ModelShape, context: ParallelContext) -> Entry:
    first_layer = shape.num_layers // context.pp.size * context.pp.rank
    return entry_of(
        name,
        first_layer=first_layer,
        tied=shape.tied,
        num_experts=shape.experts.num if shape.experts else 0,
        ep_size=context.ep.size,
    )


def load_hf(
    folder: Path, model: torch.nn.Module, *, shape: ModelShape, context: ParallelContext
) -> None:
    """Fills this rank's parameters, reading only this rank's slices of the files.

    Raises:
        CheckpointError: a file, tensor or shape is not what config.json promises (every rank).
    """
    on_all_ranks(lambda: _load_hf(folder, model, shape, context))


def _load_hf(
    folder: Path, model: torch.nn.Module, shape: ModelShape, context: ParallelContext
) -> None:
    where = find_tensors(folder, shape)
    with ExitStack() as stack:
        try:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in dict.fromkeys(where.values())
            }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder}: a safetensors file cannot be read: {error}"
            ) from error

        def read(name: str, start: int, end: int, columns: bool) -> torch.Tensor:
            piece = files[where[name]].get_slice(name)
            return piece[:, start:end] if columns else piece[start:end]

        for name, parameter in model.named_parameters():
            tensor = local_shard(
                _entry(name, shape, context), read, shape=shape, tp_size=context.tp.size,
                tp_rank=context.tp.rank, rows=parameter.shape[0], ep_rank=context.ep.rank,
            )  # fmt: skip
            parameter.data.copy_(tensor)


@dataclass(frozen=True)
class _Item:
    """One Megatron parameter in the plan; `local` is its name on its pipeline stage."""

    local: str
    stage: int
    entry: Entry
    size: tuple[int, ...]
    numel: int


class WeightStream:
    """Streams the whole model as (Hugging Face name, tensor) pairs, by a plan that is made once.

    Every rank must iterate (gathering is collective) and sees every tensor, which may be the
    model's own memory: read it before the next update. A bucket holds
    the tp shards of consecutive parameters of one stage: one broadcast of a shard over pp, one
    all-gather over tp. Experts have buckets of their own, which are gathered over ep. A parameter
    larger than a bucket gets a bucket of its own. Beside a bucket there is at most as much memory
    again: the tensors that are joined from its shards.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        shape: ModelShape,
        context: ParallelContext,
        bucket_bytes: int,
    ) -> None:
        self._shape, self._context = shape, context
        self.tied = shape.tied
        self._parameters = dict(model.named_parameters())
        width = next(iter(self._parameters.values())).element_size()
        mine = [
            _Item(name, context.pp.rank, _entry(name, shape, context), tuple(p.shape), p.numel())
            for name, p in self._parameters.items()
        ]
        stages = {item.stage: items for items in gather_objects(mine) for item in items[:1]}
        plan: dict[tuple[str, ...], _Item] = {}
        for stage in sorted(stages):
            for item in stages[stage]:  # the last stage may have a copy of the first's embedding
                plan.setdefault(item.entry.hf_names, item)
        dense = [item for item in plan.values() if item.entry.kind != "expert"]
        experts = [item for item in plan.values() if item.entry.kind == "expert"]
        self._buckets = [
            *_buckets(dense, limit=bucket_bytes // (width * context.tp.size)),
            *_buckets(experts, limit=bucket_bytes // (width * context.ep.size)),
        ]
        names = {name for entry in plan for name in entry}
        expected = set(hf_shapes(shape))
        if names != expected:
            raise SyncError(
                f"the weight plan misses {sorted(expected - names)[:3]} "
                f"and has unknown {sorted(names - expected)[:3]}"
            )

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._stream(lambda bucket: False)

    def for_engine(self, tp: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Streams the tensors with an LM head of its own, also where the model ties it to the
        embedding, for engines of `tp` ranks: world ranks [i * tp, (i + 1) * tp) form engine i.

        Where an engine is cut as the trainer is, nothing is gathered over tp: of each tensor only
        the rows or columns that this rank's engine keeps are filled in. (vLLM takes no slices: its
        loaders cut them out of the whole shape, `narrow` in model_executor/parameter.py.)
        """
        axis, rank = self._context.tp, self._context.rank
        alike = tp == axis.size > 1 and rank % tp == axis.rank
        # vLLM pads the vocabulary to a multiple of 64, and divides what that gives.
        vocab = self._shape.vocab_size
        same_vocab = padded_vocab(vocab, tp) == -(-vocab // 64) * 64

        def is_cut_alike(bucket: list[_Item]) -> bool:
            # The engine cuts each expert, the trainer none.
            kinds = {item.entry.kind for item in bucket}
            return alike and "expert" not in kinds and (same_vocab or "vocab" not in kinds)

        for name, tensor in self._stream(is_cut_alike):
            yield name, tensor
            if self.tied and name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor
            del tensor

    @torch.no_grad()
    def _stream(
        self, in_slices: Callable[[list[_Item]], bool]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`in_slices` says whether this rank's slices of a bucket's tensors are enough."""
        for bucket in self._buckets:
            # What the bucket held is free before the next one is gathered.
            yield from self._tensors(bucket, sliced=in_slices(bucket))

    def _tensors(self, bucket: list[_Item], *, sliced: bool) -> Iterator[tuple[str, torch.Tensor]]:
        tp, shape = self._context.tp, self._shape
        for item, shards in zip(bucket, self._gather(bucket, whole=not sliced), strict=True):
            if sliced:
                pairs = to_hf_slices(
                    item.entry, shards[0], shape=shape, tp_size=tp.size, tp_rank=tp.rank
                )
            else:
                pairs = to_hf(item.entry, shards, shape=shape)
            for name, tensor in pairs:
                yield name, tensor.contiguous()

    def _axis(self, bucket: list[_Item]) -> Axis:
        """Returns the ranks over which the bucket's parameters are divided."""
        is_expert = bucket[0].entry.kind == "expert"
        return self._context.ep if is_expert else self._context.tp

    def _gather(self, bucket: list[_Item], *, whole: bool) -> Iterator[list[torch.Tensor]]:
        """Yields the shards of each parameter in the bucket, on every rank; unless `whole`, only
        the one of this rank's place. What a rank need not receive is not copied."""
        axis, pp = self._axis(bucket), self._context.pp
        if pp.size == 1 and (axis.size == 1 or not whole):
            yield from ([self._parameters[item.local].detach()] for item in bucket)
            return
        gathered = self._shards(bucket, whole=whole)
        start = 0
        for item in bucket:
            end = start + item.numel
            yield [flat[start:end].view(item.size) for flat in gathered]
            start = end

    def _shards(self, bucket: list[_Item], *, whole: bool) -> tuple[torch.Tensor, ...]:
        """Returns the bucket's parameters one after another, [numel] for each rank of its axis. A
        stage sends its shards before they are gathered: each rank sends a part, at the same
        time."""
        axis, pp = self._axis(bucket), self._context.pp
        some = next(iter(self._parameters.values()))
        stage, total = bucket[0].stage, sum(item.numel for item in bucket)
        num, place = (axis.size, axis.rank) if whole else (1, 0)
        gathered = some.new_empty(num * total)
        shards = gathered.chunk(num)
        local = shards[place]
        if pp.rank == stage:
            flat = [self._parameters[item.local].detach().reshape(-1) for item in bucket]
            torch.cat(flat, out=local)
        if pp.size > 1:
            dist.broadcast(local, src=dist.get_global_rank(pp.group, stage), group=pp.group)
        if num > 1:
            dist.all_gather_into_tensor(gathered, local, group=axis.group)
        return shards


def _buckets(plan: list[_Item], *, limit: int) -> list[list[_Item]]:
    buckets: list[list[_Item]] = []
    for item in plan:
        last = buckets[-1] if buckets else []
        fits = last and last[0].stage == item.stage
        if fits and sum(i.numel for i in last) + item.numel <= limit:
            last.append(item)
        else:
            buckets.append([item])
    return buckets


def write_hf(stream: WeightStream, folder: Path, *, shard_bytes: int, writer: bool) -> None:
    """Writes the stream as safetensors shards with an index; only the `writer` rank writes.

    The writer keeps reading the stream after a failed write, which is collective.

    Raises:
        CheckpointError: the folder cannot be written (on the writer).
    """
    if not writer:
        for _ in stream:
            pass
        return
    files: list[tuple[Path, list[str], int]] = []
    failure: Exception | None = None
    for shard in _shards(stream, shard_bytes):
        try:
            if failure is None:
                files.append(_write_shard(folder / f"part-{len(files):05d}.safetensors", shard))
        except (OSError, SafetensorError) as error:
            failure = error
    try:
        if failure is None:
            _name_shards(folder, files)
    except OSError as error:
        failure = error
    if failure is not None:
        raise CheckpointError(f"cannot write the model folder {folder}: {failure}") from failure


def _shards(stream: WeightStream, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The stream in host memory, in dicts of at most `shard_bytes` (or one tensor). The next step
    empties the dict, so that memory holds one shard."""
    pending: dict[str, torch.Tensor] = {}
    for name, tensor in stream:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            yield pending
            pending.clear()
        pending[name] = tensor.cpu()
    yield pending


def _write_shard(path: Path, shard: dict[str, torch.Tensor]) -> tuple[Path, list[str], int]:
    """Returns the path with the tensors' names and their bytes."""
    from safetensors.torch import save_file

    # safetensors makes a file that only its owner may read: like any other it gets what the umask
    # leaves.
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(S_IMODE(mode))
    return path, list(shard), sum(tensor.nbytes for tensor in shard.values())


def _name_shards(folder: Path, files: list[tuple[Path, list[str], int]]) -> None:
    """Hugging Face's file names, known only when the number of shards is."""
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)  # an older release's, which would win
        files[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names, _) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    total = sum(size for _, _, size in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
