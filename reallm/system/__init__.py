"""Locks, memory and threads of this machine."""
