"""Purifiers g: images → images. One method is one file; the file name is its name on the command line."""

from purifiers._base import Batch, Defense, Purifier
from purifiers._noise import Fresh, Noise, Tape

__all__ = ["Batch", "Defense", "Fresh", "Noise", "Purifier", "Tape"]
