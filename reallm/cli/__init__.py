"""The commands, by what they are about.

torch and transformers are imported inside them, so that --help answers at once.
"""
