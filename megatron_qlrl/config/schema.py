"""Every setting, its default and its meaning: closed (unknown keys are errors) and frozen.

Importable without torch: the command line reads configs before anything heavy is loaded.
A check that needs only the config lives here; a check that needs the model's shape lives in
`megatron_qlrl.config.checks`.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

FILE_NAME = re.compile(r"(?!\.{1,2}$)[\w.-]{1,100}")
"""A name that becomes a part of a path: letters, digits, `.`, `_` and `-`, but not . or ..
alone."""

# YAML reads a bare `off` as false.
YamlOff = BeforeValidator(lambda value: "off" if value is False else value)


TEMPLATE_TOKENS = 1024
"""How many tokens a chat template and a system message may add to an evaluation prompt, whose text
alone evaluation.max_input_tokens limits."""

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"
"""A model's name on the Hugging Face hub, with or without its owner."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(Section):
    """The run's identity and its folder."""

    name: str = "qlrl"
    """Name of the run; also the tracker's run name."""
    dir: str = "runs/qlrl"
    """Folder for checkpoints, logs, rollouts and the resolved config."""
    seed: int = Field(default=0, ge=0)
    """Seeds data order and every sampled token (with step, prompt and sample index)."""
    parent: str | None = None
    """The run that a new run of `qlrl rl` starts from: the folder RUN of a `qlrl rl` or `qlrl sft`,
    or RUN:STEP for another checkpoint than the newest. At its first start the new run takes over
    weights, optimizer state and statistics of prompts. The same as `--from`."""
    hang_after_s: float = Field(default=3600, gt=0)
    """A step that takes longer than this, and than ten times the longest before it, is taken for
    hung: every rank writes its stacks to <run.dir>/stacks and ends."""


class ModelConfig(Section):
    """The model that training starts from."""

    path: str
    """Hugging Face folder (config.json, safetensors, tokenizer) that training starts from."""
    name: Annotated[str, Field(pattern=f"^{MODEL_NAME}$")] | None = None
    """The base model's name on the model card of a release (Qwen/Qwen3-4B). None: where `path` is a
    release of another run, the base on its card; else the name of the repository or folder."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of weights and activations in training and engine; the optimizer keeps float32 weights
    beside bfloat16 ones. None: bfloat16 with a GPU, float32 without one. CPUs with avx512_bf16 or
    amx_bf16 multiply bfloat16 several times faster, others slower."""
    rope_scaling: dict[str, Any] | None = None
    """Replaces the model's RoPE scaling (default, linear, yarn, llama3, longrope) in training,
    engine and release: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}
    extends a model of 32,768 positions to 131,072."""


class DataConfig(Section):
    """The files with prompts; see docs/data-format.md."""

    train_files: tuple[str, ...] = ()
    """RL prompts: verl-format parquet files."""
    eval_files: tuple[str, ...] = ()
    """Held-out prompts. Each file is one benchmark, named by the file's stem."""
    sft_files: tuple[str, ...] = ()
    """SFT rows: the same parquet with a `response` column."""
    enable_thinking: bool | None = None
    """Passed to chat templates that read it (Qwen3); None does not pass it."""


class PhaseConfig(Section):
    """One curriculum phase: prompts of a range of lengths, for a number of steps."""

    name: str
    """Appears in logs and checkpoints and names the file of the phase's evaluation, so it consists
    of letters, digits, `.`, `_` and `-`."""
    max_input_tokens: int = Field(gt=0)
    """L_k: the phase trains on prompts with L_{k-1} < tokens <= L_k."""
    steps: int = Field(gt=0)
    """Optimizer steps (rollout batches) of the phase."""
    overrides: dict[str, dict[str, Any]] = {}
    """Settings that differ in this phase, by section: {policy: {cp: 2, max_tokens_per_row: 72000},
    optimizer: {lr: 1.0e-6}}. Sections: policy, rollout, algorithm, optimizer, curriculum and
    stability; policy.distributed_optimizer and optimizer.warmup_steps cannot differ."""
    reference: Literal["keep", "renew"] = "keep"
    """The reference policy of the phase. keep: that of the phase before (in the first phase: the
    weights that the run starts from). renew: the weights at the phase's start."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """What happens to Adam's moments at the phase's start; those of the first phase come from
    run.parent, if there is one."""

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if not FILE_NAME.fullmatch(name) or re.fullmatch(r"start|step_\d+", name):
            raise ValueError(
                f"phases: the name {name!r} cannot be a file name in <run.dir>/eval; use letters, "
                "digits, '.', '_' and '-', at most 100 of them ('start' and 'step_<n>' are taken)"
            )
        return name

    @field_validator("overrides")
    @classmethod
    def _allowed(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        wrong = sorted(overrides.keys() - set(OVERRIDABLE))
        if wrong:
            raise ValueError(
                f"phases: overrides cannot change {', '.join(wrong)}; a phase may change settings "
                f"of {', '.join(OVERRIDABLE)}"
            )
        for name, reason in FIXED.items():
            section, _, key = name.partition(".")
            # What is no section at all is refused with the phase's whole config.
            if isinstance(settings := overrides.get(section), dict) and key in settings:
                raise ValueError(
                    f"phases: {name} is the same in all phases ({reason}); set it for the whole run"
                )
        return overrides


FIXED = {
    "policy.distributed_optimizer": "the two kinds cannot read each other's checkpoints",
    "optimizer.warmup_steps": "the warm-up counts from the run's first step",
    "curriculum.tasks": "the pools of all phases are divided by them",
}
"""Settings of overridable sections that no phase may change, and why."""
OVERRIDABLE = ("policy", "rollout", "algorithm", "optimizer", "curriculum", "stability")


class CurriculumConfig(Section):
    """How prompts are drawn: in which shares of tasks, and which of earlier phases once more
    (retrospective sampling)."""

    tasks: dict[
        Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ] = {}
    """Task-balanced sampling, {name: share}. A prompt's task is the longest name that is a part of
    its data_source, in any case; the name * takes all others. Each task gets its share of the
    prompts drawn ({docmath: 1, qa: 1} gives equal shares), however many prompts it has; a task that
    runs out is shuffled again. Without tasks, prompts are drawn in the proportions of the data."""
    carried_share: float = Field(default=0.0, ge=0, lt=1)
    """The largest share of a batch's prompts that may come from earlier phases."""
    carry: Literal["seen", "unsolved"] = "seen"
    """Which prompts may be carried. seen: every prompt drawn before. unsolved: only prompts whose
    newest group had no reward above reward.solved_above (the paper's practice, with 0)."""
    difficulty_eps: float = Field(default=0.01, gt=0)
    """Keeps the weight of a prompt that was never solved finite; see max_difficulty."""
    max_difficulty: float = Field(default=16.0, gt=0)
    """The largest weight. A carried prompt is drawn with a probability proportional to
    min(1 / (mean reward + difficulty_eps), max_difficulty)."""


class RolloutConfig(Section):
    """What is generated in a step, and the engine that generates it."""

    prompts_per_step: int = Field(default=128, gt=0)
    """Prompts of one training batch."""
    group_size: int = Field(default=8, gt=0)
    """G: responses sampled for each prompt."""
    max_response_tokens: int = Field(default=10_000, gt=0)
    """Longer responses are cut here and count as unfinished."""
    tokens_per_round: int | None = Field(default=None, gt=0)
    """Partial rollouts: a response gets at most this many tokens in a step; one that needs more
    waits with its group and goes on in the next step, with the new weights
    (docs/method.md#partial-rollouts). Needs algorithm.max_staleness. None: every response ends in
    its step."""
    temperature: float = Field(default=0.7, gt=0)
    """Sampling temperature. It is a part of the policy: log-probs are taken at it, too."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling during rollout."""
    tp: int = Field(default=1, gt=0)
    """Tensor parallel size of the engine; independent of policy.tp."""
    gpu_memory_utilization: float = Field(default=0.6, gt=0, lt=1)
    """Share of a GPU the engine may use while it is awake (GPU only)."""
    enforce_eager: bool = False
    """Generate without torch.compile and CUDA graphs: starts sooner, and generates more slowly (GPU
    only; the CPU engine has neither)."""
    cpu_kv_cache_gib: int = Field(default=1, gt=0)
    """Size of the key/value cache of the CPU engine, in GiB (CPU only)."""
    sync_bucket_mib: int = Field(default=512, gt=0)
    """Weights are gathered for the engine in buckets of at most this size; a larger tensor is a
    bucket of its own."""
    check_sync: bool = True
    """After each weight sync, compare the engines' log-probs of a short fixed prompt with the
    trainer's, and stop if they differ by more than rounding."""


class AlgorithmConfig(Section):
    """The loss, and which groups reach it."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Group-relative advantage: (r - mean) / (std + 1e-6), r - mean, or leave-one-out."""
    advantage_std: Literal["group", "batch", "task"] = "group"
    """The rewards whose standard deviation grpo divides by: the group's, all of the training batch
    (batch), or those of the group's task in that batch (task; QwenLong-L1.5). The mean is always
    the group's. Without curriculum.tasks each data_source is a task."""
    aggregation: Literal["token_mean", "sequence_mean", "group_mean", "constant"] = "token_mean"
    """How token losses are averaged. token_mean: over all tokens of the optimizer batch (DAPO).
    sequence_mean: over each response, then over responses (GRPO). group_mean: over all tokens of a
    group, then over groups (QwenLong-L1.5). constant: their sum over a response is divided by
    rollout.max_response_tokens, then averaged over responses (Dr. GRPO). sequence_mean and constant
    count empty responses (verl leaves them out of its mean over responses)."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(default=0.28, ge=0)
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Lower bound c of the objective for negative advantages, c * A (dual-clip PPO)."""
    rollout_is_threshold: float | None = Field(default=None, ge=1)
    """Truncated importance sampling: each token's objective is multiplied by its probability in the
    trainer over that in the engine, both before top-p, at most by this number (2.0 is usual). It
    corrects for a trainer and an engine of different precision (FP8 and bfloat16). None: no
    correction."""
    rollout_rs: Literal["geometric"] | None = None
    """Masks whole responses. geometric: a response has no loss if the geometric mean of its tokens'
    probability in the trainer over that in the engine is outside rollout_rs_band. The other
    responses keep their weights. None: no response is masked."""
    rollout_rs_band: tuple[float, float] = (0.99, 1.01)
    """Smallest and largest mean that rollout_rs keeps."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL term to the reference policy in the loss. The KL is logged at 0,
    too."""
    kl_kind: Literal["k1", "k3"] = "k3"
    """KL estimator: k1 = log p - log p_ref, or k3 = exp(-k1) - 1 + k1, cut at 10 for each token as
    in verl. In the loss use k3: the on-policy gradient of k1 has mean zero."""
    reference: bool = True
    """Keep the starting weights as reference policy; costs one more forward pass a step."""
    reference_every: int = Field(default=1, gt=0)
    """Compute the reference's log-probs, and the KL that is logged, every so many steps. Above 1
    needs kl_coef=0."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy bonus."""
    entropy_band: tuple[float, float] | None = None
    """Entropy control (AEPO, QwenLong-L1.5), [low, high] in nats. When actor/response_entropy of an
    update is above high, responses with a negative advantage get advantage 0 in the next updates,
    until it is below low. What the loss is divided by does not change. None: no response is
    masked."""
    filter_groups: bool = True
    """Leave out groups whose rewards have no spread: they carry no gradient."""
    generation_rounds: int = Field(default=1, gt=0)
    """DAPO's dynamic sampling: the most rounds of generation in a step. After the first round, each
    replaces the groups that filter_groups left out by groups of new prompts. 1: none is
    replaced."""
    oversampling: float = Field(default=1.0, ge=1)
    """Prompts drawn in a round for each group that the batch still lacks."""
    incomplete_batch: Literal["train", "skip"] = "train"
    """What a step does whose rounds (when above 1) or prompts are used up before the batch is full:
    train on the groups it has, or skip the update."""
    max_staleness: int = Field(default=0, ge=0)
    """The most optimizer updates that a token may be old when it is trained on. A group that a full
    batch did not need waits that long before it is dropped (0 drops it at once); such groups arise
    only with oversampling above 1, with rollout.tokens_per_round, or where incomplete batches are
    skipped. A group whose responses go on (rollout.tokens_per_round) is never dropped for its age:
    they end, without a budget, in the last step in which they can be trained on."""
    overlong_buffer_tokens: int | None = Field(default=None, gt=0)
    """Overlong shaping (DAPO): the reward that enters the advantages falls linearly by 1 over this
    many tokens before rollout.max_response_tokens. None: no shaping."""
    updates_per_step: int = Field(default=1, gt=0)
    """Optimizer updates on one rollout batch, each on a mini-batch of whole groups."""


class PolicyConfig(Section):
    """How the trained model is laid out over ranks and computed."""

    tp: int = Field(default=1, gt=0)
    """Tensor parallel size of training."""
    pp: int = Field(default=1, gt=0)
    """Pipeline parallel size."""
    cp: int = Field(default=1, gt=0)
    """Context parallel size."""
    ep: int = Field(default=1, gt=0)
    """Expert parallel size of a model with experts: the ranks of a pipeline stage that divide the
    experts of a layer among themselves. These ranks are tensor, then context, then data parallel
    neighbours. Beyond tp x cp, ranks with different rows wait for each other in every layer."""
    sequence_parallel: bool = True
    """Shard the norms' activations over tp; has no effect at tp 1."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data and context parallel ranks in buckets, each as soon as the backward
    pass of the last row has filled it, and not after that pass. The weights are gathered after an
    update without overlap, because an engine usually reads them next."""
    max_tokens_per_row: int = Field(default=72_000, gt=0)
    """The most tokens of a packed row, which is one micro-batch. A prompt with one response must
    fit."""
    share_prompts: bool = True
    """Compute a prompt once for all its responses in a row."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, the MLP of each layer (selective), or whole layers (full)."""
    offload_activations: bool = False
    """Keep the layer inputs that recompute=full saves in (pinned) host memory."""
    deterministic: bool = False
    """Take deterministic kernels on a GPU, so that the same run computes the same bits again (see
    docs/running.md for what was seen). The backward pass of attention gets slower and larger.
    Without a GPU every run does."""
    fp8: Annotated[Literal["off", "e4m3", "hybrid"], YamlOff] = "off"
    """FP8 format of the linear layers (Transformer Engine, GPU only). e4m3: for all tensors; suits
    recipes with a scale for each block (blockwise, mxfp8). hybrid: gradients in e5m2, which is
    wider and coarser; suits one scale for a tensor (tensorwise, delayed)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "blockwise"
    """Transformer Engine's scaling recipe (GPU only). blockwise needs Hopper and CUDA 12.9; mxfp8
    needs Blackwell. With delayed, checkpoints contain a pickle, which can run any code when it is
    read: the run then starts only with NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 in the environment,
    and should resume from your own checkpoints only."""

    @property
    def fp8_block(self) -> int:
        """The sizes of an FP8 product must be multiples of this (1 without FP8): the tensor cores
        ask for 16, and a recipe that scales blocks for whole blocks."""
        blocks = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
        return 1 if self.fp8 == "off" else blocks[self.fp8_recipe]

    @property
    def tokens_multiple(self) -> int:
        """A rank's tokens of a row are padded to a multiple of this, so that sequence parallel
        shards are equal and each is a whole number of FP8 blocks."""
        return (self.tp if self.sequence_parallel else 1) * self.fp8_block


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(default=2e-6, gt=0)
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer updates over which the learning rate rises linearly to lr."""
    min_lr_ratio: float = Field(default=1.0, ge=0, le=1)
    """After the warm-up the learning rate falls linearly to lr * min_lr_ratio at the last update; 1
    keeps it constant."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip_grad: float = Field(default=1.0, gt=0)
    """A larger global gradient norm is scaled down to this."""
    offload: bool = False
    """Keep Adam's moments and the float32 weights in host memory except while the optimizer steps
    (GPU only; needs model.dtype=bfloat16)."""


class SFTConfig(Section):
    """Warm-up SFT (`qlrl sft`)."""

    batch_size: int = Field(default=128, gt=0)
    """Examples per optimizer step."""
    epochs: int = Field(default=3, gt=0)
    """Passes over the examples."""
    max_steps: int | None = Field(default=None, gt=0)
    """The most optimizer steps; None: as many as the epochs take."""
    aggregation: Literal["token_mean", "sequence_mean"] = "sequence_mean"
    """How the loss is averaged: over each example, then over examples (the method's warm-up), or
    over all response tokens of the batch."""


JUDGE_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
"""The judge in the paper, about 3 GB in bfloat16."""


class EndpointConfig(Section):
    """An OpenAI-compatible service of one or more servers."""

    urls: tuple[str, ...] = Field(min_length=1)
    """Base URLs of the servers (http://host:8000/v1); they share the load."""
    model: str
    """Name under which the servers offer the model."""
    api_key_env: str | None = None
    """NAME of the environment variable with the key. The key itself never stands in a config."""
    concurrency: int = Field(default=64, gt=0)
    """The most requests in flight."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Time limit of one request."""
    attempts: int = Field(default=4, gt=0)
    """Attempts before a request counts as failed; random, growing pauses lie between them."""
    cooldown_s: float = Field(default=10.0, gt=0)
    """How long a server that failed gets no request while others answer."""

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not name.isidentifier():
            # Not repeated here: it may be the key itself.
            raise ValueError(
                "api_key_env takes the NAME of an environment variable (letters, "
                "digits, _), never the key"
            )
        return name

    @field_validator("urls")
    @classmethod
    def _plain(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"urls: '{url}' is not of the form http://host:8000/v1")
            if parts.username or parts.password or parts.query:
                # Not repeated here: it may hold a key.
                raise ValueError(
                    f"urls: the URL of {parts.hostname} carries a user, password or "
                    "query; put the key into an environment variable and its name into "
                    "api_key_env"
                )
        return tuple(url.rstrip("/") for url in urls)


class JudgeConfig(EndpointConfig):
    """The LLM judge. `concurrency` holds for each rollout engine. A sample whose request failed is
    masked out of loss and statistics."""

    model: str = JUDGE_MODEL
    """Name under which the servers offer the model."""
    max_tokens: int = Field(default=32, gt=0)
    """The longest reply; a verdict takes about 10 tokens."""
    certificate: str | None = None
    """File that `qlrl judge certify` wrote about this judge. A run refuses it if it is of another
    model, prompt or set of pairs; the run's report and model card show it."""
    max_false_positive: float | None = Field(default=None, ge=0, le=1)
    """The largest share of different answers that the judge may call equivalent on the labelled
    pairs. A run without a `certificate` that says so does not start. None: nothing is demanded."""


class TeacherConfig(EndpointConfig):
    """The service that `qlrl distill`, or `qlrl eval` of another model, asks for answers."""

    timeout_s: float = Field(default=1800.0, gt=0)
    """Time limit of one request, which has a long document and a long reasoning."""


class DistillConfig(Section):
    """A teacher's answers as SFT rows (`qlrl distill`)."""

    teacher: TeacherConfig | None = None
    """The service that answers the prompts of data.train_files."""
    samples: int = Field(default=4, gt=0)
    """Answers that the teacher gives to each prompt; every correct one is kept."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature of the teacher."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling of the teacher."""
    max_response_tokens: int = Field(default=10_000, gt=0)
    """The longest answer in the teacher's tokens; answers that were cut there are dropped."""
    max_tokens: int = Field(default=20_000, gt=0)
    """The longest example, prompt and answer in the student's tokens; longer ones are dropped (the
    paper: 20K)."""


FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
"""The name of a Python function, package.module:function."""


class RewardConfig(Section):
    """The reward max(rule, judge); see docs/rewards.md."""

    custom: dict[
        Annotated[str, Field(min_length=1)], Annotated[str, Field(pattern=f"^{FUNCTION}$")]
    ] = {}
    """Own rewards in place of the rules, {name: package.module:function}: the first name that is a
    part of data_source, in any case, counts, before those of the rules; * is a part of all. See
    docs/own-rewards.md."""
    custom_judged: bool = False
    """Ask the judge, too, where an own reward gives 0: the reward is max(own reward, judge)."""
    custom_timeout_s: float = Field(default=10.0, gt=0)
    """Time limit of one call of an own reward; after it the response has no verdict."""
    custom_workers: int = Field(default=2, gt=0)
    """Processes of each rollout engine that call own rewards."""
    judge: JudgeConfig | None = None
    """The LLM judge, which is asked where the rule gives 0. None: the rules alone."""
    max_masked_share: float = Field(default=0.1, ge=0, le=1)
    """A batch in which a larger share of the responses got no verdict, of the judge or of an own
    reward, stops the run with a checkpoint: the others are a biased choice."""
    solved_above: float = Field(default=0.0, ge=0, lt=1)
    """A response is right, and its prompt solved, when its reward is above this. Counted in
    curriculum/<new or carried>/solved; decides what carry=unsolved carries and which answers `qlrl
    distill` keeps. Raise it where rewards are dense: with 0.5, a reward of 0.3 is no solution."""


Action = Literal["ignore", "warn", "skip", "stop", "roll_back"]


class StabilityConfig(Section):
    """Rules that watch the metrics before every optimizer update, and what each does when it fires:
    warn; skip the update; stop the run with a checkpoint; or roll back, which skips the update,
    loads weights and optimizer from the newest good checkpoint, and goes on with the next
    prompts."""

    non_finite: Literal["skip", "stop", "roll_back"] = "skip"
    """Fires when the loss or the gradient norm is NaN or infinite."""
    entropy_floor: Action = "warn"
    """Fires when actor/entropy is below entropy_floor_nats."""
    entropy_floor_nats: float = Field(default=0.01, ge=0)
    """Threshold of entropy_floor."""
    kl_spike: Action = "warn"
    """Fires when actor/kl_loss is above kl_spike_min and above kl_spike_factor times its recent
    median."""
    kl_spike_factor: float = Field(default=10.0, gt=1)
    """Relative threshold of kl_spike."""
    kl_spike_min: float = Field(default=0.1, ge=0)
    """Absolute threshold of kl_spike."""
    gradient_spike: Action = "warn"
    """Fires when actor/grad_norm is above gradient_spike_factor times its recent median."""
    gradient_spike_factor: float = Field(default=10.0, gt=1)
    """Threshold of gradient_spike."""
    reward_collapse: Action = "warn"
    """Fires when critic/rewards/mean is below reward_collapse_factor times its recent median."""
    reward_collapse_factor: float = Field(default=0.25, gt=0, lt=1)
    """Threshold of reward_collapse."""
    window: int = Field(default=10, gt=0)
    """How many values of the same phase make a recent median; with fewer, nothing is compared."""
    max_skips: int = Field(default=3, ge=0)
    """The run stops when more updates in a row than this were skipped: the weights themselves may
    be broken."""
    max_roll_backs: int = Field(default=2, ge=0)
    """The most roll-backs of a run; the next one stops it instead."""


class CheckpointConfig(Section):
    """When the run saves, and how much it keeps."""

    every_steps: int = Field(default=50, gt=0)
    """Save after every n-th step, and always after the last step of a phase."""
    keep: int = Field(default=2, gt=0)
    """How many checkpoints stay on disk, the newest ones."""
    keep_best: bool = False
    """Also save after each evaluation that is the best so far by val/score (the newer one of equal
    ones), and keep that checkpoint beside the newest ones until a better one is saved."""
    release: Literal["last", "best"] = "last"
    """Which weights <run.dir>/hf has at the end; best needs keep_best. The card names both."""
    resume: bool = True
    """Continue from the newest checkpoint in run.dir whose checksums hold."""


class EvaluationConfig(Section):
    """When data.eval_files are evaluated, and how their answers are sampled."""

    before_training: bool = False
    """Evaluate the starting weights, too, when a run starts from the beginning."""
    at_phase_end: bool = True
    """Evaluate data.eval_files after each phase (and after SFT)."""
    every_steps: int | None = Field(default=None, gt=0)
    """Evaluate after every n-th step, too. None: only as the two settings above say."""
    patience: int | None = Field(default=None, gt=0)
    """End the run after so many evaluations in a row without a new best val/score. None: never."""
    temperature: float = Field(default=0.7, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling."""
    samples: int = Field(default=1, gt=0)
    """Responses to each prompt; the score is their mean."""
    max_input_tokens: int = Field(default=120_000, gt=0)
    """Longer text of the user loses its middle, before the chat template is applied."""
    endpoint: TeacherConfig | None = None
    """`qlrl eval` scores the model of this service in place of model.path, of which it loads only
    the tokenizer. Evaluations of a training run do not use it."""


class LoggingConfig(Section):
    """Where metrics and rollouts go beside metrics.jsonl."""

    tensorboard: bool = False
    """Write <run.dir>/tensorboard, too."""
    wandb: Annotated[Literal["off", "offline", "online"], YamlOff] = "off"
    """Log to Weights & Biases; offline writes <run.dir>/wandb, for `wandb sync` later."""
    project: str = "megatron_qlrl"
    """wandb project."""
    rollouts_per_step: int = Field(default=8, ge=0)
    """Groups of a step that the rollout log (JSONL) gets; 0 writes none."""


class Config(Section):
    """The whole configuration: a section for each part of a run."""

    model: ModelConfig
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    phases: tuple[PhaseConfig, ...] = ()
    curriculum: CurriculumConfig = CurriculumConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sft: SFTConfig = SFTConfig()
    distill: DistillConfig = DistillConfig()
    reward: RewardConfig = RewardConfig()
    stability: StabilityConfig = StabilityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def max_input_tokens(self) -> int:
        """The longest prompt of any phase; 0 without phases."""
        return max((p.max_input_tokens for p in self.phases), default=0)

    @property
    def longest_generation(self) -> int:
        """The most tokens, prompt and response together, that the engine must hold."""
        longest = self.max_input_tokens
        if self.data.eval_files or not longest:
            longest = max(longest, self.evaluation.max_input_tokens + TEMPLATE_TOKENS)
        return longest + self.rollout.max_response_tokens

    @property
    def total_rl_steps(self) -> int:
        return sum(p.steps for p in self.phases)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        limits = [p.max_input_tokens for p in self.phases]
        if limits != sorted(set(limits)):
            raise ValueError(
                f"phases: max_input_tokens must grow from phase to phase, got {limits}"
            )
        self._check_best()
        names = [p.name for p in self.phases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"phases: every phase needs a name of its own; twice: {twice}")
        if not any(p.overrides for p in self.phases):
            self._check_sizes()  # else each phase's own config is checked: `for_phase`
        return self

    def for_phase(self, index: int) -> "Config":
        """The config of phase `index`: its overrides applied, later phases left out.

        Raises:
            ValidationError: the overrides are not settings, or do not fit the phase.
        """
        tree = self.model_dump()
        for section, settings in tree["phases"][index]["overrides"].items():
            tree[section] |= settings
        tree["phases"] = [p | {"overrides": {}} for p in tree["phases"][: index + 1]]
        return Config.model_validate(tree)

    def phase_configs(self) -> "list[Config]":
        """The config of every phase, or the config itself when there are none."""
        return [self.for_phase(k) for k in range(len(self.phases))] or [self]

    def _check_waiting(self) -> None:
        """Refuses a max_staleness that can never have a group to keep, or that no group with a
        response that goes on can keep to."""
        settings, tokens = self.algorithm, self.rollout.tokens_per_round
        if tokens is not None and settings.max_staleness < settings.updates_per_step:
            raise ValueError(
                f"rollout.tokens_per_round={tokens} needs algorithm.max_staleness of at least "
                f"algorithm.updates_per_step={settings.updates_per_step}, but it is "
                f"{settings.max_staleness}: a response that waits for the next step gets that many "
                f"updates old. Set algorithm.max_staleness to {4 * settings.updates_per_step} for "
                "at most four steps of waiting, or leave tokens_per_round out"
            )
        skips = settings.incomplete_batch == "skip" and settings.generation_rounds > 1
        waits = skips or settings.oversampling > 1 or tokens is not None
        if settings.max_staleness and not waits:
            raise ValueError(
                f"algorithm.max_staleness={settings.max_staleness} has no effect: no groups are "
                "left over from a batch. Set algorithm.oversampling above 1, "
                "rollout.tokens_per_round, or algorithm.incomplete_batch=skip with "
                "algorithm.generation_rounds above 1; or leave max_staleness at 0"
            )

    def _check_best(self) -> None:
        """Refuses to look for a best step that nothing can find."""
        wanted = {
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "evaluation.patience": self.evaluation.patience is not None,
        }
        for setting in (name for name, is_set in wanted.items() if is_set):
            if not self.data.eval_files:
                raise ValueError(f"{setting} needs held-out scores; set data.eval_files")
        if self.checkpoint.release == "best" and not self.checkpoint.keep_best:
            raise ValueError("checkpoint.release=best needs checkpoint.keep_best=true")

    def _check_sizes(self) -> None:
        if self.rollout.prompts_per_step % self.algorithm.updates_per_step:
            raise ValueError(
                f"algorithm.updates_per_step={self.algorithm.updates_per_step} must divide "
                f"rollout.prompts_per_step={self.rollout.prompts_per_step}"
            )
        if self.policy.offload_activations and self.policy.recompute != "full":
            raise ValueError(
                "policy.offload_activations=true needs policy.recompute=full: otherwise layers "
                "keep far more than their inputs"
            )
        if self.optimizer.offload and self.model.dtype == "float32":
            raise ValueError(
                "optimizer.offload=true needs model.dtype=bfloat16: in float32 the optimizer's "
                "weights are the model's own, which cannot leave the device"
            )
        if self.algorithm.kl_coef > 0 and not self.algorithm.reference:
            raise ValueError("algorithm.kl_coef > 0 needs algorithm.reference=true")
        low, high = self.algorithm.rollout_rs_band
        if not 0 < low <= 1 <= high:
            raise ValueError(
                f"algorithm.rollout_rs_band=[{low:g}, {high:g}] must hold 1, the mean of a trainer "
                "and an engine that agree, and begin above 0"
            )
        if self.algorithm.advantage_std != "group" and self.algorithm.advantage != "grpo":
            raise ValueError(
                f"algorithm.advantage_std={self.algorithm.advantage_std} needs "
                f"algorithm.advantage=grpo: {self.algorithm.advantage} divides by no deviation"
            )
        if self.algorithm.entropy_band is not None:
            low, high = self.algorithm.entropy_band
            if not 0 < low <= high:
                raise ValueError(
                    f"algorithm.entropy_band=[{low:g}, {high:g}] must be [low, high] with "
                    "0 < low <= high"
                )
        if self.algorithm.kl_coef > 0 and self.algorithm.reference_every > 1:
            raise ValueError(
                f"algorithm.reference_every={self.algorithm.reference_every} needs "
                "algorithm.kl_coef=0: with a KL term every update needs the reference"
            )
        self._check_waiting()
        buffer = self.algorithm.overlong_buffer_tokens or 0
        if buffer > self.rollout.max_response_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens={buffer} is longer than "
                f"rollout.max_response_tokens={self.rollout.max_response_tokens}"
            )
        need = self.max_input_tokens + self.rollout.max_response_tokens
        if self.phases and self.policy.max_tokens_per_row < need:
            raise ValueError(
                f"policy.max_tokens_per_row={self.policy.max_tokens_per_row} is smaller than the "
                f"longest prompt plus response ({self.max_input_tokens} + "
                f"{self.rollout.max_response_tokens}); set it to at least {need}"
            )
