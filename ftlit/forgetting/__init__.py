"""Measuring, and controlling, what a model forgets while it learns."""
