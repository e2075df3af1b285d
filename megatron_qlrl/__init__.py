"""QwenLong-L1 on Megatron-core: warm-up SFT, phased long-context RL, release."""

__version__ = "0.1.0"
