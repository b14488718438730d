"""The error of an image file that cannot be used."""

from __future__ import annotations


class Unusable(Exception):
    """The bytes are not a usable image; the text says why."""


class TooLarge(Unusable):
    """Its header declares more pixels than are allowed."""
