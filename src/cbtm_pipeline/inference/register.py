"""Let transformers know the ensemble, without importing it: `AutoModelForCausalLM` then takes its folder.

`import cbtm_pipeline` calls `register`. As transformers takes seconds to import and may never be needed, this
only adds a finder to Python's list. When transformers is about to import its table of models, the finder
steps in, and the class is registered right after. Nothing is imported here, as every process does it.
"""

import sys
from typing import Any

TABLE = "transformers.models.auto.modeling_auto"
MODEL = "cbtm_pipeline.inference.modeling_cbtm"  # registers itself when it is imported


def register() -> None:
    """Register the class now if transformers has its table already, else as soon as it has."""
    if TABLE in sys.modules:
        _import_model()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_model() -> None:
    """Import the module of the class. A transformers that does not fit must not keep others from using it."""
    import importlib
    import warnings

    try:
        importlib.import_module(MODEL)
    except ImportError as error:
        warnings.warn(f"cbtm_pipeline: AutoModelForCausalLM does not know ensembles ({error})", stacklevel=2)


class _Finder:
    """Finds the table as the other finders do, and lets it be loaded by a `_Loader`. Then it goes."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != TABLE:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class _Loader:
    """Loads a module by another loader, and registers the class after it."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _import_model()
