"""The images of a source by folder: what its layout is judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from shards.items import Items
from shards.source import Listing


class ImageTree:
    """Folders have their whole path as name; '' is the root."""

    def __init__(self, listing: Listing) -> None:
        self.location = listing.location
        self.none = listing.images.take(slice(0))
        """No images, to join others to."""
        self.images: dict[str, Items] = {}
        """Folder -> the images directly in it."""
        numbers: dict[str, int] = {}
        folder_of = np.fromiter(
            (numbers.setdefault(name.rpartition("/")[0], len(numbers)) for name in listing.images.names()),
            np.int32,
            len(listing.images),
        )
        order = np.argsort(folder_of, kind="stable")
        bounds = np.searchsorted(folder_of[order], np.arange(len(numbers) + 1)).tolist()
        for folder, number in numbers.items():
            self.images[folder] = listing.images.take(order[bounds[number] : bounds[number + 1]])
        self.count: Counter[str] = Counter()
        """Folder -> how many images it holds at any depth."""
        for folder, items in self.images.items():
            self.count[folder] += len(items)
            while folder:
                folder = folder.rpartition("/")[0]
                self.count[folder] += len(items)
        self._folders: dict[str, list[str]] = {}
        for folder in sorted(listing.folders):
            self._folders.setdefault(folder.rpartition("/")[0], []).append(folder)

    def folders(self, folder: str) -> list[str]:
        """The folders directly in one, sorted, empty ones too."""
        return self._folders.get(folder, [])

    def filled(self, folder: str) -> list[str]:
        """Those of them that hold images."""
        return [inner for inner in self.folders(folder) if self.count[inner]]

    def all_images(self, folder: str) -> Items:
        """At any depth."""
        found = [self.none]
        pending = [folder]
        while pending:
            folder = pending.pop()
            if folder in self.images:
                found.append(self.images[folder])
            pending += self.filled(folder)
        return Items.join(found)

    def unwrapped(self, folder: str, stop: Callable[[str], bool] = lambda name: False) -> str:
        """The folder itself; where its only images are in one folder of folders, that one, and so on.

        Args:
            stop: whether a folder of this name is more than a wrapping.
        """
        while True:
            inner = self.filled(folder)
            if folder in self.images or len(inner) != 1 or inner[0] in self.images or stop(inner[0].rpartition("/")[2]):
                return folder
            (folder,) = inner
