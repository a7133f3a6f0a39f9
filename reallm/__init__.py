"""reallm fits a language model into a memory budget with the least possible loss. See docs/architecture.md.

Importing it makes transformers understand reallm's model directories; nothing heavy is imported for that.
"""

from .registration import register_with_transformers

register_with_transformers()
