"""Sizes of images in pixels, a side or height and width: from flags and JSON, and for people."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from runtime.command_line import positive_int

Size = int | tuple[int, int]  # pixels: the side of a square, or height and width


def as_size(value: int | Sequence[int]) -> Size:
    """A size as it came from a flag, JSON or another library: the side where the two are equal, else (H, W).

    Raises:
        ValueError: neither one nor two whole numbers from 1.
    """
    sides = [value] if isinstance(value, int) else list(value)
    if len(sides) not in (1, 2) or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"an image's size is one number of pixels, or its height and width, not {value}")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def height_width(size: Size) -> tuple[int, int]:
    """Both sides in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size) -> str:
    """For people: 224 or 1520 x 912."""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


class ImageSize(argparse.Action):
    """`--image-size 224`, a square, or `--image-size 1520 912`, height and width, to Size."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs):
        super().__init__(option_strings, dest, nargs="+", type=positive_int, metavar=("H", "W"), **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set the flag's value; one or two numbers, else a usage error."""
        try:
            setattr(namespace, self.dest, as_size(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
