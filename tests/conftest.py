"""Hypothesis without deadlines (how long an example takes depends on the machine), the same examples on every run.

HYPOTHESIS_PROFILE=explore draws other examples each time, and more of them: run it after a change to what it covers.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("reallm", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reallm"))
