"""Model sizes by name: keys of model.scratch for the sizes that scaling studies use, as Llama models.

Widths d and depths are those of Brown et al. 2020 (table 2.1). The feed-forward layers have three matrices of
width 8/3 d, which together are as large as two of width 4 d. A name gives the number of parameters with a
vocabulary of 50 000 (10m and 30m: with 16 000).
"""

from typing import Any

_SIZES = {  # hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
    "10m": (256, 8, 4, 688),
    "30m": (512, 8, 8, 1376),
    "125m": (768, 12, 12, 2048),
    "350m": (1024, 24, 16, 2816),
    "760m": (1536, 24, 12, 4096),
    "1.3b": (2048, 24, 16, 5504),
    "2.7b": (2560, 32, 20, 6912),
    "6.7b": (4096, 32, 32, 11008),
}
_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
NAMES = tuple(_SIZES)


def scratch(name: str) -> dict[str, Any]:
    """Keys of section model.scratch.

    Up to 1.3b the output layer is the token table itself, because that table is a large share of a small
    model.
    """
    sizes = dict(zip(_KEYS, _SIZES[name], strict=True))
    return {"model_type": "llama", **sizes, "tie_word_embeddings": NAMES.index(name) <= NAMES.index("1.3b")}
