"""What the names on the report's page mean."""

from cbtm_pipeline.html.page import Html, tag

NAMES = (
    (
        "perplexity",
        "exp of the mean negative log-probability of a token: lower is better. It depends on the "
        "tokenizer; bits per byte do not.",
    ),
    (
        "seed",
        "the model that all others begin as.",
    ),
    (
        "dense, dense-batch, dense-steps",
        "one model that goes on from the seed with as many tokens as all experts together: on a k "
        "times larger batch, or for k times more steps.",
    ),
    (
        "dense-large",
        "a model with twice the layers of an expert, and so with about the parameters of two active ones. It "
        "begins from scratch, and spends the training FLOPs of the seed and of all experts together.",
    ),
    (
        "random",
        "the control: as many experts, trained on random parts of the corpus. What it gains does not "
        "come from the clusters.",
    ),
    (
        "uniform",
        "all cluster experts with equal weights.",
    ),
    (
        "paper",
        "the router of the C-BTM paper: the nearer the text so far lies to an expert's cluster, the "
        "larger its weight.",
    ),
    (
        "filter",
        "the router that also learns from how well each expert has predicted the text so far.",
    ),
    (
        "top-n, all-n",
        "only the n experts with the largest weights run for a token; all-n: every expert.",
    ),
    (
        "sticky, fixed",
        "the active experts change seldom (hysteresis: only for one that weighs so many times more), "
        "or not at all after so many tokens. That saves passes.",
    ),
    (
        "oracle",
        "for each document the one expert that predicts it best, chosen after the fact: no system, "
        "but a bound for choosing one expert.",
    ),
    (
        "T",
        "the temperature of the distances: a small one gives nearly all weight to the nearest expert.",
    ),
    (
        "ε",
        "the share of the weight that returns at every token to what the distances say: how fast the "
        "filter forgets.",
    ),
    (
        "β",
        "the power of an expert's probability of the token just seen: how strongly the filter learns "
        "from it.",
    ),
    (
        "passes per token",
        "how many experts read a token on average, with what an expert that becomes active has to catch up.",
    ),
)


def names() -> Html:
    """A list of the names."""
    items = [tag("div", tag("dt", name), tag("dd", text)) for name, text in NAMES]
    return tag("details", tag("summary", "What the names mean"), tag("dl", *items, class_="names"), open="")
