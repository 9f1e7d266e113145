"""Preparation of RedCaps: its annotation files to the one list that `--dataset redcaps` reads."""
