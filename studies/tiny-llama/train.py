"""Train the bundled model: a small Llama on the running Python's standard library sources.

    python studies/tiny-llama/train.py --minutes 60

Writes config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json and training.json beside
this file. The text is read at run time and never stored; validation files (see mpsearch.model.corpus) are
never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mpsearch.model.corpus import library_texts

HERE = Path(__file__).resolve().parent
VOCABULARY = 4096
END = "<|end|>"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int32)


def make_model(length: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int, blocks: int) -> float:
    """Cross-entropy in nats per token over the first `blocks` blocks of `length` tokens, in float32."""
    model.eval()
    losses = []
    for i in range(min(blocks, len(stream) // length)):
        ids = stream[i * length : (i + 1) * length].long()[None]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    model.train()
    return math.fsum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    texts = library_texts("train")
    tokenizer = train_tokenizer(texts)
    train = token_stream(tokenizer, texts)
    held_out = token_stream(tokenizer, library_texts("validation"))
    print(f"{len(train):,} training tokens, {len(held_out):,} validation tokens", flush=True)

    model = make_model(args.length)
    compiled = torch.compile(model)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(args.length)
    start, step, seen = time.monotonic(), 0, 0
    while (used := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        # Warm up over 1 % of the time, then decay by a cosine to 2 % of the peak rate at the time limit.
        rate = args.rate * min(1.0, used / 0.01 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * used)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = torch.randint(len(train) - args.length, (args.batch, 1), generator=generator)
        ids = train[first + offsets].long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + ids.numel()
        if step % 500 == 0:
            held = validation_loss(model, held_out, args.length, 64)
            print(
                f"{100 * used:5.1f} %  step {step}  tokens {seen:,}  train {loss.item():.3f}  val {held:.3f}",
                flush=True,
            )

    model = model.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(args.out)
    final = validation_loss(model.float(), held_out, args.length, 10**9)
    record = {
        "validation_loss_nats_per_token": round(final, 4),
        "log_vocabulary": round(math.log(VOCABULARY), 4),
        "steps": step,
        "tokens_seen": seen,
        "training_tokens": len(train),
        "validation_tokens": len(held_out),
        "minutes": args.minutes,
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
