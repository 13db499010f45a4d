"""A folder of images, one folder a class."""

from __future__ import annotations

import importlib.util
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsIndex

import numpy
import torch
from torch.utils.data import Dataset

from mpiddl.data.reading.files import reading
from mpiddl.errors import DataError

__all__ = ["ImageFolder"]

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
MODES = ("L", "RGB", "RGBA")


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images in ``root/<class>/``, read when they are asked for. Needs Pillow.

    Folders inside a class's folder are searched, too; files of other types, files beside the
    classes' folders and hidden files are left out. The order is that of the names, on every file
    system.

    Each sample is an image, float32 in 0..1, (channels, height, width), and its class's number.

    Args:
        root: The folder of the classes' folders.
        size: (height, width) to which images are scaled, or one number for both; without, images
            of different sizes do not fit into one batch.
        mode: "RGB", "L" (grey, one channel) or "RGBA".
        transform: Called with every image; what it returns takes the image's place. Loader
            workers need one that is defined at the top of a module.

    Attributes:
        classes: Names of the classes, sorted.
        paths: Of all images.
        labels: Their classes' numbers, int64, (images,).

    Raises:
        DataError: Pillow or the folder is missing, or a class has no image. When an image is read:
            it is broken, or has more than 8 bits a channel.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | tuple[int, int] | None = None,
        mode: str = "RGB",
        transform: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise DataError("ImageFolder needs Pillow: pip install 'mpiddl[images]'")
        if mode not in MODES:
            raise DataError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and min(self.size) < 1:
            raise DataError(f"size must be positive, got {size}")
        self.mode = mode
        self.transform = transform
        self.classes = _classes(root)
        found = [_images(os.path.join(root, name)) for name in self.classes]
        for name, images in zip(self.classes, found, strict=True):
            if not images:
                raise DataError(
                    f"class {name!r} has no image in {root}; add some, or remove the folder"
                )
        self.paths = [path for images in found for path in images]
        counts = torch.tensor([len(images) for images in found], device="cpu")
        self.labels = torch.repeat_interleave(torch.arange(len(found), device="cpu"), counts)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: SupportsIndex) -> tuple[Any, int]:
        place = operator.index(index)
        image = self._image(self.paths[place])
        return (image if self.transform is None else self.transform(image)), int(self.labels[place])

    def _image(self, path: str) -> torch.Tensor:
        from PIL import Image

        with reading(path, "an image that Pillow can read"), Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has more than 8 bits a channel ({image.mode}), which would be cut off;"
                    " convert it, or read it in a data set of your own"
                )
            converted = image.convert(self.mode)
            if self.size is not None:
                height, width = self.size
                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(numpy.array(converted))  # (height, width) or (..., channels)
        planes = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return planes.contiguous().to(torch.float32).div_(255)


def _classes(root: str | os.PathLike[str]) -> list[str]:
    with reading(root, "a folder"), os.scandir(root) as entries:
        names = sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )
    if not names:
        raise DataError(f"{root} has no folders; images belong into {root}/<class>/")
    return names


def _images(folder: str) -> list[str]:
    """Paths of all images in and below a folder, in the order of their names."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; check its permissions")

    found = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(where, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)
