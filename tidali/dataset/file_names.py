"""What names of files and folders mean: which are images, which are the system's, which name a split, which are the same.

One set of rules for the packer, for folders and zips alike, and for ``tidali predict``. Standard library only.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

from tidali.errors import UsageError, counted
from tidali.files import printable

# By suffix here, by content where a file is opened: a text file named .jpg is a corrupt image, one named .txt is not an image.
_SUFFIXES = (
    "jpg jpeg jpe jfif jif mpo png apng webp bmp dib gif tif tiff ppm pgm pbm pnm jp2 j2k jpc jpx avif avifs heic heif hif"
)
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())

_SYSTEM_NAMES = frozenset(
    name.casefold()
    for name in (
        *("__MACOSX", "Network Trash Folder", "Temporary Items", "TheVolumeSettingsFolder"),  # macOS
        *("@eaDir", "@tmp", "@sharebin", "#recycle", "#snapshot"),  # Synology: thumbnails, deleted and earlier versions
        *("@Recycle", "@Recently-Snapshot", "@__thumb", "~snapshot"),  # QNAP, NetApp
        *("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information", "$Extend"),  # Windows
        *("Thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("lost+found", "__pycache__"),
    )
)
_SNAPSHOT = "@gmt-"  # Samba's earlier versions of a folder: @GMT-2024.01.31-12.00.00

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_WORDS_BESIDE = frozenset(("set", "data", "dataset", "split", "images", "image", "imgs", "img"))  # as in train_set, test-images

# Drawn as nothing, though Unicode does not count them among the format characters: joiners, fillers, variation selectors.
_OTHER_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0" + "".join(map(chr, (*range(0xFE00, 0xFE10), 0x180B, 0x180C)))
_JOINERS = "\u200c\u200d"
"""Invisible, but Persian, Indian scripts and emoji are written with them."""
_MOST_KINDS = 8


# ---------------------------------------------------------------------------------------------------------------- single names


def is_image_name(name: str) -> bool:
    """Whether a file's suffix is that of an image."""
    return name[name.rfind(".") :].rstrip().lower() in IMAGE_SUFFIXES


def left_out_kind(name: str) -> str | None:
    """What images in a folder, or a file, of this name are counted as if it is hidden or an operating system's; else None.

    Such a folder is no part of a data set, but may hold thumbnails, deleted and earlier versions of its images."""
    if name[:1] == ".":
        return "hidden images"
    key = name.casefold()
    if key in _SYSTEM_NAMES or key[:5] == _SNAPSHOT:
        return f"images in {name}"
    return None


def split_of(folder: str) -> str | None:
    """'train', 'val' or 'test' for such a folder's name in any usual spelling ('Training', 'valid', 'test_set'); else None."""
    words = list(filter(None, re.split(r"[\W\d_]+", re.sub(r"(set|data|images|imgs)$", "", name_key(folder)))))
    splits = [_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS]
    return splits[0] if len(splits) == 1 and all(word in _SPLIT_WORDS or word in _WORDS_BESIDE for word in words) else None


def visible_name(name: str) -> str:
    """A name as people see it: in Unicode's composed form (NFC), without invisible characters and spaces around it."""
    if name.isascii() and name.isprintable() and "  " not in name:
        return name.strip()
    composed = unicodedata.normalize("NFC", name)
    return " ".join("".join(filter(_is_visible, composed)).split()).strip(_JOINERS + " ")


def _is_visible(character: str) -> bool:
    if character in _JOINERS or character.isspace():
        return True
    return unicodedata.category(character) not in ("Cf", "Cc") and character not in _OTHER_INVISIBLE


def name_key(name: str) -> str:
    """The same for names that are the same to people: upper and lower case, invisible characters, spaces around the name and
    dots after it (which Windows drops) do not count."""
    seen = visible_name(name)
    for joiner in _JOINERS:
        seen = seen.replace(joiner, "")
    return unicodedata.normalize("NFC", (seen.rstrip(" .") or seen).casefold())


def shown(name: str) -> str:
    """A name in quotes for messages, and its escapes where it is not plain ASCII: letters that look alike are told apart."""
    text = printable(name)
    return repr(text) if text.isascii() else f"{text!r} ({text!a})"


# ----------------------------------------------------------------------------------------------------------- what is left out


def suffix_kind(name: str) -> str:
    """What a file that has no image's suffix is counted as."""
    suffix = os.path.splitext(name.rpartition("/")[2])[1].strip().lower()
    return f"{suffix} files" if 1 < len(suffix) <= 12 else "files without a suffix"


def describe_left_out(counts: Mapping[str, int]) -> str:
    """'40 images in @eaDir, 1 .txt file', the most first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    text = ", ".join(f"{count:,} {kind if count > 1 else _singular(kind)}" for kind, count in ordered[:_MOST_KINDS])
    more = sum(count for _, count in ordered[_MOST_KINDS:])
    return printable(f"{text} and {counted(more, 'other file')}" if more else text)


def _singular(kind: str) -> str:
    return re.sub(r"^(file|image)s\b|\b(file|image)s$", r"\1\2", kind)


def walk(root: str | os.PathLike[str], left_out: Counter[str]) -> Iterator[tuple[str, os.DirEntry[bytes], bool]]:
    """Every file (and broken link) and folder below a folder, unsorted, but for hidden ones and the system's.

    Names are read as bytes and decoded as UTF-8, so that they do not depend on the locale. Links are followed (people link data
    sets together), but not back into a folder above.

    Args:
        left_out: the images in hidden and system folders are counted here.

    Yields:
        The '/'-separated name below ``root`` (bytes that are not UTF-8 as surrogates), the entry, whether it is a folder.

    Raises:
        UsageError: a folder cannot be read, or is a link back to a folder above it.
    """
    top = os.fsencode(root)
    pending: list[tuple[bytes, str, frozenset[tuple[int, int]]]] = [(top, "", frozenset([_identity(os.stat(top))]))]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            raise UsageError(f"{printable_path(folder)}: {error.strerror}") from None
        for entry in entries:
            name = entry.name.decode("utf-8", "surrogateescape")
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder, is_file = False, False
            kind = left_out_kind(name)
            if kind is not None:
                if images := _images_below(entry.path) if is_folder else is_image_name(name):
                    left_out[kind] += images
                continue
            if not is_folder and not is_file and os.path.exists(entry.path):
                left_out["special files"] += 1
                continue
            yield prefix + name, entry, is_folder
            if is_folder:
                identity = _identity(entry.stat())
                if identity in above:
                    raise UsageError(f"{printable_path(entry.path)}: a link back to a folder above it; remove it")
                pending.append((entry.path, f"{prefix}{name}/", above | {identity}))


def printable_path(path: bytes | str | os.PathLike[str]) -> str:
    """A path for messages and manifests: decoded as UTF-8 in every locale."""
    return printable(os.fsencode(path).decode("utf-8", "surrogateescape"))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _images_below(folder: bytes) -> int:
    """Folders that cannot be read are skipped: only root may look into lost+found."""
    count, pending = 0, [folder]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as scan:
            for entry in scan:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    count += is_image_name(entry.name.decode("utf-8", "replace"))
    return count
