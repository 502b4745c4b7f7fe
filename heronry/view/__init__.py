"""Drawings of what models do: figures.py draws arrays, the other files compute them from a model."""

from .figures import draw_class_maps, draw_decays, draw_q_shift, draw_receptive_fields

__all__ = ["draw_class_maps", "draw_decays", "draw_q_shift", "draw_receptive_fields"]
