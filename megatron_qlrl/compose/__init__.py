"""Composition root: the only place that sees the whole config and joins the stages."""

from megatron_qlrl.compose.commands import run_eval, run_export, run_import, run_rl, run_sft
from megatron_qlrl.compose.distill import run_distill
from megatron_qlrl.compose.sample import run_sample

__all__ = ["run_distill", "run_eval", "run_export", "run_import", "run_rl", "run_sample", "run_sft"]
