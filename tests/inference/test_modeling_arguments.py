"""What users ask of the ensemble as a model of transformers: it is done, or refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import made_tiny_ensemble
from cbtm_pipeline.inference import modeling_cbtm
from cbtm_pipeline.inference.modeling_cbtm import CBTMConfig, CBTMForCausalLM
from made_tiny_ensemble import Ensemble, text

LOADERS: dict[str, Callable[..., Any]] = {
    "the class": CBTMForCausalLM.from_pretrained,
    "AutoModel": AutoModelForCausalLM.from_pretrained,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return made_tiny_ensemble.make(tmp_path_factory.mktemp("made"), (0, 1, 2, 3), n_active=2)


@pytest.fixture(scope="module")
def model(made: Ensemble) -> CBTMForCausalLM:
    return CBTMForCausalLM.from_pretrained(made.folder)


def one_line(attempt: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        attempt()
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_misspelt_argument_of_from_pretrained_is_a_type_error(made: Ensemble, load: Any) -> None:
    config = CBTMConfig.from_pretrained(made.folder)
    for more in ({}, {"config": config}):
        line = one_line(lambda more=more: load(made.folder, exlude=["0"], **more), TypeError)
        assert line.endswith("got an unexpected keyword argument 'exlude'. Did you mean 'exclude'?")
    one_line(lambda: CBTMForCausalLM(config, exlude=["0"]), TypeError)  # type: ignore
    one_line(lambda: CBTMForCausalLM.from_pretrained(made.folder, config), TypeError)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_settings_beside_a_config_change_a_copy_of_it(made: Ensemble, load: Any) -> None:
    config = CBTMConfig.from_pretrained(made.folder, hysteresis=3.0)
    found = load(made.folder, config=config, exclude=["1"], n_active=1)
    assert found.names == ["0", "2", "3"]
    assert (found.config.n_active, found.config.hysteresis, found.router.n_active) == (1, 3.0, 1)
    assert (config.exclude, config.n_active) == ([], 2)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_in_8bit", True),
        ("quantization_config", {"load_in_8bit": True}),
        ("subfolder", "ensemble"),
        ("state_dict", {"a": torch.zeros(1)}),
        ("output_loading_info", True),
        ("use_safetensors", False),
        ("max_memory", {0: "1GB"}),
        ("tp_plan", "auto"),
    ],
)
def test_an_argument_that_the_ensemble_does_not_have_is_refused_in_one_line(
    made: Ensemble, load: Any, name: str, value: Any
) -> None:
    if name == "subfolder" and load != CBTMForCausalLM.from_pretrained:
        with pytest.raises(
            ValueError, match="Unrecognized model"
        ):  # transformers looks for config.json there
            load(made.folder, subfolder=value)
        return
    line = one_line(lambda: load(made.folder, **{name: value}))
    assert line.startswith(f"{name}: ") and line.endswith("Leave it out.")


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_arguments_of_transformers_that_ask_for_nothing_are_taken(made: Ensemble, load: Any) -> None:
    nothing: dict[str, Any] = {"subfolder": "", "quantization_config": None, "output_loading_info": False}
    nothing |= {"use_safetensors": True, "low_cpu_mem_usage": True, "revision": "main", "token": None}
    found = load(made.folder, **nothing, attn_implementation="eager", dtype="float32")
    assert found.expert(0).config._attn_implementation == "eager"
    settings = found.generation_config
    settings.max_new_tokens = 7
    assert load(made.folder, generation_config=settings).generation_config.max_new_tokens == 7


def test_a_config_of_other_experts_is_refused_in_one_line(made: Ensemble) -> None:
    line = one_line(lambda: CBTMForCausalLM.from_pretrained(made.folder, experts=["1", "0", "2", "3"]))
    assert line.startswith("experts: 1, 0, 2, 3. Expected those of ")
    other = AutoModelForCausalLM.from_pretrained(made.experts[0]).config
    line = one_line(lambda: CBTMForCausalLM.from_pretrained(made.folder, config=other))
    assert line == "config: a LlamaConfig. Expected a CBTMConfig, or a folder. Change it."


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_is_excluded_may_come_as_a_set_or_none(made: Ensemble, load: Any) -> None:
    assert load(made.folder, exclude={"3", "1"}).names == ["0", "2"]
    assert load(made.folder, exclude=("1",)).config.exclude == ["1"]
    assert load(made.folder, exclude=None).names == list("0123")
    for wrong in (0, {"1": "2"}, [None], True):
        line = one_line(lambda wrong=wrong: load(made.folder, exclude=wrong))
        assert line == f"exclude: {wrong!r}. Expected a list of names of experts. Change it."


@pytest.mark.parametrize("where", ["sequential", "disk", "meta", {"0": "disk"}, "cuda:77", 3.5])
def test_a_device_that_is_not_there_is_refused_in_one_line(made: Ensemble, where: Any) -> None:
    line = one_line(lambda: CBTMForCausalLM.from_pretrained(made.folder, device_map=where))
    assert line.startswith("device_map: ") and "Expected auto, a device" in line
    assert one_line(lambda: CBTMForCausalLM.from_pretrained(made.folder, dtype="float31")).startswith(
        "dtype: "
    )


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "shape (1, 0)"),
        (torch.tensor([0, 1]), "shape (2,)"),
        (torch.tensor([[0, -1]]), "-1"),
        (torch.tensor([[0.0, 1.0]]), "float32"),
        ([[0, 1]], "a list"),
    ],
)
def test_ids_that_are_none_are_refused_in_one_line(model: CBTMForCausalLM, ids: Any, found: str) -> None:
    expected = "Expected a tensor of token ids, a row of at least one each. Change it."
    for attempt in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
        assert one_line(attempt) == f"input_ids: {found}. {expected}"
    assert one_line(model).startswith("input_ids: missing.")


def test_embeddings_are_refused_in_one_line_without_ids_too(model: CBTMForCausalLM) -> None:
    embeddings = torch.zeros(1, 3, 32)
    expected = "inputs_embeds: given. Expected input_ids, which the router reads. Change it."
    assert one_line(lambda: model(inputs_embeds=embeddings)) == expected
    assert one_line(lambda: model.generate(inputs_embeds=embeddings, max_new_tokens=2)) == expected


def test_a_misspelt_argument_of_forward_is_a_type_error(model: CBTMForCausalLM) -> None:
    line = one_line(lambda: model(text(9, 1), output_router_weight=True), TypeError)
    assert line.endswith("argument 'output_router_weight'. Did you mean 'output_router_weights'?")
    for name in ("output_attentions", "output_hidden_states"):
        assert model(text(9, 1), **{name: False}).logits is not None
        assert one_line(lambda name=name: model(text(9, 1), **{name: True})).startswith(f"{name}: True. ")
    with pytest.raises(ValueError, match="output_router_weight"):
        model.generate(text(9, 1), max_new_tokens=1, output_router_weight=True)


def test_positions_are_those_of_the_tokens_or_refused(model: CBTMForCausalLM) -> None:
    ids, mask = text(9, 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    expected, position = model(ids).logits, torch.arange(9)
    for given in (position, position[None]):
        torch.testing.assert_close(model(ids, position_ids=given).logits, expected)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, 1))
    for given in (position + 1, position[:8], torch.zeros(1, 9), position[None, None]):
        assert one_line(lambda given=given: model(ids, position_ids=given)).startswith(
            "position_ids: others."
        )
    assert one_line(lambda: model(ids, attention_mask=mask, position_ids=position)).startswith("position_ids")
    assert one_line(lambda: model(ids, token_type_ids=torch.ones(1, 9))).startswith("token_type_ids: others")
    model(ids, token_type_ids=torch.zeros(1, 9))


def test_a_mask_of_another_shape_is_refused_in_one_line(model: CBTMForCausalLM) -> None:
    ids, ones = text(9, 1), torch.ones(1, 9, dtype=torch.long)
    for mask in (ones[:, :8], torch.ones(1, 12), ones[None, None], ones[0], torch.ones(2, 9), [1] * 9):
        line = one_line(lambda mask=mask: model(ids, attention_mask=mask))
        assert line.startswith("attention_mask: ") and line.endswith("Expected shape (1, 9). Change it.")
    assert one_line(lambda: model(ids, attention_mask=ones * -9)).startswith("attention_mask: other numbers.")
    first = model(ids, attention_mask=ones.bool())
    cache: dict[str, Any] = {modeling_cbtm.CACHE: getattr(first, modeling_cbtm.CACHE)}
    line = one_line(lambda: model(ids[:, :2], attention_mask=ones[:, :5], **cache))
    assert line == "attention_mask: shape (1, 5). Expected shape (1, 2) or (1, 11). Change it."
    assert one_line(lambda: model(ids.repeat(2, 1), **cache)).startswith(
        "input_ids: 2 sequences. Expected 1,"
    )
    # a refusal changes nothing: the text goes on
    more = model(text(4, 2), **cache).logits
    torch.testing.assert_close(more, model(torch.cat([ids, text(4, 2)], 1)).logits[:, 9:], atol=1e-5, rtol=0)


def test_logits_are_kept_of_the_columns_that_are_named(model: CBTMForCausalLM) -> None:
    ids = text(20, 3)
    whole = model(ids).logits
    for columns in ([19], [3, 7], [-1, 0], [5, 5, 2]):
        found = model(ids, logits_to_keep=torch.tensor(columns)).logits
        torch.testing.assert_close(found, whole[:, columns], atol=1e-5, rtol=0)
    out = model(ids, labels=ids, logits_to_keep=2)
    torch.testing.assert_close(out.logits, whole[:, -2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss)
    for wrong in (-1, 1.5, torch.tensor([20]), torch.tensor([]), torch.tensor(3)):
        assert one_line(lambda wrong=wrong: model(ids, logits_to_keep=wrong)).startswith("logits_to_keep: ")
    assert one_line(lambda: model(ids, labels=ids[0])).startswith("labels: shape (20,). Expected that of ")


def test_a_tuple_is_returned_where_it_is_asked_for(model: CBTMForCausalLM) -> None:
    found = model(text(9, 1), labels=text(9, 1), return_dict=False)
    assert isinstance(found, tuple) and found[1].shape == (1, 9, made_tiny_ensemble.VOCAB_SIZE)


@pytest.mark.parametrize("settings", [{}, {"router": "paper"}, {"n_active": 1}, {"hysteresis": 3.0}])
def test_a_hole_in_the_mask_is_as_if_it_were_not_there(made: Ensemble, settings: dict[str, Any]) -> None:
    """Several holes, one across a border of blocks, and beams that go on after one."""
    loaded, ids = CBTMForCausalLM.from_pretrained(made.folder, max_loaded=2, **settings), text(90, 5)
    mask = torch.ones_like(ids)
    for begin, end in ((3, 11), (30, 34), (60, 71)):
        mask[:, begin:end] = 0
    short = ids[:, mask[0] > 0]
    expected = CBTMForCausalLM.from_pretrained(made.folder, **settings)(short, output_router_weights=True)
    for ends in ([90], [5, 40, 66, 90], range(1, 91), [33, 34, 90]):
        cache: dict[str, Any] = {}
        logits, weights, begin = [], [], 0
        for end in ends:
            out = loaded(ids[:, begin:end], mask[:, :end], output_router_weights=True, **cache)
            logits.append(out.logits)
            weights.append(out.router_log_weights)
            cache, begin = {modeling_cbtm.CACHE: getattr(out, modeling_cbtm.CACHE)}, end
        found = torch.cat(logits, 1)[:, mask[0] > 0], torch.cat(weights, 1)[:, mask[0] > 0].exp()
        torch.testing.assert_close(found[0], expected.logits, atol=2e-5, rtol=0)
        torch.testing.assert_close(found[1], expected.router_log_weights.exp(), atol=1e-5, rtol=0)
        cache[modeling_cbtm.CACHE].crop(68 - 90)  # into the last hole
        again = loaded(ids[:, 68:], mask, **cache).logits[:, mask[0, 68:] > 0]
        torch.testing.assert_close(again, expected.logits[:, -again.shape[1] :], atol=2e-5, rtol=0)


def test_a_hole_in_the_mask_generates_what_the_text_without_it_generates(model: CBTMForCausalLM) -> None:
    ids, other = text(30, 5), text(30, 6)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, 12:20] = 0
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    both = model.generate(torch.cat([ids, other]), attention_mask=mask, **settings)
    assert both[0, 30:].tolist() == model.generate(ids[:, mask[0] > 0], **settings)[0, 22:].tolist()
    assert both[1].tolist() == model.generate(other, **settings)[0].tolist()


def test_several_answers_to_one_prompt_are_merged(made: Ensemble) -> None:
    model, ids = CBTMForCausalLM.from_pretrained(made.folder, mode="merge"), text(20, 7)
    settings: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    one = model.generate(ids, do_sample=False, **settings)
    ways: list[dict[str, Any]] = [{"num_return_sequences": 3, "do_sample": True}]
    ways.append({"num_beams": 3, "num_return_sequences": 3})
    for way in ways:
        found = model.generate(ids, **settings, **way)
        assert found.shape == (3, 28)
    # without a cache, and with a prompt that comes in parts, weights are those of the prompt
    ways = [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}]
    for way in ways:
        assert model.generate(ids, do_sample=False, **settings, **way).tolist() == one.tolist()
    out = model(ids.repeat(2, 1), output_router_weights=True)
    assert out.router_log_weights.shape == (2, 20, 4)
    out.past_key_values.batch_repeat_interleave(2)
    more = model(ids[:, :1].repeat(4, 1), past_key_values=out.past_key_values, output_router_weights=True)
    assert more.router_log_weights.shape == (4, 1, 4)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "double"])
def test_a_cast_of_the_model_holds_for_experts_that_load_later(made: Ensemble, cast: str) -> None:
    before = torch.float16 if cast == "bfloat16" else torch.bfloat16
    model = CBTMForCausalLM.from_pretrained(made.folder, dtype=before)
    assert model.expert(0).dtype == before
    expected = {
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
        "to": torch.float32,
        "double": torch.float64,
    }
    casts: Any = model
    model = casts.to(torch.float32) if cast == "to" else getattr(model, cast)()
    assert {model.expert(j).dtype for j in range(4)} == {expected[cast]}
    assert model(text(9, 1)).logits.dtype == torch.float32


def test_a_folder_that_another_set_replaced_is_an_error_when_an_expert_loads(tmp_path: Path) -> None:
    made = made_tiny_ensemble.make(tmp_path / "one")
    other = made_tiny_ensemble.make(tmp_path / "two", (4, 5, 6, 7))
    model = CBTMForCausalLM.from_pretrained(made.folder)
    model.expert(0)
    made.folder.rename(tmp_path / "away")
    assert "missing, but not when the ensemble was loaded." in one_line(lambda: model.expert(1))
    other.folder.rename(made.folder)
    line = one_line(lambda: model.expert(1))
    assert line.startswith(f"{made.folder}/experts/1/") and line.endswith("Load the ensemble again.")
    (tmp_path / "away").rename(tmp_path / "one/back")
    made.folder.rename(tmp_path / "away")
    (tmp_path / "one/back").rename(made.folder)
    assert model.expert(1) is not None


def test_a_model_whose_user_changes_the_folder_of_work_finds_its_experts(
    made: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.folder.parent)
    for load in LOADERS.values():
        model = load(made.folder.name)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path)
            assert model.expert(0) is not None
