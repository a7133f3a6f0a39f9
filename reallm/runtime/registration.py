"""Registration with transformers without importing it, so that `import reallm` stays cheap.

transformers has no entry points for quantisation methods, so its registry must be called. If its models are already
imported, this is done at once. Otherwise an import finder waits for the module that all models need and then registers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODELS = "transformers.modeling_utils"  # where from_pretrained lives


def _register() -> None:
    from .transformers_quantizer import register

    register()


class _RegisteringLoader(Loader):
    """Loads a module with the module's original loader, then registers reallm with transformers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class ModelsFinder(MetaPathFinder):
    """Finds only `transformers.modeling_utils`, so that reallm is registered as soon as it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of `transformers.modeling_utils` with a loader that registers; None for every other module."""
        if fullname != MODELS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now, or as soon as transformers' models are imported. A second call has no effect."""
    if MODELS in sys.modules:
        _register()
    elif not any(isinstance(finder, ModelsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ModelsFinder())
