"""Makes `benchmarks` importable without its parent folder, whose other folders have the names of other packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("benchmarks")
package.__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
sys.modules.setdefault("benchmarks", package)
