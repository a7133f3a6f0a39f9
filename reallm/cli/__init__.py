"""The command line: one module for each group of commands.

Commands import torch and transformers in their bodies, so that --help answers immediately.
"""
