"""tokenizer_config.json beside a model."""

import pytest

from cbtm_pipeline.corpus import tokenizer_config


@pytest.mark.parametrize(
    ("own", "positions", "expected"),
    [(None, 32, 32), (10**30, 32, 32), (16, 32, 16), (16, None, 16), (None, None, None)],
)
def test_the_longest_text_is_what_both_tokenizer_and_model_can_read(own, positions, expected) -> None:
    content = {} if own is None else {"model_max_length": own}
    found = tokenizer_config.for_model({**content, "bos_token": "<s>"}, positions)
    assert found.get("model_max_length") == expected and found["bos_token"] == "<s>"


def test_padding_is_on_the_left_unless_the_tokenizer_says_otherwise() -> None:
    assert tokenizer_config.for_model({}, None)["padding_side"] == "left"
    assert tokenizer_config.for_model({"padding_side": "right"}, 8)["padding_side"] == "right"


def test_positions_have_two_names() -> None:
    assert tokenizer_config.n_positions({"n_positions": 8}) == 8
    assert tokenizer_config.n_positions({"max_position_embeddings": 9}) == 9
    assert tokenizer_config.n_positions({"hidden_size": 9}) is None
