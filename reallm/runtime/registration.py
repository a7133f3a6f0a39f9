"""Registration with transformers without importing it, so that `import reallm` stays cheap.

transformers has no entry points for quantisation methods, so its registry must be called. If the registry is already
imported, this is done at once. Otherwise an import finder waits for the registry and then registers. If the registry is
being imported at this moment, the finder waits for the module that all models need, which is imported later.

pyproject.toml also names `register_with_transformers` as an entry point of torch, which calls it at `import torch`
wherever reallm is installed. Programs that do not import reallm can then load artifacts too, unless they set torch's
switch TORCH_DEVICE_BACKEND_AUTOLOAD=0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .peft_wrappers import PEFT_WRAPPERS, refuse_packed_modules

REGISTRY = "transformers.quantizers.auto"
MODELS = "transformers.modeling_utils"  # where from_pretrained lives


def _register() -> None:
    try:
        from .transformers_quantizer import register

        register()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"reallm cannot register with the installed transformers ({error}), so transformers cannot load its "
            "artifacts; install a transformers release that reallm supports",
            stacklevel=2,
        )


CALLBACKS = {REGISTRY: _register, MODELS: _register, PEFT_WRAPPERS: refuse_packed_modules}
"""Module -> what to do as soon as it is imported."""


def _is_imported(name: str) -> bool:
    """Whether the module has been imported, and not only begun."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _CallingLoader(Loader):
    """Loads a module with the module's original loader, then calls the module's callback."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        CALLBACKS[module.__name__]()


class CallingFinder(MetaPathFinder):
    """Finds only the modules of CALLBACKS, so that these are called as soon as the modules are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module with a loader that calls back; None for every other module."""
        if fullname not in CALLBACKS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallingLoader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now, or as soon as transformers' registry is imported. A second call has no effect.

    PEFT's check (see `peft_wrappers`) is extended in the same way.
    """
    for name in (REGISTRY, PEFT_WRAPPERS):
        if _is_imported(name):
            CALLBACKS[name]()
    if not any(isinstance(finder, CallingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CallingFinder())
