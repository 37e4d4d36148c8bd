"""Where images come from: files under one root folder, in whichever layout they are found, or no files at all.

A root may hold a dataset as torchvision keeps it, as the Hugging Face hub keeps it (parquet), or as a folder of images for each
class, directly or in a folder named after the dataset. What was decoded is kept by `fedsim.data.cache`.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedsim.checks import one_of, whole
from fedsim.data import cache, synthetic, text
from fedsim.data.images import Dataset, Images
from fedsim.data.text import Corpus
from fedsim.seeding import generator

CACHE_VERSION = 1  # raise it when the same files would be decoded to other tensors
SPLITS = ("train", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class DataNotFound(ValueError):
    """There are no images where they were looked for; the message says where that was and how to get them."""


@dataclass(frozen=True)
class Known:
    """What is known of a dataset before it is read.

    torchvision  name of its class there
    trace        a path below the root that shows torchvision's layout
    parquet      the folder of its parquet files
    shape        (C, H, W)
    """

    torchvision: str
    trace: str
    parquet: str
    shape: tuple[int, int, int]
    num_classes: int = 10


KNOWN = {
    "cifar10": Known("CIFAR10", "cifar-10-batches-py", "plain_text", (3, 32, 32)),
    "cifar100": Known("CIFAR100", "cifar-100-python", "cifar100", (3, 32, 32), 100),
    "mnist": Known("MNIST", "MNIST/raw", "mnist", (1, 28, 28)),
    "fashion_mnist": Known("FashionMNIST", "FashionMNIST/raw", "fashion_mnist", (1, 28, 28)),
    "svhn": Known("SVHN", "train_32x32.mat", "cropped_digits", (3, 32, 32)),
}
NAMES = ("synthetic", *KNOWN, "text")


def load(
    name: str,
    root: str | Path | None = None,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    side: int | None = None,
    seed: int = 0,
    download: bool = False,
    progress: bool = True,
) -> Dataset | Corpus:
    """The dataset `name`, read from `root` ($FEDSIM_DATA, or ~/.cache/fedsim/data).

    `train_size` and `test_size` take a random subset, the same for the same `seed`; for `synthetic` they say how many images are
    made (50,000 and 10,000), and the seed is that of the images. `download` lets torchvision fetch what is not there. Images are
    resized to `side` x `side` pixels.

    `text` is a corpus of sentences, drawn by a grammar (5,000 and 500 of them) or, with a `root`, read from that text file.
    """
    one_of("dataset", name, NAMES)
    for setting, value in (("train_size", train_size), ("test_size", test_size)):
        if value is not None and value < 1:
            raise ValueError(f"{setting} must be at least 1, got {value}")
    if side is not None:
        whole("side", side, 8, 512)
    if name == "synthetic":
        return _resized(_synthetic(train_size or 50_000, test_size or 10_000, seed, progress), side, progress)
    if name == "text":
        if side is not None:
            raise ValueError(f"side is for images, and data=text has none, got {side}")
        if root is None:
            return text.drawn(train_size or 5_000, test_size or 500, seed)
        return text.read(Path(root).expanduser(), train_size, test_size, seed)
    source = _find(name, _root(root))
    if source is None and download:
        source = _download(name, _root(root))
    if source is None:
        raise _not_found(name, _root(root))
    dataset = _whole(source, progress, download=download)
    dataset = replace(
        dataset,
        train=_subset(dataset.train, train_size, seed, "train"),
        test=_subset(dataset.test, test_size, seed, "test"),
    )
    return _resized(dataset, side, progress)


def _whole(source: "Source", progress: bool, *, download: bool) -> Dataset:
    """What the files hold, decoded once. `download` fetches what an earlier download, broken off, has left out."""
    dataset = cache.read(cache.path_of(source.name, source.key()))
    if dataset is None:
        try:
            dataset = source.read(progress)
        except DataNotFound:
            if not download or not isinstance(source, Torchvision):
                raise
            dataset = _download(source.name, source.root).read(progress)
        cache.write(cache.path_of(source.name, source.key()), dataset)
    return dataset


def check(name: str, root: str | Path | None = None, *, download: bool = False) -> None:
    """Raises DataNotFound when `load` would find nothing, without reading an image. What can be downloaded is taken as found."""
    one_of("dataset", name, NAMES)
    if name == "text" and root is not None and not Path(root).expanduser().is_file():
        raise DataNotFound(f"no text file at {root}: set data.root to a file with one sentence on each line, or leave it out")
    if name not in ("synthetic", "text") and not download and _find(name, _root(root)) is None:
        raise _not_found(name, _root(root))


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("FEDSIM_DATA") or cache.folder() / "data").expanduser()


def _not_found(name: str, root: Path) -> DataNotFound:
    known = KNOWN[name]
    return DataNotFound(
        f"no {name} under {root}: looked there and in {name}/ for {known.trace}, {known.parquet}/train-*.parquet and "
        f"train/<class>/*.png; set data.root (or FEDSIM_DATA) to the folder that holds it, set data.download=true to fetch it, "
        f"or choose data=synthetic, which needs no files"
    )


def _subset(images: Images, size: int | None, seed: int, split: str) -> Images:
    if size is None or size == len(images):
        return images
    if size > len(images):
        raise ValueError(f"{split}_size must be at most the {len(images)} images there are, got {size}")
    return images.take(torch.randperm(len(images), generator=generator(seed, "subset", split))[:size].sort().values)


def image_shape(name: str, side: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that `load` makes of the dataset `name`."""
    one_of("dataset", name, NAMES)
    channels, height, width = KNOWN[name].shape if name in KNOWN else (3, synthetic.SIDE, synthetic.SIDE)
    return (channels, side, side) if side else (channels, height, width)


def _resized(dataset: Dataset, side: int | None, progress: bool) -> Dataset:
    """The dataset with its images resized by averaging neighbours, as many as a pixel covers (bilinear with antialiasing)."""
    if side is None or dataset.image_shape[1:] == (side, side):
        return dataset
    count = len(dataset.train) + len(dataset.test)
    with _bar(f"resizing {dataset.name} to {side}x{side}", count, progress) as advance:

        def resized(images: Images) -> Images:
            pixels = images.pixels.new_empty(len(images), images.pixels.shape[1], side, side)
            for start in range(0, len(images), 500):
                part = images.pixels[start : start + 500].float()
                made = F.interpolate(part, (side, side), mode="bilinear", antialias=True, align_corners=False)
                pixels[start : start + 500] = made.round().clamp(0, 255).byte()
                advance(len(part))
            return Images(pixels, images.labels)

        return replace(dataset, train=resized(dataset.train), test=resized(dataset.test))


def _synthetic(train_size: int, test_size: int, seed: int, progress: bool) -> Dataset:
    path = cache.path_of("synthetic", _digest("synthetic", synthetic.VERSION, train_size, test_size, seed))
    worth_keeping = train_size + test_size >= 10_000  # fewer are made in less time than a file is read
    dataset = cache.read(path) if worth_keeping else None
    if dataset is None:
        with _bar("drawing synthetic images", train_size + test_size, progress) as advance:
            train, test = (
                Images(*synthetic.images(size, seed=seed, split=split, advance=advance))
                for split, size in zip(SPLITS, (train_size, test_size), strict=True)
            )
        dataset = Dataset("synthetic", train, test, synthetic.CLASSES)
        if worth_keeping:
            cache.write(path, dataset)
    return dataset


@dataclass(frozen=True)
class Torchvision:
    """A dataset in torchvision's own layout. CIFAR's files are pickles: it opens them only if their checksums are right."""

    name: str
    root: Path

    def key(self) -> str:
        """Stands for the files the dataset would be read from."""
        trace = self.root / KNOWN[self.name].trace
        files = sorted(trace.iterdir()) if trace.is_dir() else sorted(self.root.glob("*_32x32.mat"))
        return _digest_of_files(self.name, self.root, files)

    def read(self, progress: bool) -> Dataset:
        """The whole dataset; there is no progress to show."""
        try:
            train, test = self.splits(download=False)
        except (RuntimeError, EOFError, OSError) as error:
            says = _one_line(error).removesuffix("You can use download=True to download it").rstrip(" .")
            way_out = "set data.download=true to fetch what is missing"
            raise DataNotFound(f"{self.name} under {self.root} is incomplete or damaged: {says}; {way_out}") from error
        classes = tuple(getattr(train, "classes", None) or map(str, range(KNOWN[self.name].num_classes)))
        return _dataset(self.name, self.root, self.images(train), self.images(test), classes)

    def splits(self, *, download: bool) -> tuple[Any, Any]:
        """torchvision's training and test set."""
        import torchvision

        kind = getattr(torchvision.datasets, KNOWN[self.name].torchvision)
        if self.name == "svhn":
            return tuple(kind(self.root, split=split, download=download) for split in SPLITS)
        return tuple(kind(self.root, train=split == "train", download=download) for split in SPLITS)

    def images(self, split: Any) -> Images:
        """One of its splits: CIFAR is held (N, H, W, C), MNIST (N, H, W), SVHN (N, C, H, W)."""
        pixels = torch.as_tensor(split.data)
        if self.name.startswith("cifar"):
            pixels = pixels.permute(0, 3, 1, 2)
        elif pixels.dim() == 3:
            pixels = pixels.unsqueeze(1)
        labels = split.labels if self.name == "svhn" else split.targets
        return Images(pixels.contiguous(), torch.as_tensor(labels, dtype=torch.int64))


@dataclass(frozen=True)
class Parquet:
    """A dataset as the Hugging Face hub keeps it: encoded images and labels in `<split>-*.parquet`."""

    name: str
    folder: Path

    def files(self, split: str) -> list[Path]:
        """The files of one split, in order."""
        return sorted(self.folder.glob(f"{split}-*.parquet"))

    def key(self) -> str:
        """Stands for the files the dataset would be read from."""
        return _digest_of_files(self.name, self.folder, [file for split in SPLITS for file in self.files(split)])

    def read(self, progress: bool) -> Dataset:
        """The whole dataset, its images decoded."""
        train, classes = self.split("train", progress)
        test, _ = self.split("test", progress)
        return _dataset(self.name, self.folder, train, test, classes)

    def split(self, split: str, progress: bool) -> tuple[Images, tuple[str, ...]]:
        """One split, and the names of the classes where the files tell them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pa.concat_tables([pq.read_table(file) for file in self.files(split)])
        except (OSError, pa.ArrowException) as error:
            raise DataNotFound(f"{self.name} under {self.folder} is incomplete or damaged: {_one_line(error)}") from error
        image, label = (
            next((column for column in choices if column in table.column_names), None)
            for choices in (("img", "image"), ("label", "fine_label"))
        )
        if image is None or label is None:
            raise ValueError(f"{split} files in {self.folder} have no columns img and label, but {', '.join(table.column_names)}")
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        classes = tuple(features.get(label, {}).get("names") or map(str, range(KNOWN[self.name].num_classes)))
        encoded = table[image].combine_chunks().field("bytes")
        pixels = _decode(self.name, len(encoded), lambda i: io.BytesIO(encoded[i].as_buffer()), f"{self.name} {split}", progress)
        return Images(pixels, torch.from_numpy(table[label].to_numpy().astype(np.int64))), classes


@dataclass(frozen=True)
class ImageFolder:
    """A dataset as image files, `<split>/<class>/<file>`; the classes are numbered in the order of their names."""

    name: str
    folder: Path

    def files(self, split: str) -> list[Path]:
        """The image files of one split, class by class."""
        return sorted(file for file in (self.folder / split).glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)

    def key(self) -> str:
        """Stands for the files the dataset would be read from."""
        return _digest_of_files(self.name, self.folder, [file for split in SPLITS for file in self.files(split)])

    def read(self, progress: bool) -> Dataset:
        """The whole dataset, its images decoded."""
        classes = tuple(sorted(entry.name for entry in (self.folder / "train").iterdir() if entry.is_dir()))
        number = {name: i for i, name in enumerate(classes)}
        train, test = (self.split(split, number, progress) for split in SPLITS)
        return _dataset(self.name, self.folder, train, test, classes)

    def split(self, split: str, number: dict[str, int], progress: bool) -> Images:
        """One split, labelled by the `number` of each class."""
        files = self.files(split)
        strange = {file.parent.name for file in files} - set(number)
        if strange or not files:
            what = f"classes that train/ has not: {', '.join(sorted(strange))}" if strange else "no images"
            raise ValueError(f"{self.folder / split} has {what}")
        labels = torch.tensor([number[file.parent.name] for file in files])
        return Images(_decode(self.name, len(files), lambda i: files[i], f"{self.name} {split}", progress), labels)


Source = Torchvision | Parquet | ImageFolder


def _find(name: str, root: Path) -> Source | None:
    known = KNOWN[name]
    for folder in (root, root / name):
        if (folder / known.trace).exists():
            return Torchvision(name, folder)
    for folder in (root / known.parquet, root / name / known.parquet, root / name / "data", root / name, root):
        parquet = Parquet(name, folder)
        if parquet.files("train") and parquet.files("test"):
            return parquet
    for folder in (root / name, root):
        images = ImageFolder(name, folder)
        if all(next((folder / split).glob("*/*"), None) for split in SPLITS) and images.files("train"):
            return images
    return None


def _download(name: str, root: Path) -> Source:
    source = Torchvision(name, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        source.splits(download=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise DataNotFound(f"could not download {name} to {root}: {_one_line(error)}") from error
    return source


def _dataset(name: str, place: Path, train: Images, test: Images, classes: tuple[str, ...]) -> Dataset:
    """A dataset whose files hold what its name promises."""
    known = KNOWN[name]
    for split, images in zip(SPLITS, (train, test), strict=True):
        if not len(images):
            raise ValueError(f"{place} has no {split} images")
        low, high = int(images.labels.min()), int(images.labels.max())
        if len(classes) != known.num_classes or low < 0 or high >= known.num_classes:
            found = f"{len(classes)} classes and {split} labels from {low} to {high}"
            raise ValueError(f"{name} has {known.num_classes} classes, but {place} has {found}")
    return Dataset(name, train, test, classes)


def _decode(name: str, count: int, open_image: Callable[[int], Any], description: str, progress: bool) -> torch.Tensor:
    """Pixels (count, C, H, W) of encoded images, decoded in parallel since Pillow releases the interpreter lock."""
    from PIL import Image

    channels, height, width = KNOWN[name].shape
    pixels = np.empty((count, channels, height, width), dtype=np.uint8)

    def decode(places: range) -> int:
        for i in places:
            try:
                with Image.open(open_image(i)) as image:
                    array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
            except OSError as error:
                raise ValueError(f"image {i} of {description} does not decode: {_one_line(error)}") from error
            if array.shape[:2] != (height, width):
                raise ValueError(
                    f"{name} has images of {height}x{width}, but image {i} of {description} is {array.shape[0]}x{array.shape[1]}"
                )
            pixels[i] = array.reshape(height, width, channels).transpose(2, 0, 1)
        return len(places)

    chunks = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, _bar(f"decoding {description}", count, progress) as advance:
        for done in pool.map(decode, chunks):
            advance(done)
    return torch.from_numpy(pixels)


@contextmanager
def _bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((CACHE_VERSION, *parts)).encode()).hexdigest()


def _digest_of_files(name: str, folder: Path, files: Sequence[Path]) -> str:
    def facts() -> Iterator[tuple[str, int, int]]:
        for file in files:
            status = file.stat()
            yield str(file.relative_to(folder)), status.st_size, status.st_mtime_ns

    return _digest(name, *facts())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
