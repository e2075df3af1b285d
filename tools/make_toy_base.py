"""Makes the toy base model of the quickstart, tokenizer and weights, on one CPU thread.

    python tools/make_toy_base.py --out examples/quickstart/base --seed 0

The model is a Qwen2 of about 0.2M parameters. Its "pre-training" is the toy look-up on tiny
documents (2-4 facts, growing to --max-facts), stopped early; in the last steps most responses stop
before the closing sentence. So it knows the vocabulary and the categories, but is weak at the task
and seldom writes the sentence that the reward needs, which is left to SFT. It never sees a long
document.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_qlrl.data.builders.toy import ITEMS, ROLES, TOWNS, ToyRecord, make_record, toy_corpus
from megatron_qlrl.data.template import render

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IGNORE = -100
# After the look-up is learned, a few steps show the closing sentence in only one response of ten,
# so that the base seldom writes it and SFT has something to teach. Leaving it out from the start
# would slow the look-up, because repeating the item is a second signal for it.
PLAIN_STEPS = 50
PLAIN_LR = 3e-4
CLOSING_SHARE = 0.1


@dataclass
class Curriculum:
    """Sets the number of facts per document, which grows when recent batches were mostly right.

    If it started at full length, the model would stay on a plateau for a long time; with 2-4 facts
    the answer is easy to guess at first, so the gradient shows where to look.
    """

    max_facts: int
    low: int = 2
    high: int = 4
    recent: list[float] = field(default_factory=list)

    def observe(self, accuracy: float) -> None:
        self.recent.append(accuracy)
        if len(self.recent) >= 8 and np.mean(self.recent[-8:]) > 0.5:
            self.low = min(6, self.low + 1)
            self.high = min(self.max_facts, self.high + max(1, self.high // 4))
            self.recent.clear()


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE in which every name of the task is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(toy_corpus(seed, 2000), trainer)
    # These are not special, because decoding must keep them: answers follow `</think>`.
    bpe.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    items = [item for group in ITEMS.values() for item in group]
    for name in (*items, *ITEMS, *ROLES, *TOWNS):
        assert len(tokenizer.encode(f" {name}")) == 1, f"'{name}' is not one token"
    for text in toy_corpus(seed + 1, 100):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        # With the usual 0.02 small models learn slowly.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, record: ToyRecord, closing: bool
) -> tuple[list[int], list[int]]:
    """Returns token ids of prompt and response, which without `closing` ends with the reasoning."""
    prompt = render(tokenizer, [{"role": "user", "content": record.message}], None).tolist()
    response = record.response if closing else record.response.split("\n</think>")[0]
    return prompt, tokenizer.encode(response + END)


def batch_of(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, facts: range, closing_share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded token ids and labels [32, T]; labels are IGNORE outside the response."""
    size = 32
    pairs = []
    for _ in range(size):
        record = make_record(rng, "needle", int(rng.integers(facts[0], facts[-1] + 1)))
        closing = closing_share == 1.0 or bool(rng.random() < closing_share)
        pairs.append(encode(tokenizer, record, closing))
    width = max(len(p) + len(r) for p, r in pairs)
    ids = torch.full((size, width), int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    labels = torch.full((size, width), IGNORE)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, labels


def update(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[float, torch.Tensor]:
    """Takes one step on the response tokens' mean loss; returns it and which tokens were right."""
    logits = model(input_ids=ids).logits[:, :-1]
    targets = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), logits.argmax(-1) == targets


def learn_look_up(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> None:
    """Trains with AdamW; its rate warms up, stays, and falls linearly to zero in the last third."""
    rng = np.random.default_rng([args.seed, 1])
    optimizer = adamw(model, args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 30, 1.0, (args.steps - k) / (args.steps / 3))
    )
    item_ids = {tokenizer.encode(f" {x}")[0] for group in ITEMS.values() for x in group}
    curriculum = Curriculum(args.max_facts)
    for step in range(args.steps):
        facts = range(curriculum.low, curriculum.high + 1)
        ids, labels = batch_of(tokenizer, rng, facts, 1.0)
        loss, right = update(model, optimizer, ids, labels)
        schedule.step()
        # A response's first item is the look-up; the second only repeats it.
        rows = labels[:, 1:].tolist()
        first = [next(i for i, t in enumerate(row) if t in item_ids) for row in rows]
        accuracy = right[torch.arange(len(first)), torch.tensor(first)].float().mean().item()
        curriculum.observe(accuracy)
        if step % 20 == 19:
            print(f"step {step + 1} facts {[*facts]} loss {loss:.3f} item accuracy {accuracy:.2f}")


def unlearn_closing(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> None:
    rng = np.random.default_rng([args.seed, 2])
    optimizer = adamw(model, PLAIN_LR)
    facts = range(args.max_facts, args.max_facts + 1)
    for _ in range(PLAIN_STEPS):
        ids, labels = batch_of(tokenizer, rng, facts, CLOSING_SHARE)
        update(model, optimizer, ids, labels)


def adamw(model: Qwen2ForCausalLM, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def save(
    out: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, notes: str
) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Transformers 4 and 5 both know this name.
    settings = out / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(content, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    # AutoTokenizer splits words as Qwen2 does; on this text that must give the same tokens.
    loaded = AutoTokenizer.from_pretrained(out, local_files_only=True)
    texts = toy_corpus(1, 300)
    assert [loaded.encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]
    (out / "README.md").write_text(notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--max-facts", type=int, default=6, help="most facts in a document")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.process_time()
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    learn_look_up(model, tokenizer, args)
    unlearn_closing(model, tokenizer, args)
    save(args.out, model, tokenizer, notes(args, model, time.process_time() - started))


def notes(args: argparse.Namespace, model: Qwen2ForCausalLM, cpu_s: float) -> str:
    """Returns the folder's README, which says how to make it again."""
    command = shlex.join(["python", "tools/make_toy_base.py", *sys.argv[1:]])
    return f"""---
license: apache-2.0
---

# Toy base model

A Qwen2 of {model.num_parameters():,} parameters for the quickstart, made by

    {command}

(seed {args.seed}, {args.steps} + {PLAIN_STEPS} steps of 32 documents, {cpu_s:.0f} CPU seconds on
one thread, torch {torch.__version__}, Python {platform.python_version()}).

It was trained on the toy look-up ("Which fish does the text mention?") with documents of at most
{args.max_facts} facts, and stopped early on purpose. In the last {PLAIN_STEPS} steps only
{CLOSING_SHARE:.0%} of the responses had the closing sentence that the reward reads, so the base
seldom writes it, and warm-up SFT has something to teach. Longer documents are new to it. It is of
no use outside the quickstart and the tests.
"""


if __name__ == "__main__":
    main()
