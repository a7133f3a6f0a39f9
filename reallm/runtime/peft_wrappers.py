"""PEFT's `modules_to_save` trains copies of whole modules. A packed matrix has no parameter, so it would stay as it is.

PEFT does not notice that, and would save an adapter in which nothing of the module has been trained. Its check of the
modules that it wraps is therefore extended.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

PEFT_WRAPPERS = "peft.utils.other"
"""The module of PEFT with the wrapper."""
_MARK = "_checks_reallm_modules"


def refuse_packed_modules() -> None:
    """Let PEFT's wrapper raise a UserError for a module with packed matrices. A second call has no effect."""
    wrapper: Any = getattr(sys.modules[PEFT_WRAPPERS], "ModulesToSaveWrapper", None)
    if wrapper is None or hasattr(wrapper, _MARK):
        return
    original = wrapper.check_module

    @wraps(original)
    def check_module(self: Any) -> None:
        original(self)
        check_trainable(self.original_module)

    wrapper.check_module = check_module
    setattr(wrapper, _MARK, True)


def check_trainable(module: Any) -> None:
    """Raise UserError if `module` is a packed matrix, a head that shares one, or holds such modules."""
    from reallm.errors import UserError  # here, because `import reallm` imports this module

    from .experts import ExpertStack
    from .modules import TiedHead
    from .packed import Packed

    for name, inner in module.named_modules():
        if isinstance(inner, (Packed, TiedHead, ExpertStack)):
            what = f"{name} in a {type(module).__name__}" if name else f"a {type(module).__name__}"
            raise UserError(
                f"modules_to_save cannot train {what}: its weight is packed and would stay as it is; train it with "
                "target_modules or `reallm finetune`, or call model.dequantize() first"
            )
