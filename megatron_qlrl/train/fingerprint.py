"""What a run is made of, kept in its checkpoints: it does not go on as another run unnoticed.

    first start -> fingerprint -> state.json of every checkpoint
    resume      -> fingerprint of today, compared: refused | goes on, told | goes on

Contents, never paths: a run moves with its folders.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_qlrl.config.schema import Config, PhaseConfig
from megatron_qlrl.errors import CheckpointError
from megatron_qlrl.platform.device import weight_dtype
from megatron_qlrl.types import Prompt
from megatron_qlrl.weights.digest import weights_digest

Use = Literal["meaning", "rl", "sft", "told", "free"]

SETTINGS: Mapping[str, Use] = {
    "run": "free",
    "run.seed": "meaning",
    "run.parent": "free",  # the checkpoint's own record of it is compared: train/parent.py
    "model": "free",  # the folder's contents are compared
    "model.dtype": "free",  # the type in use is compared
    "model.rope_scaling": "meaning",
    "data": "free",  # the rows of the files are compared
    "data.enable_thinking": "meaning",
    "curriculum": "rl",
    "rollout": "told",
    "rollout.prompts_per_step": "rl",
    "rollout.group_size": "rl",
    "rollout.temperature": "rl",
    "rollout.top_p": "rl",
    "algorithm": "rl",
    "algorithm.generation_rounds": "told",  # how a batch is filled, not what is learned from it
    "algorithm.oversampling": "told",
    "algorithm.incomplete_batch": "told",
    "algorithm.max_staleness": "told",
    "algorithm.reference_every": "told",  # a curve's resolution: above 1 the loss has no KL term
    "policy": "told",
    "policy.distributed_optimizer": "meaning",  # the kinds cannot read each other's checkpoints
    "optimizer": "told",
    "sft": "told",
    "sft.batch_size": "sft",
    "sft.aggregation": "sft",
    "distill": "free",
    "reward.custom": "rl",
    "reward.custom_judged": "rl",
    "reward.custom_timeout_s": "told",
    "reward.custom_workers": "free",
    "reward.judge": "free",
    "reward.judge.model": "rl",
    "reward.max_masked_share": "told",
    "reward.solved_above": "rl",
    "stability": "told",
    "checkpoint": "free",
    "evaluation": "told",
    "logging": "free",
}
"""What a setting's change does to a run that goes on: `meaning` (of this command: `rl`, `sft`) is
refused, `told` goes on with a line, `free` goes on. A section's entry holds for all its settings
but those with an entry of their own. Phases: see `compare`."""

MODEL_CONTENTS = ("the model's config.json", "the tokenizer", "the chat template")
ROWS = "the training data, as the model sees it"
"""Names of contents in a fingerprint: of those that make the model what it is, whatever its
weights are; and of the training data."""

_IN_CONFIG_ALONE = frozenset(
    "_name_or_path architectures dtype torch_dtype transformers_version use_cache".split()
)
"""Fields of config.json that do not describe the model, or that another release of transformers
writes in another way."""


def fingerprint(
    config: Config,
    command: str,
    *,
    tokenizer: Any,
    rows: str,
    own_rewards: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """JSON-able; reads model.path.

    Args:
        rows: `rows_digest` of the training data.
        own_rewards: digests of the files of `reward.custom`. A change is told and not refused,
            because a function that stopped the run must be mended before the run goes on.

    Raises:
        CheckpointError: the model's files cannot be read.
    """
    folder = Path(config.model.path)
    digests = (
        _config_digest(folder),
        _digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
        _digest(json.dumps(tokenizer.chat_template)),
    )
    settings = dict(_flat(config.model_dump(mode="json", exclude={"phases"})))
    phases = enumerate(config.phases) if command == "rl" else ()
    told = {k: v for k, v in settings.items() if use_of(k) == "told"}
    told |= {f"the source of {k}": v for k, v in (own_rewards or {}).items()}
    return {
        "contents": {
            **dict(zip(MODEL_CONTENTS, digests, strict=True)),
            "the model's weights": weights_digest(folder),
            ROWS: rows,
        },
        "dtype": weight_dtype(config.model.dtype),
        "meaning": {} if command == "rl" else _meaning(config, command),
        "phases": [
            {"steps": p.steps, "meaning": _phase_meaning(p, config.for_phase(k), command)}
            for k, p in phases
        ],
        "told": told | dict(_flat({"phases": _by_number(config.phases)})),
    }


def rows_digest(prompts: Iterable[Prompt], responses: Iterable[Any] = ()) -> str:
    """Digest of the data files' rows, in order; `responses` are token ids [R] of SFT rows."""
    digest = hashlib.sha256()
    for p in prompts:
        fields = (p.uid, p.data_source, p.question, p.ground_truth, len(p.token_ids))
        digest.update(json.dumps(fields).encode())
        digest.update(p.token_ids.tobytes())
    for ids in responses:
        digest.update(len(ids).to_bytes(8) + ids.tobytes())
    return digest.hexdigest()


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> tuple[list[str], str]:
    """(what has changed and must not, by name; a line on what else has changed, or "").

    Phases that have begun by `step` must be the same. Only the last of them may have another number
    of steps, at least as many as are done. Later phases may change, come and go.
    What one of the two does not have (another version wrote it) is not compared.
    """
    refused = _changes(saved["contents"], now["contents"], show=False)
    refused += _changes(saved["meaning"], now["meaning"])
    first_step = 0
    for number, before in enumerate(saved["phases"]):
        if number and first_step >= step:
            break
        name = f"phases.{number}"
        if number == len(now["phases"]):
            refused.append(f"{name} is gone")
            break
        after, end = now["phases"][number], first_step + before["steps"]
        here = _changes(before["meaning"], after["meaning"])
        refused += [f"{change} (in {name})" for change in here]
        if end < step and after["steps"] != before["steps"]:
            refused.append(f"{name}.steps: {before['steps']} -> {after['steps']}, and it is over")
        elif first_step + after["steps"] < min(step, end):
            refused.append(
                f"{name}.steps: {before['steps']} -> {after['steps']}, and "
                f"{step - first_step} are done"
            )
        first_step = end
    told = _changes(_complete(saved["told"], now["told"]), _complete(now["told"], saved["told"]))
    return refused, f"goes on with other settings: {', '.join(told)}" if told else ""


def check_resume(path: Path, state: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A line on what differs from the run that wrote the checkpoint at `path`, or "".

    Raises:
        CheckpointError: it is another run.
    """
    if "fingerprint" not in state:
        return (
            f"checkpoint {path} does not say which model, data and settings it was trained with; "
            "it could not be compared with today's"
        )
    refused, told = compare(state["fingerprint"], json.loads(json.dumps(now)), state["step"])
    if state["dtype"] != now["dtype"]:
        refused.append(f"the weights' type: {state['dtype']} -> {now['dtype']}")
    if refused:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(refused)} changed. Undo the change, or set "
            "run.dir to a new folder, or begin anew in this one (checkpoint.resume=false: its "
            "checkpoints are then replaced). Layout, learning rate, number of steps and phases "
            "that have not begun may change"
        )
    return told


def use_of(setting: str) -> Use:
    """The entry of a setting (`policy.tp`) in SETTINGS, or of the nearest section around it."""
    while setting not in SETTINGS:
        setting, dot, _ = setting.rpartition(".")
        assert dot, setting
    return SETTINGS[setting]


def _meaning(config: Config, command: str) -> dict[str, Any]:
    """The settings whose change is refused."""
    settings = dict(_flat(config.model_dump(mode="json", exclude={"phases"})))
    settings.setdefault("reward.judge.model", None)
    return {k: v for k, v in settings.items() if use_of(k) in ("meaning", command)}


def _phase_meaning(phase: PhaseConfig, config: Config, command: str) -> dict[str, Any]:
    own = phase.model_dump(include={"max_input_tokens", "reference", "optimizer_state"})
    return own | _meaning(config, command)


def _by_number(phases: Sequence[PhaseConfig]) -> dict[str, Any]:
    return {str(k): p.model_dump(mode="json") for k, p in enumerate(phases)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in ("model.rope_scaling", "reward.custom"):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], *, show: bool = True) -> list[str]:
    names = [n for n in saved if n in now and saved[n] != now[n]]
    return [f"{n}: {saved[n]} -> {now[n]}" if show else n for n in names]


def _complete(told: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """With what only the other one says of phases: they may come and go."""
    return dict.fromkeys((n for n in other if n.startswith("phases.")), None) | dict(told)


def _config_digest(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in _IN_CONFIG_ALONE}
    return _digest(json.dumps(kept, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
