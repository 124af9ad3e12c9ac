"""Layers that models share. Each declares its weights once: shape, dtype and logical axes. Pure functions."""
