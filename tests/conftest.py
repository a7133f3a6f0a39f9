"""Hypothesis without deadlines: how long an example takes depends on the machine, not on the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("reallm", deadline=None)
settings.load_profile("reallm")
