"""Targets: engines that run a compressed model unchanged, and the files that they load."""
