"""Readers of published checkpoints: key names, layouts and layer orders of other trainers."""
