"""The model card: YAML that the hub reads, and the text below it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from megatron_qlrl.config.schema import MODEL_NAME, Config
from megatron_qlrl.config.shape import ModelShape, hf_shapes, read_json, read_shape
from megatron_qlrl.release.base import TAG
from megatron_qlrl.release.markdown import code, plain, table
from megatron_qlrl.release.record import Record, last_part
from megatron_qlrl.report.cost import run_cost
from megatron_qlrl.report.read import Evaluation

LONG_POSITIONS, MAX_STRETCH = 131_072, 4
"""How far the card says that YaRN could stretch a model, and by which factor at most."""
_HERE = "OWNER/NAME"
_RANKED = ("best evaluation", "last evaluation")
_TRAINED = {
    "sft": "warm-up SFT, the first stage of the QwenLong-L1 method",
    "rl": "reinforcement learning in phases of growing input length, after the QwenLong-L1 method",
}
_NO_RUN = "The run's folder was not at hand when this card was written, so it is not known here."


def model_card(record: Record, folder: Path) -> str:
    """Returns the card of the model in `folder`, of which only config.json is read."""
    shape = read_shape(folder, rope_scaling=None)
    dtype = str(read_json(folder / "config.json").get("dtype"))
    sections = {
        "Model": _model(record, shape, dtype),
        "How to use it": _usage(shape, dtype),
        "Evaluation": _evaluation(record),
        "Training data": _data(record),
        "Phases": _phases(record),
        "Reward": _reward(record),
        "Settings": _settings(record),
        "Hardware and cost": _cost(record),
        "Limits": "\n".join(f"- {line}" for line in _limits(record, shape)),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items() if body)
    return f"---\n{_front_matter(record).to_yaml()}\n---\n\n# {_heading(record)}\n\n{text}\n"


def _front_matter(record: Record) -> ModelCardData:
    evaluation, name = record.last_evaluation, _run_name(record)
    base = str(record.facts.get("base model", ""))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=plain(benchmark),
            dataset_name=plain(benchmark),
            metric_type="score",
            metric_name=plain(f"val/{benchmark}/score"),
            metric_value=round(mean, 4),
        )
        for benchmark, mean in (evaluation.means if evaluation else {}).items()
    ]
    named: dict[str, Any] = {"base_model": base} if re.fullmatch(MODEL_NAME, base) else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        **named,
        **record.facts.get("licence", {}),
        tags=["long-context", "reinforcement-learning", TAG],
        model_name=name,
        eval_results=results or None,
    )


def _run_name(record: Record) -> str:
    return plain(last_part(record.config.run.name) if record.config else "") or "qlrl"


def _heading(record: Record) -> str:
    trained = _TRAINED.get(record.command, "weights that were converted and not trained")
    return (
        f"{code(_run_name(record))}\n\nThis model comes from {trained} "
        "([arXiv 2505.17667](https://arxiv.org/abs/2505.17667)). `qlrl` wrote this card from the "
        "record of the run."
    )


def _model(record: Record, shape: ModelShape, dtype: str) -> str:
    licence: Mapping[str, str] = record.facts.get("licence", {})
    named = ", ".join(code(value) for value in licence.values())
    start = (
        "weights that an earlier run of megatron_qlrl had trained from the base model; data, "
        "settings and cost of that run are not on this card"
        if record.facts.get("from a release")
        else "the base model's weights"
    )
    if parent := record.facts.get("parent"):
        start = (
            f"a checkpoint of another run, {code(parent)}; data, settings and cost of that run are "
            "not on this card"
        )
    rows = [
        ("base model", code(record.facts.get("base model", "not known"))),
        ("this run started from", start),
        ("licence", f"{named}, as on the base model's card" if named else
         "not stated: the base model's folder has no card that names one. Look it up before you "
         "pass these weights on"),
        ("parameters", f"{sum(map(math.prod, hf_shapes(shape).values())):,} in {dtype}"),
        *(("experts", f"{e.num} in each layer, {e.per_token} for each token")
          for e in (shape.experts,) if e),
        ("positions", f"{shape.max_positions:,}"),
        ("steps done", f"{record.steps_done:,}"),
        *((name, record.facts[name]) for name in _RANKED if name in record.facts),
        ("software", code(record.facts.get("software", "not known"))),
    ]  # fmt: skip
    return table(("", ""), rows)


# --- how to use it -----------------------------------------------------------------------


def _usage(shape: ModelShape, dtype: str) -> str:
    serve = f"vllm serve {_HERE} --dtype {dtype} --max-model-len {shape.max_positions}"
    return (
        f"`{_HERE}` is this repository's name or the path of this folder.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{_HERE}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{_HERE}", dtype="auto")\n'
        'messages = [{"role": "user", "content": "A document, then a question about it."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")\n"
        "answer = model.generate(**inputs, max_new_tokens=1024)\n"
        'response = answer[0, inputs["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(response, skip_special_tokens=True))\n"
        "```\n\n"
        f"```bash\n{serve}\n```\n\n{_positions(shape)}"
    )


def _positions(shape: ModelShape) -> str:
    rope = shape.rope
    if rope["rope_type"] == "yarn":
        return (
            f"`config.json` stretches {rope['original_max_position_embeddings']:,} positions to "
            f"{shape.max_positions:,} by YaRN with factor {rope['factor']:g}. The model was "
            "trained so, and transformers and vLLM read it there: no further option is needed, and "
            "another factor is another model."
        )
    factor = LONG_POSITIONS / shape.max_positions
    if rope["rope_type"] != "default" or not 1 < factor <= MAX_STRETCH:
        return ""
    fields = {
        "max_position_embeddings": LONG_POSITIONS,
        "rope_parameters": {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": shape.max_positions,
        },
    }
    return (
        f"The model was trained without RoPE scaling. YaRN can stretch it to {LONG_POSITIONS:,} "
        "positions, which this run did not measure: add these fields to `config.json` for "
        "transformers, or give them to vLLM.\n\n"
        f"```bash\nvllm serve {_HERE} --max-model-len {LONG_POSITIONS} "
        f"--hf-overrides '{json.dumps(fields)}'\n```"
    )


# --- evaluation --------------------------------------------------------------------------


def _evaluation(record: Record) -> str:
    if record.run is None:
        return _NO_RUN
    if not record.evaluations:
        return "This run evaluated nothing."
    names = list(dict.fromkeys(name for _, e in record.evaluations for name in e.means))
    head = ["benchmark", "questions", *(code(e.name) for _, e in record.evaluations)]
    rows = [
        [code(f"val/{name}/score"), _questions(record, name)]
        + [_score(e, name) for _, e in record.evaluations]
        for name in names
    ]
    settings = record.config.evaluation if record.config else None
    how = "" if settings is None or record.config is None else (
        f" Answers were sampled with temperature {settings.temperature:g} and top-p "
        f"{settings.top_p:g}, {settings.samples} for each question, at most "
        f"{record.config.rollout.max_response_tokens:,} tokens long; the text of a prompt beyond "
        f"{settings.max_input_tokens:,} tokens lost its middle. They were scored as in training "
        "(see Reward)."
    )  # fmt: skip
    return (
        f"{table(head, rows)}\n\nScore in [0, 1] ± standard error over questions, before training "
        "(`start`) and at the ends of phases. A value without ± has no known error."
        f"{how}"
    )


def _questions(record: Record, benchmark: str) -> str:
    scores = [e.scores.scores for _, e in record.evaluations if e.scores]
    known = [str(len(by_name[benchmark])) for by_name in scores if benchmark in by_name]
    return known[-1] if known else "not known"


def _score(evaluation: Evaluation, benchmark: str) -> str:
    if benchmark not in evaluation.means:
        return ""
    error = evaluation.standard_error(benchmark)
    mean = f"{evaluation.means[benchmark]:.4f}"
    return mean if math.isnan(error) else f"{mean} ± {error:.4f}"


# --- training ----------------------------------------------------------------------------


def _data(record: Record) -> str:
    if record.command == "import":
        return ""
    if record.config is None:
        return _NO_RUN
    rows = [
        (code(f.name), "not at hand" if f.rows is None else f"{f.rows:,}", code(f.sha256 or "-"))
        for f in record.data_files
    ]
    return (
        f"{table(('file', 'rows', 'sha256'), rows)}\n\nThe files as they were when this card was "
        "written. Rows beyond a phase's limit of length were not trained on."
    )


def _phases(record: Record) -> str:
    if record.command != "rl":
        return ""
    if record.config is None:
        return code(record.facts.get("phases", "not known"))
    rows, end = [], 0
    for phase in record.config.phases:
        done = max(min(record.steps_done - end, phase.steps), 0)
        own = phase.overrides or "none"
        rows.append(
            (code(phase.name), f"{phase.max_input_tokens:,}", f"{done} of {phase.steps}",
             code(json.dumps(own) if phase.overrides else own), phase.reference,
             phase.optimizer_state)
        )  # fmt: skip
        end += phase.steps
    head = ("phase", "longest prompt (tokens)", "steps", "own settings", "reference", "optimizer")
    return table(head, rows)


def _reward(record: Record) -> str:
    if record.command == "import":
        return ""
    if record.config is None:
        return _NO_RUN
    judge = record.config.reward.judge
    rule = "the rule of a row's data source, which compares the final answer with the gold"
    if own := record.config.reward.custom:
        functions = ", ".join(code(name) for name in dict.fromkeys(own.values()))
        rule = f"{rule}, or a function of the run's authors ({functions})"
    if judge is None:
        how = f"The reward is that of {rule}: from 0 to 1. No LLM judge was asked."
    else:
        name = last_part(judge.model) if judge.model[:1] in "/.~" else judge.model
        how = (
            f"The reward is max(rule, judge), from 0 to 1: {rule}, and, where the rule gives 0, "
            f"the LLM judge {code(name)}. {_certified(record)}"
        )
    return how if record.command == "rl" else f"SFT has no reward; evaluations are scored. {how}"


def _certified(record: Record) -> str:
    certificate = record.run.certificate if record.run else None
    if certificate is None:
        return "How well this judge judges was not measured."
    judge = record.config.reward.judge if record.config else None
    bound = judge.max_false_positive if judge else None
    demanded = "" if bound is None else f" The run demanded false positives of at most {bound:.1%}."
    return (
        "On labelled pairs of answers (`qlrl judge certify`) the judge had "
        f"{plain(certificate.summary())}.{demanded}"
    )


def _settings(record: Record) -> str:
    if record.command == "import":
        return ""
    if record.config is None:
        return f"Seed {code(record.facts.get('seed', 'not known'))}. {_NO_RUN}"
    rows = [(code(n), code(json.dumps(v))) for n, v in record.settings.items()]
    return (
        f"{table(('setting', 'value'), rows)}\n\nWhat differs from the defaults of the version "
        "named above; paths, addresses and logging are left out."
    )


def _cost(record: Record) -> str:
    if record.command == "import":
        return ""
    if record.run is None:
        return _NO_RUN
    cost = run_cost(record.run)
    last = record.run.starts[-1] if record.run.starts else {}
    packages = [f"{n} {last[n]}" for n in ("torch", "vllm", "megatron-core") if n in last]
    rows = [
        ("device", code(last.get("device", "not known"))),
        ("processes, one for each device", f"{cost['processes']:g}"),
        (f"{cost['unit']} hours", f"{cost['hours']:.3g}"),
        ("hours of the steps, evaluations and saves", f"{cost['seconds'] / 3600:.3g}"),
        ("tokens, prompts included", f"{cost['tokens']:,.0f}"),
        ("starts of the run", str(len(record.run.starts))),
        ("packages", code(", ".join(packages) or "not known")),
    ]
    return f"{table(('', ''), rows)}\n\nThis run alone. Starting it is not counted."


def _limits(record: Record, shape: ModelShape) -> Iterator[str]:
    if record.last_evaluation is None:
        yield "These very weights were not evaluated."
    elif record.config is not None:
        yield (
            "Only the benchmarks above were measured, on prompts of at most "
            f"{record.config.evaluation.max_input_tokens:,} tokens. Other tasks, other languages, "
            "safety, bias and memorised data were not."
        )
    yield from _limits_of_length(record.config, shape, record.command)
    if record.command == "rl":
        yield (
            "The reward looks at the final answer alone: that the reasoning before it is true or "
            "complete was neither trained nor measured."
        )
    yield "It is one run with one seed; how much another seed would differ was not measured."


def _limits_of_length(config: Config | None, shape: ModelShape, command: str) -> Iterator[str]:
    longest = config.max_input_tokens if config and command == "rl" else 0
    if 0 < longest < shape.max_positions:
        yield (
            f"Prompts of training had at most {longest:,} tokens; the model takes up to "
            f"{shape.max_positions:,} positions."
        )
