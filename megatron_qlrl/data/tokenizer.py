"""Loads the tokenizer of a model folder, and checks it against the model."""

from pathlib import Path
from typing import Any

from megatron_qlrl.config.folder import end_tokens
from megatron_qlrl.errors import ConfigError


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a model folder.

    Raises:
        ConfigError: its files cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers checks nothing: damaged files raise any error, and tokenizers raises Exception
    # itself.
    except Exception as error:
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); copy "
            "the tokenizer files of the model again"
        ) from error


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Checks that the model knows every token of its tokenizer, except a padding token, which no
    text holds.

    Raises:
        ConfigError: it does not know some. The message names the first of them.
    """
    beyond = [
        f"{token!r} ({number})"
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and number != tokenizer.pad_token_id
    ]
    if beyond:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {len(beyond)} tokens that the model "
            f"with its vocab_size={vocab_size} does not know, e.g. {', '.join(beyond[:3])}; put "
            "the model's own tokenizer files into model.path"
        )


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Returns the tokenizer's end token and those in generation_config.json."""
    stops = {tokenizer.eos_token_id, *end_tokens(folder)}
    return sorted(s for s in stops if s is not None)
