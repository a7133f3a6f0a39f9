"""Hypothesis profiles: no deadlines, because the time of an example depends on the machine, and fixed examples.

HYPOTHESIS_PROFILE=explore draws new examples on each run, and more of them: use it after changing the code under test.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("reallm", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reallm"))
