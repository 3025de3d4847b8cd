"""What the ensemble costs at inference beside a single expert: time per token, prefill, memory.

    python benchmarks/inference.py                              # 16 experts of 10 M parameters, two threads
    python benchmarks/inference.py --hidden-size 512 --rounds 9

* decode top-1, sticky top-2: `generate` of 128 tokens after a prompt of 256, without the time of the first.
  The sticky set has a hysteresis of 5.
* prefill top-1: `generate` of one token after a prompt of 1 000.
* memory: the growth of the process's peak over its imports. The ensemble has max_loaded = top_k + 1 and reads
  a text that runs through more experts than that. Beside it: a process that loads top_k + 1 experts, each of
  which reads the same text and keeps its KV cache.

Experts are random llamas: their speed does not depend on what they know. The text is made of runs of words of
one cluster, with term vectors near its centre, so the router chooses as it does on texts. Generated words are
of one cluster, too. Each round measures ensemble and single expert in turn, and ratios are taken within a
round, because machines are noisy. The expert passes per token are printed, catching up included.

Cost model of a token, for experts of N parameters: top_k forward passes, 2 N top_k operations; a router step
in numpy, O(D k), about 0.2 ms; a softmax over V for each active expert, O(V top_k). A new active expert first
reads the text so far: a forward pass over it. So top-1 costs a single expert and a router step. A prefill at
top-1 needs the last token's expert alone, and router steps for the whole text. Memory is that of max_loaded
experts with their KV caches, V D numbers of the router, and the logits of a block of 128 tokens.
"""

import argparse
import gc
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
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import modeling_cbtm, package

N_COMPONENTS, N_PROMPT, N_NEW, N_PREFILL = 100, 256, 128, 1000
STICKY: dict[str, Any] = {"n_active": 2, "hysteresis": 5.0}
TARGETS = {"decode top-1": 1.15, "decode sticky top-2": 2.3, "prefill top-1": 1.2}


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write the ensemble: args.k random experts, and a router whose clusters share the vocabulary out."""
    rng = np.random.default_rng(0)
    keys: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.hidden_size * 11 // 4,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**keys)
    experts = {str(j): folder / f"made/experts/{j}" for j in range(args.k)}
    for j, path in enumerate(experts.values()):
        torch.manual_seed(j)
        LlamaForCausalLM(config).save_pretrained(path)
    (folder / "made/tokenizer").mkdir()
    vocabulary = {f"w{i}": i for i in range(args.vocab_size)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(
        str(folder / "made/tokenizer/tokenizer.json")
    )
    centres_KD = rng.normal(size=(args.k, N_COMPONENTS))
    centres_KD /= np.linalg.norm(centres_KD, axis=1, keepdims=True)
    noise_VD = rng.normal(size=(args.vocab_size, N_COMPONENTS)) / N_COMPONENTS**0.5
    embedding_VD = centres_KD[np.arange(args.vocab_size) % args.k] + noise_VD
    embedding_VD[0] = 0
    settings = {"router_temperature": 0.1, "epsilon": 0.1, "beta": 0.5}
    parts = package.Parts(
        embedding_VD, centres_KD, experts, folder / "made/tokenizer", 0, args.vocab_size, settings, ""
    )
    package.write(parts, folder / "ensemble/files.json", artifact.make_meta("ensemble", {}))


def text(n_tokens: int, args: argparse.Namespace, clusters: list[int]) -> torch.Tensor:
    """The separator and words, a third of them of one cluster; the clusters take turns of growing length."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, args.vocab_size, n_tokens)
    ends = np.cumsum(1 + np.arange(len(clusters)))
    turn = np.searchsorted(ends / ends[-1], np.arange(n_tokens) / n_tokens, side="right")
    own = rng.random(n_tokens) < 1 / 3
    words[own] += (np.array(clusters)[turn] - words)[own] % args.k
    words %= args.vocab_size
    words[0] = 0
    return torch.tensor(words)[None]


class OfOneCluster(LogitsProcessor):
    """Lets a random model write words of one cluster, as a trained one stays with its topic."""

    def __init__(self, args: argparse.Namespace, cluster: int):
        self.others_V = torch.arange(args.vocab_size) % args.k != cluster

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.others_V, -torch.inf)


def seconds(model: Any, ids: torch.Tensor, n_new: int, *processors: LogitsProcessor) -> float:
    """Time of a generation."""
    gc.collect()
    begin = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
    )
    return time.perf_counter() - begin


def times(folder: Path, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the ensemble and of a single expert, pair by pair: per token, or of a prefill."""
    single: Any = AutoModelForCausalLM.from_pretrained(folder / "experts/3")
    short, long = text(N_PROMPT, args, [3]), text(N_PREFILL, args, [3])

    stay = OfOneCluster(args, 3)

    def decode(model: Any) -> float:
        return (seconds(model, short, N_NEW + 1, stay) - seconds(model, short, 1, stay)) / N_NEW

    def prefill(model: Any) -> float:
        return seconds(model, long, 1)

    found: dict[str, list[tuple[float, float]]] = {}
    for name, settings, measure in (
        ("decode top-1", {"n_active": 1}, decode),
        ("decode sticky top-2", STICKY, decode),
        ("prefill top-1", {"n_active": 1}, prefill),
        ("prefill sticky top-2", STICKY, prefill),
    ):
        model = modeling_cbtm.CBTMForCausalLM.from_pretrained(folder, **settings)
        for warm_up in (model, single):
            measure(warm_up)
        model.n_passes = 0
        found[name] = [(measure(model), measure(single)) for _ in range(args.rounds)]
        n_read = (2 * N_PROMPT + N_NEW) if measure is decode else N_PREFILL
        print(f"{name}: {model.n_passes / args.rounds / n_read:.2f} expert passes per token", file=sys.stderr)
    return found


def memory(key: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, in bytes; getrusage would give the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def growth(folder: Path, args: argparse.Namespace) -> None:
    """Print the growth of this process's peak, in bytes, and how many experts were loaded in all."""
    ids, limit = text(N_PREFILL, args, [3, 7, 1, 11, 5]), STICKY["n_active"] + 1
    before, n_loaded = memory("VmRSS"), limit
    if args.memory_of == "ensemble":
        model = modeling_cbtm.CBTMForCausalLM.from_pretrained(folder, **STICKY, max_loaded=limit)
        seconds(model, ids, 8)
        weights = model(ids, output_router_weights=True, logits_to_keep=1).router_log_weights
        n_loaded = int((weights[0] > -torch.inf).any(0).sum())
    else:
        nets: list[Any] = [
            AutoModelForCausalLM.from_pretrained(folder / f"experts/{j}") for j in range(limit)
        ]
        caches = [DynamicCache(config=net.config) for net in nets]
        for net, cache in zip(nets, caches, strict=True):
            net.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(json.dumps({"bytes": memory("VmHWM") - before, "n_loaded": n_loaded}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--k", type=int, default=16, help="experts")
    p.add_argument("--hidden-size", type=int, default=256, help="of an expert; a multiple of 64")
    p.add_argument("--layers", type=int, default=10, help="of an expert")
    p.add_argument("--vocab-size", type=int, default=8192)
    p.add_argument("--rounds", type=int, default=7, help="pairs of measurements")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a child process
    p.add_argument("--memory-of", choices=["ensemble", "experts"], help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        growth(args.folder, args)
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), args)
        folder = Path(name) / "ensemble"
        found = times(folder, args)
        peaks = {}
        for who in ("ensemble", "experts"):
            command = [sys.executable, *sys.argv, "--folder", str(folder), "--memory-of", who]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[who] = json.loads(run.stdout.splitlines()[-1])
        weights = sum(path.stat().st_size for path in (folder / "experts/0").glob("*.safetensors"))
    print(
        f"{args.k} experts of {weights / 4e6:.1f} M parameters, {args.threads} threads, {args.rounds} rounds"
    )
    print(f"{'':22}{'ensemble':>12}{'single':>12}{'ratio':>8}{'quartiles':>14}{'target':>8}")
    for name, pairs in found.items():
        ratios = sorted(a / b for a, b in pairs)
        low, _, high = statistics.quantiles(ratios, n=4)
        a, b = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        ratio, quartiles = f"{statistics.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"
        print(f"{name:22}{a:>9.2f} ms{b:>9.2f} ms{ratio:>8}{quartiles:>14}{target:>8}")
    a, b = (peaks[who]["bytes"] / 1e6 for who in ("ensemble", "experts"))
    print(f"{'peak memory':22}{a:>9.1f} MB{b:>9.1f} MB{a / b:>8.2f}{'':14}{1:>8.2f}")
    n_experts = STICKY["n_active"] + 1
    print(f"max_loaded {n_experts}, {n_experts} experts; the text ran {peaks['ensemble']['n_loaded']}")


if __name__ == "__main__":
    main()
