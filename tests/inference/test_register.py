"""`import cbtm_pipeline` and what transformers knows afterwards; each case in a Python of its own."""

import subprocess
import sys

import pytest

KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
config = AutoConfig.for_model("cbtm", experts=["0"])
print(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__)
"""


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_import_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import cbtm_pipeline; print(*set(sys.modules) - before)"
    found = set(python(f"import typing\n{code}").split())
    assert found == {"cbtm_pipeline", "cbtm_pipeline.inference", "cbtm_pipeline.inference.register"}


@pytest.mark.parametrize(
    "first",
    [
        "import cbtm_pipeline",
        "from transformers import AutoModelForCausalLM\nimport cbtm_pipeline",
        "import cbtm_pipeline\nfrom transformers import LlamaForCausalLM",
        "import cbtm_pipeline\nfrom transformers import AutoTokenizer",
        "import cbtm_pipeline\nimport cbtm_pipeline.inference.modeling_cbtm",
    ],
)
def test_transformers_knows_the_class_whatever_is_imported_first(first: str) -> None:
    assert python(first + KNOWN) == "cbtm_pipeline.inference.modeling_cbtm\n"


def test_the_table_of_models_is_loaded_as_ever() -> None:
    code = "import sys, cbtm_pipeline\nfrom transformers.models.auto import modeling_auto as table\n"
    code += "print(type(table.__loader__).__name__, table.__spec__.loader is table.__loader__, "
    code += "sum(type(f).__module__.startswith('cbtm') for f in sys.meta_path))"
    assert python(code) == "SourceFileLoader True 0\n"


def test_a_class_that_cannot_be_imported_leaves_transformers_as_it_is() -> None:
    code = "import warnings, sys, cbtm_pipeline\nwarnings.simplefilter('always')\n"
    code += "sys.modules['cbtm_pipeline.inference.modeling_cbtm'] = None\n"  # importing it raises ImportError
    code += "from transformers import AutoModelForCausalLM\nprint(AutoModelForCausalLM.__name__)"
    assert python(code) == "AutoModelForCausalLM\n"
