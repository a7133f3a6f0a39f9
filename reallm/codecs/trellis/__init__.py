"""Trellis codes (QTIP)."""
