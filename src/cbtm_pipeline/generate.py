"""Go on with a text, token by token, by the ensemble of a finished run.

    cbtm generate "The ship left the"

On a terminal, each token has the colour of the expert that weighed most when it was drawn, and a legend says
which expert that is. In a pipe, there is the text alone. It is also `python -m cbtm_pipeline.generate`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cbtm_pipeline.base import cli, printable
from cbtm_pipeline.inference import colours, where

if TYPE_CHECKING:
    from cbtm_pipeline.inference.loaded import Ensemble


def tokens(
    ensemble: "Ensemble", ids: Sequence[int], n: int, temperature: float, seed: int | None
) -> Iterator[tuple[int, int]]:
    """Yield at most `n` tokens that follow `ids`, each with the number of its most weighted expert.

    Ends before a token that ends texts. Temperature 0 takes the most probable token. Equal seeds give equal
    tokens.
    """
    import torch

    from cbtm_pipeline.inference import sampling

    generators, cache = sampling.generators(seed, 0, 1), None
    new, device = list(ids), ensemble.model.device
    for _ in range(n):
        read = torch.tensor([new], device=device)
        out = ensemble.model(read, past_key_values=cache, logits_to_keep=1, output_router_weights=True)
        cache = out.past_key_values
        new = sampling.draw(out.logits[:, -1], temperature, 1.0, generators)
        if new[0] in ensemble.ends:
            return
        yield new[0], int(out.router_log_weights[0, -1].argmax())


def n_tokens(n_prompt: int, wanted: int, n_context: int | None) -> int:
    """How many tokens can follow a prompt. Raises ValueError if it does not fit into the context."""
    if n_context is None:
        return wanted
    if n_prompt > n_context:
        raise ValueError(
            f"PROMPT: {n_prompt} tokens with the separator. Expected at most {n_context}, the experts' "
            "context. Shorten it."
        )
    return min(wanted, n_context - n_prompt + 1)


def run(ensemble: "Ensemble", ids: Sequence[int], args: argparse.Namespace) -> None:
    """Print the text as it comes, and the legend."""
    from cbtm_pipeline.inference.decoding import Decoder

    n = n_tokens(len(ids), args.max_new_tokens, ensemble.n_context)
    decoder, counts, coloured = Decoder(ensemble.tokenizer, ids), Counter(), colours.wanted()
    expert = 0
    temperature = 0.0 if args.greedy else args.temperature

    def show(text: str) -> None:
        printable.write(colours.paint(text, expert)) if coloured else printable.show(text)

    for token, expert in tokens(ensemble, ids, n, temperature, args.seed):
        counts[expert] += 1
        show(decoder.add(token))
    show(decoder.end())
    printable.write("\n")
    if coloured and counts:
        printable.write("\n" + colours.legend(ensemble.model.names, ensemble.terms, counts))
    if counts.total() == n < args.max_new_tokens:
        print(f"The experts' context of {ensemble.n_context} tokens is full.", file=sys.stderr)


def temperature(value: str) -> float:
    """A number of the command line, 0 or more."""
    if not 0 <= (number := float(value)) < float("inf"):
        raise ValueError(value)
    return number


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompt", nargs="?", default="", help="the text to go on with; - reads it from stdin")
    where.add_options(p)
    where.add_exclude(p)
    p.add_argument("--max-new-tokens", type=cli.whole, default=200, help="end after so many tokens (200)")
    p.add_argument(
        "--temperature", type=temperature, default=1.0, help="below 1: more probable tokens; 0: the most (1)"
    )
    p.add_argument("--greedy", action="store_true", help="always take the most probable token")
    p.add_argument("--seed", type=int, help="equal seeds give equal texts")
    p.add_argument("--n-active", "--top-k-experts", type=cli.whole, help="experts that run for each token")
    p.add_argument("--router", choices=["paper", "filter"], help="how experts are weighed; see the README")
    args = p.parse_args()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    folder = where.named(args)

    from cbtm_pipeline.corpus.encoding import TokenEncoder  # these take a second to import
    from cbtm_pipeline.inference import loaded

    text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
    given: dict[str, Any] = {"n_active": args.n_active, "router": args.router}
    settings = {name: value for name, value in given.items() if value is not None} | where.without(args)
    ensemble = loaded.load(folder, folder.name, at_once=False, **settings)
    found = TokenEncoder(folder / "tokenizer.json").encode(text, fast=False).tolist()
    start = [] if ensemble.separator is None else [ensemble.separator]
    run(ensemble, [*start, *found], args)


if __name__ == "__main__":
    cli.run(main)
