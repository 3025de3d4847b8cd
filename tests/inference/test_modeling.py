"""The ensemble as a model of transformers: `generate` as users call it, and the mixture as it is defined.

Two facts decide. An ensemble of identical experts is that expert, token for token. With different experts,
log-probabilities are those of `mixture.ensemble` on each expert's own, however the text comes in.

Shapes: B sequences, T tokens, K experts, V token ids.
"""

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import made_tiny_ensemble
import made_training
from cbtm_pipeline import route
from cbtm_pipeline.inference import modeling_cbtm, package
from cbtm_pipeline.inference.modeling_cbtm import CBTMCache, CBTMConfig, CBTMForCausalLM
from cbtm_pipeline.mixture import ensemble
from made_tiny_ensemble import Ensemble, text

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return made_tiny_ensemble.make(tmp_path_factory.mktemp("different"), (0, 1, 2, 3))


@pytest.fixture(scope="module")
def identical(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return made_tiny_ensemble.make(tmp_path_factory.mktemp("identical"), (7, 7, 7))


def load(made: Ensemble, **settings: Any) -> CBTMForCausalLM:
    return CBTMForCausalLM.from_pretrained(made.folder, **settings)


@functools.cache
def load_once(folder: Path, **settings: Any) -> CBTMForCausalLM:
    """An ensemble that tests share, as loading takes longer than they do."""
    return CBTMForCausalLM.from_pretrained(folder, **settings)


@functools.cache
def load_expert(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def padded(*sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch, padded on the left."""
    longest = max(ids.shape[1] for ids in sequences)
    gaps = [torch.zeros(1, longest - ids.shape[1], dtype=torch.long) for ids in sequences]
    return {
        "input_ids": torch.cat([torch.cat([gap, ids], 1) for gap, ids in zip(gaps, sequences, strict=True)]),
        "attention_mask": torch.cat(
            [torch.cat([gap, torch.ones_like(ids)], 1) for gap, ids in zip(gaps, sequences, strict=True)]
        ),
    }


def test_code_that_comes_with_an_expert_is_not_run_and_nobody_is_asked(
    different: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ensemble"
    shutil.copytree(different.folder, folder)
    path = folder / "experts/1/config.json"
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": auto_map}))
    lines = [
        f"open({str(tmp_path / 'RAN')!r}, 'w')",
        "from transformers import PretrainedConfig, PreTrainedModel",
        "class OwnConfig(PretrainedConfig): model_type = 'own'",
        "class OwnModel(PreTrainedModel): config_class = OwnConfig",
    ]
    (path.parent / "own.py").write_text("\n".join(lines))
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # as `yes |` answers
    net = CBTMForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        net.expert(1)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("name", ["../1", "/etc", "..", "a/b", "", 3])
def test_an_expert_lies_below_the_folder_of_its_ensemble(name: Any) -> None:
    with pytest.raises(ValueError, match=r"experts: .*Expected names of folders below experts/"):
        CBTMConfig(experts=["0", name])


# An ensemble of identical experts is that expert.

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "nucleus": {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 4},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 5},
    "without a cache": {"do_sample": False, "use_cache": False},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize(
    "settings", [{"n_active": 1}, {"n_active": 2}, {}, {"router": "paper", "n_active": 2}]
)
@pytest.mark.parametrize("way", WAYS)
def test_identical_experts_generate_what_one_generates(
    identical: Ensemble, way: str, settings: dict[str, Any]
) -> None:
    ids = text(40, 3)
    generated = []
    for model in (load_expert(identical.experts[0]), load_once(identical.folder, **settings)):
        torch.manual_seed(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        generated.append(model.generate(**inputs, **WAYS[way], max_new_tokens=16, eos_token_id=None))
    assert generated[0].shape[1] == 56
    assert generated[1].tolist() == generated[0].tolist()


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams", "prefill in chunks", "without a cache"])
def test_identical_experts_generate_what_one_generates_in_a_padded_batch(
    identical: Ensemble, way: str
) -> None:
    inputs = padded(text(40, 3), text(9, 4), text(21, 5))
    generated = []
    for model in (load_expert(identical.experts[0]), load(identical, n_active=2)):
        torch.manual_seed(0)
        generated.append(model.generate(**inputs, **WAYS[way], max_new_tokens=16))
    assert generated[1].tolist() == generated[0].tolist()


@pytest.mark.parametrize("kind", ["expert", "ensemble"])
def test_a_smaller_model_may_assist(identical: Ensemble, different: Ensemble, kind: str) -> None:
    assistant = load_expert(different.experts[0]) if kind == "expert" else load(different, n_active=1)
    ids = text(30, 6)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alone = load_expert(identical.experts[0]).generate(**inputs, do_sample=False, max_new_tokens=20)
    model = load(identical, n_active=2, route="once")
    assisted = model.generate(**inputs, do_sample=False, max_new_tokens=20, assistant_model=assistant)
    assert assisted.tolist() == alone.tolist()


def test_generation_goes_on_from_a_cache(identical: Ensemble) -> None:
    ids = text(20, 8)
    generated = []
    for model in (load_expert(identical.experts[0]), load(identical, n_active=1)):
        settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        first = model.generate(ids, **settings, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, text(7, 9)], 1)
        cache = {modeling_cbtm.CACHE: getattr(first, modeling_cbtm.CACHE)}
        generated.append(model.generate(longer, **settings, **cache))
    assert generated[1].tolist() == generated[0].tolist()


def test_stop_strings_end_a_generation(identical: Ensemble) -> None:
    tokenizer = AutoTokenizer.from_pretrained(identical.folder)
    model, ids = load(identical, n_active=2), text(12, 1)
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 40,
        "attention_mask": torch.ones_like(ids),
    }
    words = tokenizer.batch_decode(model.generate(ids, **settings)[0, 12:, None])
    n, word = next((n, word) for n, word in enumerate(words) if n and word.isascii() and word.isprintable())
    stopped = model.generate(ids, **settings, stop_strings=[word], tokenizer=tokenizer)
    assert tokenizer.batch_decode(stopped[0, 12:, None]) == words[: words.index(word) + 1]
    assert n < len(words) - 1


# Different experts: the mixture as it is defined.

SETTINGS: dict[str, dict[str, Any]] = {
    **{
        f"{router} top-{k}": {"router": router, "n_active": k}
        for router in ("paper", "filter")
        for k in (1, 2, 4)
    },
    "paper sticky": {"router": "paper", "n_active": 2, "hysteresis": 3.0},
    "filter top-1 sticky": {"n_active": 1, "hysteresis": 2.0},
    "filter top-2 sticky": {"n_active": 2, "hysteresis": 3.0},
    "filter top-3 sticky": {"n_active": 3, "hysteresis": 1.5},
    "filter fixed": {"n_active": 2, "fix_after": 19},
    "filter fixed at the start": {"n_active": 2, "fix_after": 0},
    "paper fixed and sticky": {"router": "paper", "n_active": 2, "fix_after": 17, "hysteresis": 2.0},
    "paper once": {"router": "paper", "n_active": 2, "route": "once"},
    "filter once": {"n_active": 2, "route": "once"},
}
N_TOKENS, N_PROMPT = 45, 12


def mixture(
    made: Ensemble, ids: torch.Tensor, settings: dict[str, Any], n_prompt: int = N_PROMPT
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (T, V) after each token and log weights (T, K), from `mixture.ensemble`."""
    config = CBTMConfig(**{"router_temperature": 0.3, "epsilon": 0.1, "beta": 0.5, **settings})
    with torch.no_grad():
        logits = [load_expert(path)(ids).logits[0] for path in made.experts]
    logprob_KTV = np.stack([logit.log_softmax(-1).numpy() for logit in logits])
    d2_TK = np.concatenate(
        list(route.prefix_distances([np.append(ids[0], 0)], made.embedding_VD, made.centres_KD))
    )
    next_T = np.append(ids[0, 1:], 0)  # the last prediction has no token yet
    said_TK = np.take_along_axis(logprob_KTV, next_T[None, :, None], 2)[..., 0].T
    said_TK[-1] = 0  # the same for all
    fix_after = n_prompt - 1 if config.route == "once" else config.fix_after
    logw_TK = ensemble.filter_log_weights(
        said_TK,
        d2_TK,
        np.array([0, len(next_T)]),
        config.router_temperature,
        1.0 if config.router == "paper" else config.epsilon,  # with epsilon 1, it is the paper's router
        config.beta,
        config.n_active or len(made.centres_KD),
        config.hysteresis,
        fix_after,
    )
    with np.errstate(divide="ignore"):
        mixed_TV = np.log(np.einsum("tk,ktv->tv", np.exp(logw_TK), np.exp(logprob_KTV.astype(np.float64))))
    return mixed_TV, logw_TK


def feed(
    model: CBTMForCausalLM, inputs: dict[str, torch.Tensor], ends: list[int], cache: CBTMCache | None = None
) -> tuple[torch.Tensor, np.ndarray, CBTMCache]:
    """Give the columns up to each of `ends` in turn. All log-probabilities, weights, and the cache."""
    cache = CBTMCache(N_PROMPT) if cache is None else cache
    logits, weights = [], []
    for begin, end in itertools.pairwise([cache.get_seq_length(), *ends]):
        output = model(
            inputs["input_ids"][:, begin:end],
            attention_mask=inputs["attention_mask"][:, :end],
            output_router_weights=True,
            **{modeling_cbtm.CACHE: cache},
        )
        logits.append(output.logits)
        weights.append(output.router_log_weights.numpy())
    return torch.cat(logits, 1), np.concatenate(weights, 1), cache


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_log_probabilities_are_those_of_the_mixture_however_the_text_comes_in(
    different: Ensemble, settings: dict[str, Any]
) -> None:
    ids = text(N_TOKENS, 11)
    expected_TV, logw_TK = mixture(different, ids, settings)
    inputs = padded(ids)
    chunks = [N_PROMPT, 13, 20, 21, 22, 40, N_TOKENS]
    model = load_once(different.folder, **settings)
    for ends in ([N_TOKENS], list(range(1, N_TOKENS + 1)), chunks, [30, N_TOKENS]):
        logits, weights, _ = feed(model, inputs, ends)
        assert_same(logits[0], expected_TV)
        assert_same(np.exp(weights[0]), np.exp(logw_TK))
        assert (np.isneginf(weights[0]) == np.isneginf(logw_TK)).all()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_log_probabilities_are_those_of_the_mixture_after_beams_and_crops(
    different: Ensemble, settings: dict[str, Any]
) -> None:
    first, second = text(N_TOKENS, 11), text(N_TOKENS, 12)
    second[:, :N_PROMPT] = first[:, :N_PROMPT]
    both = padded(first, second)
    model = load_once(different.folder, **settings)
    _, _, cache = feed(model, both, [N_PROMPT, 20, 21, 22])
    cache.reorder_cache(torch.tensor([1, 1]))  # both go on with the second
    logits, _, _ = feed(model, padded(second, second), [23, 30, N_TOKENS], cache)
    expected_TV, _ = mixture(different, second, settings)
    assert_same(logits[0], expected_TV[22:])
    assert_same(logits[1], expected_TV[22:])

    _, _, cache = feed(model, padded(second), [N_PROMPT, 20, 21, 35])
    cache.crop(-11)  # to column 24
    assert cache.get_seq_length() == 24
    cache.crop(0)
    first[:, :24] = second[:, :24]
    logits, _, _ = feed(model, padded(first), [25, 26, 33, N_TOKENS], cache)
    assert_same(logits[0], mixture(different, first, settings)[0][24:])
    cache.crop(19)
    cache.crop(-1)
    logits, _, _ = feed(model, padded(first), [19, N_TOKENS], cache)
    assert_same(logits[0], mixture(different, first, settings)[0][18:])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_padded_batch_changes_nothing(different: Ensemble, settings: dict[str, Any]) -> None:
    sequences = [text(N_TOKENS, 21), text(17, 22), text(30, 23)]
    model = load_once(different.folder, **settings)
    for ends in ([N_TOKENS], [30, 31, 32, N_TOKENS]):
        inputs = padded(*sequences)
        cache = CBTMCache(40)
        logits, weights, _ = feed(model, inputs, ends, cache)
        for i, ids in enumerate(sequences):
            n_pad = N_TOKENS - ids.shape[1]
            expected_TV, logw_TK = mixture(different, ids, settings, 40 - n_pad)
            assert_same(logits[i, n_pad:], expected_TV)
            assert_same(np.exp(weights[i, n_pad:]), np.exp(logw_TK))
            assert torch.isfinite(logits[i]).all()


SLIDING = {
    **{"model_type": "mistral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 12},
}


@pytest.mark.parametrize("kind", [*made_training.MODELS, "sliding"])
def test_experts_of_every_architecture_are_mixed(tmp_path: Path, kind: str) -> None:
    made = made_tiny_ensemble.make(tmp_path, (0, 1, 2), {**made_training.MODELS, "sliding": SLIDING}[kind])
    ids, settings = text(N_TOKENS, 27), {"n_active": 2}
    expected_TV, _ = mixture(made, ids, settings)
    model = load(made, **settings)
    logits, _, cache = feed(model, padded(ids), [N_PROMPT, 13, 14, 30, 40])
    assert_same(logits[0], expected_TV[:40])
    cache.crop(-7)
    logits, _, _ = feed(model, padded(ids), [34, N_TOKENS], cache)
    assert_same(logits[0], expected_TV[33:])
    logits, _, _ = feed(model, padded(text(N_TOKENS, 28), ids[:, :30]), [N_TOKENS])
    assert_same(logits[1, N_TOKENS - 30 :], expected_TV[:30])


def test_padding_on_the_right_and_between_changes_nothing(different: Ensemble) -> None:
    """A turn of a chat in a batch: both sequences go on after a gap, which is as if it were not there."""
    settings = {"n_active": 2, "hysteresis": 1.5}
    model, ids, other = load(different, **settings), text(30, 24), text(38, 26)
    gap, more = torch.full((1, 8), 7), torch.ones(2, 12, dtype=torch.long)
    columns = torch.cat([torch.cat([ids, gap], 1), other])
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(gap)], 1)
    mask = torch.cat([torch.cat([mask, torch.ones_like(other)]), more], 1)
    columns = torch.cat([columns, text(24, 25).reshape(2, 12)], 1)
    expected_TV, logw_TK = mixture(different, columns[:1, mask[0] > 0], settings)
    for ends in ([50], [38, 39, 40, 50], [33, 50]):
        logits, weights, _ = feed(model, {"input_ids": columns, "attention_mask": mask}, ends)
        assert_same(logits[0, mask[0] > 0], expected_TV)
        assert_same(np.exp(weights[0][mask[0] > 0]), np.exp(logw_TK))
        assert_same(logits[1], mixture(different, columns[1:], settings)[0])
        assert torch.isfinite(logits).all()


def test_a_long_text_is_mixed_in_blocks(different: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(200, 31)
    for settings in ({"n_active": 2}, {"n_active": 1}, {"n_active": 2, "hysteresis": 2.0}):
        expected_TV, _ = mixture(different, ids, settings)
        for block in (16, 70, 256):
            monkeypatch.setattr(modeling_cbtm, "BLOCK", block)
            model = load(different, **settings)
            assert_same(model(ids).logits[0], expected_TV)
            assert_same(model(ids, logits_to_keep=3).logits[0], expected_TV[-3:])


def test_labels_give_the_mean_nll(different: Ensemble) -> None:
    ids = text(N_TOKENS, 41)
    expected_TV, _ = mixture(different, ids, {"n_active": 2})
    nll_T = -expected_TV[np.arange(N_TOKENS - 1), ids[0, 1:]]
    model = load(different, n_active=2)
    assert_same(model(ids, labels=ids).loss, nll_T.mean())
    labels = ids.clone()
    labels[:, :N_PROMPT] = -100
    assert_same(model(ids, labels=labels).loss, nll_T[N_PROMPT - 1 :].mean())


def test_generation_from_different_experts_does_not_depend_on_the_way(different: Ensemble) -> None:
    ids = text(30, 51)
    for settings in ({"n_active": 2}, {"n_active": 2, "hysteresis": 2.0, "route": "once"}, {"n_active": 1}):
        model = load(different, **settings)
        ways = [
            {},
            {"use_cache": False},
            {"prefill_chunk_size": 7},
            {"prompt_lookup_num_tokens": 4},
        ]
        generated = [
            model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None, **way)[0].tolist()
            for way in ways
        ]
        assert generated == [generated[0]] * len(ways)


# What runs, and what stays in memory.


class Loads:
    """The names of the experts that the model loaded, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.names: list[str] = []
        load_folder = AutoModelForCausalLM.from_pretrained

        def counted(path: Path, **kwargs: Any) -> Any:
            self.names.append(path.name)
            return load_folder(path, **kwargs)

        monkeypatch.setattr(modeling_cbtm.AutoModelForCausalLM, "from_pretrained", counted)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


def test_an_inactive_expert_is_never_loaded(different: Ensemble, loads: Loads) -> None:
    ids = text(30, 61)
    for settings in ({"n_active": 1}, {"n_active": 2}, {"router": "paper", "n_active": 1, "hysteresis": 5.0}):
        loads.names.clear()
        model = load(different, **settings)
        assert loads.names == []
        logw_TK = model(ids, output_router_weights=True).router_log_weights[0].numpy()
        ran = {str(j) for j in np.flatnonzero(np.isfinite(logw_TK).any(0))}
        assert len(ran) > 0 and len(loads.names) == len(ran) and set(loads.names) == ran
        assert set(model.experts) == ran
    loads.names.clear()
    load(different, n_active=1).generate(ids, do_sample=False, max_new_tokens=1)
    assert len(loads.names) == 1  # before the last column of the prompt, nobody has to speak


def test_memory_holds_at_most_max_loaded_experts(different: Ensemble, loads: Loads) -> None:
    ids = text(60, 62)
    free = load(different, n_active=2)
    expected = feed(free, padded(ids), list(range(10, 61)))[0]
    assert len(free.experts) > 2
    for limit in (1, 2, 3):
        loads.names.clear()
        model, cache = load(different, n_active=2, max_loaded=limit), None
        for end in range(10, 61):
            logits, _, cache = feed(model, padded(ids), [end], cache)
            assert_same(logits[0, -1], expected[0, end - 1])
            assert len(model.experts) <= limit and len(cache.kv) <= max(limit, 2)
        assert len(loads.names) > len(set(loads.names)), "nothing was loaded again: the bound was not tried"


def test_active_experts_do_not_read_anew_where_one_fits_into_memory(different: Ensemble) -> None:
    ids, passes = text(20, 64), []
    for limit in (None, 1):
        model = load(different, n_active=2, fix_after=0, max_loaded=limit)
        feed(model, padded(ids), list(range(1, 21)))
        passes.append(model.n_passes)
    assert passes == [40, 40]


def test_passes_are_those_that_catching_up_costs(different: Ensemble) -> None:
    """Token by token, an expert reads as much as `passes_per_token` counts."""
    ids = text(N_TOKENS, 63)
    for settings in (
        {"n_active": 1},
        {"n_active": 2},
        {"n_active": 2, "hysteresis": 4.0},
        {"router": "paper", "n_active": 2},
    ):
        model = load(different, **settings)
        feed(model, padded(ids), list(range(1, N_TOKENS + 1)))
        _, logw_TK = mixture(different, ids, settings)
        assert model.n_passes == ensemble.passes_per_token(logw_TK, np.array([0, N_TOKENS]))[0]


def test_excluded_experts_are_as_if_they_were_not_there(different: Ensemble, loads: Loads) -> None:
    ids = text(N_TOKENS, 71)
    model = load(different, exclude=["1"])
    assert model.names == ["0", "2", "3"]
    fewer = Ensemble(different.folder, different.embedding_VD, different.centres_KD[[0, 2, 3]])

    class Fewer(Ensemble):
        experts = property(lambda self: [different.experts[j] for j in (0, 2, 3)])  # type: ignore

    expected_TV, _ = mixture(Fewer(*fewer), ids, {})
    output = model(ids, output_router_weights=True)
    assert_same(output.logits[0], expected_TV)
    assert output.router_log_weights.shape == (1, N_TOKENS, 3)
    assert "1" not in loads.names


def test_experts_lie_where_the_device_map_says(different: Ensemble) -> None:
    ids = text(20, 81)
    expected = load(different)(ids).logits
    for device_map in ("cpu", "auto", {"0": "cpu", "1": "cpu:0", "": "cpu"}, {"3": "cpu"}):
        model = load(different, device_map=device_map)
        assert_same(model(ids).logits, expected)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match=r"^device_map: 9. Expected 0, 1, 2, 3. Change it.$"):
        load(different, device_map={"9": "cpu"})
    for loaded in (load, lambda made, **more: AutoModelForCausalLM.from_pretrained(made.folder, **more)):
        model = loaded(different, dtype=torch.bfloat16)
        assert model(ids).logits.dtype == torch.float32
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# The folder.


def test_a_saved_ensemble_is_the_same(different: Ensemble, tmp_path: Path) -> None:
    ids = text(N_TOKENS, 91)
    model = load(different, n_active=2, hysteresis=3.0, route="once")
    model.save_pretrained(tmp_path / "saved")
    again = CBTMForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": again.config._name_or_path}
    assert_same(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "saved")  # onto itself
    assert package.verify(tmp_path / "saved")["changes"][-1]["saved"] == list("0123")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", n_active=1, beta=0.25)
    assert (auto.config.n_active, auto.config.beta, auto.config.hysteresis) == (1, 0.25, 3.0)
    assert auto.generation_config.eos_token_id == 0


def test_the_folder_loads_by_its_own_code(
    different: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for people without the package: the class comes from the folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    found: Any = load_by_own_code(different.folder)
    assert type(found).__module__.startswith("transformers_modules")
    ids = text(20, 92)
    assert_same(found(ids).logits, load(different)(ids).logits)


def load_by_own_code(folder: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind: Any = get_class_from_dynamic_module("modeling_cbtm.CBTMForCausalLM", str(folder))
    return kind.from_pretrained(folder)


# One model of merged weights.


def test_merging_identical_experts_gives_the_expert(identical: Ensemble) -> None:
    ids = text(30, 101)
    one = load_expert(identical.experts[0])
    for settings in ({}, {"n_active": 2, "max_loaded": 1}):
        model = load(identical, mode="merge", **settings)
        with torch.no_grad():
            assert_same(model(ids).logits[0], one(ids).logits[0].log_softmax(-1))
        for way in ("greedy", "sampled", "prompt lookup"):
            generated = []
            for net in (one, model):
                torch.manual_seed(0)
                generated.append(net.generate(ids, **WAYS[way], max_new_tokens=12).tolist())
            assert generated[0] == generated[1]


def test_merged_weights_are_the_mean(different: Ensemble) -> None:
    model = load(different, mode="merge", n_active=2, max_loaded=1)
    merged = dict(model.merge([0.25, 0, 0.75, 0]).named_parameters())
    parts = [dict(load_expert(different.experts[j]).named_parameters()) for j in (0, 2)]
    for name, tensor in merged.items():
        assert_same(tensor.detach(), (0.25 * parts[0][name] + 0.75 * parts[1][name]).detach())
    output = model(text(20, 102), output_router_weights=True)
    assert output.router_log_weights.shape == (1, 20, 4)
    assert torch.isfinite(output.router_log_weights[0, 0]).sum() == 2


def test_merging_for_two_texts_is_refused(different: Ensemble) -> None:
    expected = "^mode merge: 2 sequences. Expected one prompt, as each has its own model. Change it.$"
    with pytest.raises(ValueError, match=expected):
        load(different, mode="merge")(torch.cat([text(9, 1), text(9, 2)]))


# What is refused, in one line.


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"router": "best"}, "router: best. Expected paper or filter. Change it."),
        ({"route": "twice"}, "route: twice. Expected token or once. Change it."),
        ({"mode": "moe"}, "mode: moe. Expected ensemble or merge. Change it."),
        ({"n_active": 0}, "n_active: 0. Expected null or a whole number of at least 1. Change it."),
        ({"n_active": 1.5}, "n_active: 1.5. Expected null or a whole number of at least 1. Change it."),
        ({"max_loaded": -1}, "max_loaded: -1. Expected null or a whole number of at least 1. Change it."),
        ({"fix_after": -1}, "fix_after: -1. Expected null or a whole number of at least 0. Change it."),
        ({"router_temperature": 0}, "router_temperature: 0. Expected a number above 0. Change it."),
        ({"epsilon": 1.1}, "epsilon: 1.1. Expected a number from 0 to 1. Change it."),
        ({"beta": "1"}, "beta: 1. Expected a number of at least 0. Change it."),
        ({"hysteresis": 0.5}, "hysteresis: 0.5. Expected a number of at least 1. Change it."),
        ({"hysteresis": float("nan")}, "hysteresis: nan. Expected a number of at least 1. Change it."),
        ({"exclude": ["9"]}, "exclude: 9. Expected 0, 1, 2, 3. Change it."),
        ({"exclude": list("0123")}, "exclude: every expert. Expected at least one to be left. Change it."),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(
    different: Ensemble, settings: dict[str, Any], line: str
) -> None:
    for attempt in (
        lambda: load(different, **settings),
        lambda: AutoModelForCausalLM.from_pretrained(different.folder, **settings),
        lambda: CBTMConfig(**{"experts": list("0123"), **settings}),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert str(error.value) == line


def test_a_cache_that_cannot_grow_is_refused_in_one_line(different: Ensemble) -> None:
    model, ids = load(different), text(9, 1)
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError) as error:
            model.generate(ids, max_new_tokens=2, cache_implementation=kind)
        line = f"cache_implementation: {kind}. Expected none: each expert has a growing cache. Change it."
        assert str(error.value) == line


def test_other_inputs_are_refused_in_one_line(different: Ensemble) -> None:
    model = load(different)
    with pytest.raises(ValueError, match=r"^inputs_embeds: given. Expected input_ids, "):
        model(None, inputs_embeds=torch.zeros(1, 3, 32))  # type: ignore
    with pytest.raises(ValueError, match=r"^input_ids: 300. Expected ids below 257. Change it.$"):
        model(torch.tensor([[0, 300]]))
    of_an_expert = load_expert(different.experts[0])(text(9, 1), use_cache=True)
    with pytest.raises(ValueError, match=r"^past_key_values: DynamicCache. Expected the ens"):
        model(text(2, 1), **{modeling_cbtm.CACHE: getattr(of_an_expert, modeling_cbtm.CACHE)})
