"""How an image of more than 8 bits, or of several frames, becomes the one that a screen shows."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger("medslip")

# What the grey values of an image come from. A tower that was trained on one of these sees other greys in another.
AS_STORED = "8 bits as stored"
BY_FILE = "the window or table of the file"
BY_HAND = "a window that was given"
STRETCHED = "more than 8 bits between percentiles"
SHOWN = (AS_STORED, BY_FILE, BY_HAND, STRETCHED)


class NoSuchFrame(ValueError):
    """A frame that a file does not have."""


@dataclass(frozen=True)
class Display:
    """What a person wants shown of a file, where the file leaves it open or says something else."""

    frame: int | str = "first"  # first, middle, or a number from 1; of DICOM files and TIFFs
    window: tuple[float, float] | None = None  # center and width, in what the device measured; not of 8-bit images

    def index(self, frames: int) -> int:
        """The frame's number from 0, of a file with so many; NoSuchFrame where it has fewer."""
        if isinstance(self.frame, str):
            return (frames - 1) // 2 if self.frame == "middle" else 0
        if not 1 <= self.frame <= frames:
            raise NoSuchFrame(f"it holds {frames} frames, so there is none of number {self.frame}")
        return self.frame - 1


DISPLAY = Display()
FRAMES = ("first", "middle")


def frame_of(text: str | int, words: Sequence[str] = FRAMES) -> int | str:
    """A catalog's or a flag's frame: one of the words, or a number from 1; ValueError for others."""
    if isinstance(text, str) and text in words:
        return text
    if not str(text).isdecimal() or not int(text):
        raise ValueError(f"unknown frame {text!r}; choose from {', '.join(words)}, or a number from 1")
    return int(text)


def add_frame_argument(parser: argparse.ArgumentParser, help: str, words: Sequence[str] = FRAMES) -> None:
    """--frame, which takes one of the words, or a number from 1."""

    def typed(text: str) -> int | str:
        try:
            return frame_of(text, words)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser.add_argument("--frame", default="first", type=typed, metavar="FRAME", help=help)


_said_first_of = False


def say_first_of(frames: int, name: str, display: Display) -> None:
    """Log that of a file with several frames or pages the first is read: once a process, with the first such name."""
    global _said_first_of
    if frames > 1 and display.frame == "first" and not _said_first_of:
        _said_first_of = True
        log.warning(f"{name} holds {frames} frames or pages: of such files the first is read")
