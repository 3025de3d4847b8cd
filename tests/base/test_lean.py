"""The patches of transformers: each does what it says, and leaves everything else as it was."""

import gc
import subprocess
import sys

import pytest

from cbtm_pipeline.base import lean

IMPORTS = """
import importlib.util, sys
import {before}
from cbtm_pipeline.base import lean

hidden = [name for name in lean.HIDDEN if name != "{before}"]
assert not any(name in sys.modules for name in hidden)
with lean.lean_imports():
    import {before}
    assert sys.modules["{before}"] is not None
    for name in hidden:
        assert sys.modules[name] is None
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{{name}} is visible")
assert not any(name in sys.modules for name in hidden)
assert all(importlib.import_module(name) for name in hidden if importlib.util.find_spec(name))
print(*hidden)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("before", ["json", "scipy"])
def test_packages_that_are_not_imported_yet_are_hidden_for_a_while(before):
    """With SciPy imported before, only the other packages are hidden."""
    assert run(IMPORTS.format(before=before)).split() == [name for name in lean.HIDDEN if name != before]


def test_transformers_imports_without_the_hidden_packages():
    code = "import sys\nfrom cbtm_pipeline.base import lean\nwith lean.lean_imports():\n"
    code += "    import transformers.models.llama.modeling_llama\n"
    code += "print(*(name in sys.modules for name in lean.HIDDEN))"
    assert run(code).split() == ["False"] * len(lean.HIDDEN)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before_even_after_an_error(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), lean.lean_imports():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


PATCH = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils
from cbtm_pipeline.base import lean

check = masking_utils.find_packed_sequence_indices
results = []

def recording(*args, **options):
    results.append(check(*args, **options))
    return results[-1]

masking_utils.find_packed_sequence_indices = recording
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
net = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=32, **sizes))
ids_BT = torch.randint(300, (3, 32))

def logits(**options):
    with torch.no_grad():
        return net(input_ids=ids_BT, use_cache=False, **options).logits

before, n_before = logits(), len(results)
packed_T = torch.arange(32) % 16  # two texts in each sequence
packed = logits(position_ids=packed_T[None])
n_packed = len(results)
lean.assume_unpacked_sequences()
after = logits()
print(n_before, n_packed, len(results), torch.equal(before, after), torch.equal(before, packed))
"""


def test_logits_are_bit_equal_without_the_check_for_packed_sequences():
    """Fails when transformers renames the check, or no longer calls it in a forward pass."""
    assert run(PATCH).split() == ["1", "2", "2", "True", "False"]


def test_a_model_can_be_made_after_transformers_has_seen_every_package() -> None:
    code = (
        "from transformers.utils import is_sklearn_available; is_sklearn_available()\n"
        "from cbtm_pipeline.base.lean import lean_imports\n"
        "with lean_imports():\n    from transformers import LlamaForCausalLM\n"
        "print(LlamaForCausalLM.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "LlamaForCausalLM\n", run.stderr
