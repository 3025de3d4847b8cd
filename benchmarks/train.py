"""Training speed: ours, a plain loop and Hugging Face's Trainer, on the same machine, model and tokens.

    pip install -e '.[bench]'
    python benchmarks/train.py    # a model of 10 M parameters, each way of computing
    # on a GPU
    python benchmarks/train.py --preset 125m --vocab-size 50304 --seq-len 1024 --batch-size 32 \\
        --ways bf16,compiled

* ours: `loop.train`, as the rule train_expert runs it, with its own choices.
* plain: nanoGPT's loop, written anew: autocast, whole logits, fused AdamW, clipping, next batch read ahead.
* trainer: transformers.Trainer with the fused optimiser, pinned memory and no logging.

Each run is a process of its own and trains the same number of steps. The first steps do not count: they
allocate memory and compile kernels. Each round runs all of them in turn. Ratios are taken within a round,
because machines are noisy. MFU counts 6 N + 12 L d T operations per token.

Cost model: 6 N + 12 L d T operations per token. So an H100 (989 TFLOP/s) reaches at best 790 k tokens/s with
125m and 101 k with 1.3b.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbtm_pipeline import config, plan, presets, train_expert
from cbtm_pipeline.base import device as devices
from cbtm_pipeline.training import batches, loop, micro_batch, model, training_log

ROOT = Path(__file__).parents[1]
WHO = ("ours", "plain", "trainer")
WAYS = {  # bf16, compiled
    "float32": (False, False),
    "bf16": (True, False),
    "compiled": (True, True),
}


def text(vocab_size: int, n_tokens: int) -> np.ndarray:
    """Token ids whose frequencies are as uneven as those of a text."""
    return np.minimum(np.random.default_rng(0).zipf(1.2, n_tokens), vocab_size - 1).astype(
        np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )


def ours(net: Any, stream: batches.Stream, args: argparse.Namespace, folder: Path) -> list[float]:
    """The time at which each step ended (seconds)."""
    cfg = config.read(ROOT / "config.yaml")
    how = dataclasses.replace(
        plan.train_expert(cfg, "dense"),
        n_steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        lr=3e-4,
        validations=0,
        micro_batch_size=args.micro_batch_size,
        precision="bf16" if args.bf16 else "float32",
        compile=args.compiled,
    )
    train_expert.make_deterministic(torch.get_num_threads())
    task = loop.Task(how, cfg.run, stream, None, folder / "state", "0" * 32)
    loop.train(net, task, lambda: False)
    return [row["time"] for row in training_log.read(folder / "state/metrics.jsonl")]


def plain(net: Any, stream: batches.Stream, args: argparse.Namespace, folder: Path) -> list[float]:
    """The time at which each step of a plain loop ended (seconds)."""
    device = devices.move(net.train())
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(net) if args.compiled else net
    micro = args.micro_batch_size or min(args.batch_size, max(1, micro_batch.CPU_TOKENS // args.seq_len))

    def read(step: int) -> torch.Tensor:
        tokens_BT = torch.from_numpy(batches.batch(stream, 0, step, args.batch_size, args.seq_len))
        return tokens_BT.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens_BT

    tokens_BT, times = read(0), []
    for step in range(args.steps):
        for micro_BT in tokens_BT.split(micro):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                logits = forward(input_ids=micro_BT[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro_BT[:, 1:].flatten())
            (loss * len(micro_BT) / args.batch_size).backward()
        tokens_BT = read(step + 1)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.time())
    return times


def trainer(net: Any, stream: batches.Stream, args: argparse.Namespace, folder: Path) -> list[float]:
    """The time at which each step of Hugging Face's Trainer ended (seconds)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    blocks = [stream.read(i * args.seq_len, args.seq_len) for i in range(args.steps * args.batch_size)]
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    micro = args.micro_batch_size or min(args.batch_size, max(1, micro_batch.CPU_TOKENS // args.seq_len))
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.time())

    how = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.batch_size // micro,
        learning_rate=3e-4,
        bf16=args.bf16,
        torch_compile=args.compiled,
        optim="adamw_torch_fused",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    net.config.use_cache = False
    Trainer(net, how, train_dataset=examples, callbacks=[Clock()]).train()  # pyright: ignore[reportArgumentType]
    return times


def one(who: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s after the first steps, MFU (0 if the peak is not known), peak memory (GB), and FLOP/s."""
    if args.threads:
        torch.set_num_threads(args.threads)
    stream = batches.Stream([text(args.vocab_size, args.steps * args.batch_size * args.seq_len + 1)])
    net = model.scratch(presets.scratch(args.preset), args.vocab_size, 0, args.seq_len, 0)
    flops = model.flops_per_token(net, args.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        times = {"ours": ours, "plain": plain, "trainer": trainer}[who](net, stream, args, Path(folder))
    rate = (len(times) - 1 - args.warmup) * args.batch_size * args.seq_len / (times[-1] - times[args.warmup])
    progress = training_log.TrainingProgress(1, 0, 1, flops, 1)
    return {
        "rate": rate,
        "mfu": progress.mfu(rate) or 0.0,
        "memory": training_log.memory_bytes() / 1e9,
        "flops": rate * flops,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=presets.NAMES, default="10m")
    p.add_argument("--vocab-size", type=int, default=8192)
    p.add_argument("--seq-len", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=16, help="sequences per step")
    p.add_argument(
        "--micro-batch-size",
        type=int,
        help="sequences per forward pass; default: ours chooses, the others take 4096 tokens",
    )
    p.add_argument("--steps", type=int, default=13, help="of each run")
    p.add_argument("--warmup", type=int, default=3, help="first steps of a run that do not count")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--ways", default=",".join(WAYS), help="which of " + ", ".join(WAYS))
    p.add_argument("--who", default=",".join(WHO))
    p.add_argument("--threads", type=int)
    p.add_argument("--one", choices=WHO, help=argparse.SUPPRESS)
    p.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args)))
        return

    rates: dict[tuple[str, str], list[float]] = {}
    print(f"{'':>9} {'':<10} tokens/s   MFU    TFLOP/s  memory", flush=True)
    for _ in range(args.rounds):
        for way in args.ways.split(","):
            bf16, compiled = WAYS[way]
            for who in args.who.split(","):
                flags = ["--bf16"] * bf16 + ["--compiled"] * compiled
                command = [sys.executable, __file__, *sys.argv[1:], "--one", who, *flags]
                run = subprocess.run(command, capture_output=True, text=True)
                if run.returncode:
                    print(f"{who:>9} {way:<10} failed: {run.stderr.strip().splitlines()[-1:]}", flush=True)
                    continue
                found = json.loads(run.stdout.splitlines()[-1])
                rates.setdefault((who, way), []).append(found["rate"])
                numbers = f"{found['rate']:8.0f} {100 * found['mfu']:5.1f} % "
                numbers += f"{found['flops'] / 1e12:8.3f} {found['memory']:6.2f} GB"
                print(f"{who:>9} {way:<10} {numbers}", flush=True)
    for way in args.ways.split(","):
        for who in args.who.split(","):
            pairs = list(zip(rates.get(("ours", way), []), rates.get((who, way), []), strict=False))
            if who != "ours" and pairs:
                ratios = [a / b for a, b in pairs]
                spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"ours / {who}, {way}: {statistics.median(ratios):.2f} {spread}")


if __name__ == "__main__":
    main()
