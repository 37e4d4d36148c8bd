"""Where images come from, who holds them, and which of them a client trains on in a round."""

import hashlib
import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedsim import data
from fedsim.data import (
    IID,
    ByClass,
    DataNotFound,
    Dirichlet,
    Images,
    SizeSkewed,
    batch_of,
    batches_of,
    load,
    partition,
    sources,
    synthetic,
)
from fedsim.seeding import generator

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 23, "test": 11}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def count_decoding(monkeypatch):
    """A list that grows by one for each split that is decoded."""
    decoded, decode = [], sources._decode
    monkeypatch.setattr(sources, "_decode", lambda *args: decoded.append(args[0]) or decode(*args))
    return decoded


def pictures(split, side=32, mode="RGB"):
    """Smooth images (N, H, W[, C]), which JPEG keeps nearly unchanged, and labels that use all ten classes."""
    n, rng = COUNTS[split], np.random.default_rng(len(split))
    coarse = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    big = np.stack([np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse])
    return (big if mode == "RGB" else big[..., 0]), np.arange(n) % 10


def encoded(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_parquet(folder, kind="PNG", columns=("img", "label"), names=CIFAR_CLASSES, side=32, mode="RGB", parts=1):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        pixels, labels = pictures(split, side, mode)
        for part, places in enumerate(np.array_split(np.arange(len(labels)), parts)):
            images = [{"bytes": encoded(pixels[i], kind), "path": None} for i in places]
            table = pa.table({columns[0]: images, columns[1]: labels[places]})
            if names:
                features = f'{{"info": {{"features": {{"{columns[1]}": {{"names": {list(names)}}}}}}}}}'.replace("'", '"')
                table = table.replace_schema_metadata({"huggingface": features})
            pq.write_table(table, folder / f"{split}-{part:05d}-of-{parts:05d}.parquet")


def write_folder(root, kind="PNG"):
    for split in COUNTS:
        for i, (pixels, label) in enumerate(zip(*pictures(split), strict=True)):
            file = root / split / CIFAR_CLASSES[label] / f"{i:03d}.{kind.lower()}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(pixels, kind))


def write_torchvision(root, monkeypatch):
    """CIFAR-10's pickled batches with few images; torchvision is told the checksums of these instead of the published ones."""
    kind = pytest.importorskip("torchvision").datasets.CIFAR10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batches(split, names):
        pixels, labels = pictures(split)
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(labels), 3072)
        for name, places in zip(names, np.array_split(np.arange(len(labels)), len(names)), strict=True):
            yield write(name, {"batch_label": name, "labels": labels[places].tolist(), "data": rows[places], "filenames": []})

    monkeypatch.setattr(kind, "train_list", list(batches("train", [f"data_batch_{i}" for i in range(1, 6)])))
    monkeypatch.setattr(kind, "test_list", list(batches("test", ["test_batch"])))
    meta = write("batches.meta", {"label_names": list(CIFAR_CLASSES), "num_vis": 3072, "num_cases_per_batch": 10_000})
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta[1]})


def assert_is_what_was_written(dataset, tolerance=0):
    assert dataset.classes == CIFAR_CLASSES
    for split in COUNTS:
        pixels, labels = pictures(split)
        images = getattr(dataset, split)
        order = (
            np.argsort(labels, kind="stable") if images.labels.diff().min() >= 0 else slice(None)
        )  # a folder is read class by class
        assert images.labels.tolist() == labels[order].tolist()
        gap = images.pixels.permute(0, 2, 3, 1).numpy().astype(int) - pixels[order].astype(int)
        assert np.abs(gap).mean() <= tolerance


# Reading files


@pytest.mark.parametrize("place", ["plain_text", "cifar10/plain_text", "cifar10", "."])
@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("JPEG", 2)])
def test_parquet_is_read_wherever_it_lies(tmp_path, place, kind, tolerance):
    write_parquet(tmp_path / place, kind)
    data.check("cifar10", tmp_path)
    assert_is_what_was_written(load("cifar10", tmp_path), tolerance)


def test_parquet_in_several_parts_is_one_split(tmp_path):
    write_parquet(tmp_path / "plain_text", parts=3)
    assert_is_what_was_written(load("cifar10", tmp_path))


def test_grey_parquet_without_class_names_is_read(tmp_path):
    write_parquet(tmp_path / "mnist", columns=("image", "label"), names=None, side=28, mode="L")
    mnist = load("mnist", tmp_path)
    assert mnist.image_shape == (1, 28, 28)
    assert mnist.classes == tuple("0123456789")
    assert np.array_equal(mnist.train.pixels[:, 0].numpy(), pictures("train", 28, "L")[0])


@pytest.mark.parametrize("place", [".", "cifar10"])
def test_a_folder_of_images_is_read(tmp_path, place):
    write_folder(tmp_path / place)
    assert_is_what_was_written(load("cifar10", tmp_path))


@pytest.mark.parametrize("place", [".", "cifar10"])
def test_torchvision_s_layout_is_read(tmp_path, monkeypatch, place):
    write_torchvision(tmp_path / place, monkeypatch)
    data.check("cifar10", tmp_path)
    assert_is_what_was_written(load("cifar10", tmp_path))


def test_a_pickle_with_a_wrong_checksum_is_never_opened(tmp_path, monkeypatch):
    write_torchvision(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(DataNotFound, match="incomplete or damaged"):
        load("cifar10", tmp_path)


def test_the_root_is_taken_from_the_environment(tmp_path, monkeypatch):
    write_parquet(tmp_path / "there" / "plain_text")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "there"))
    assert len(load("cifar10").train) == 23


def test_missing_data_are_answered_with_the_ways_to_get_them(tmp_path):
    for ask in (data.check, load):
        with pytest.raises(DataNotFound) as error:
            ask("cifar10", tmp_path)
        message = str(error.value)
        assert "\n" not in message
        for part in (
            str(tmp_path),
            "cifar-10-batches-py",
            "plain_text/train-*.parquet",
            "FEDSIM_DATA",
            "data.download=true",
            "synthetic",
        ):
            assert part in message
    data.check("synthetic", tmp_path)


def test_a_download_that_fails_is_one_clear_line(tmp_path, monkeypatch):
    def refuse(self, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(sources.Torchvision, "splits", refuse)
    data.check("cifar10", tmp_path, download=True)
    with pytest.raises(DataNotFound, match=r"^could not download cifar10 to .*: no route to host$"):
        load("cifar10", tmp_path, download=True)


def test_a_download_that_was_broken_off_is_finished_by_the_next(tmp_path, monkeypatch):
    splits, asked = sources.Torchvision.splits, []

    def served(self, *, download):
        asked.append(download)
        if download:
            (tmp_path / "cifar-10-batches-py").rmdir()
            write_torchvision(tmp_path, monkeypatch)
        return splits(self, download=False)

    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(
        DataNotFound, match=r"^cifar10 under .* is incomplete or damaged: .*; set data.download=true to fetch"
    ) as told:
        load("cifar10", tmp_path)
    assert "download=True" not in str(told.value)
    monkeypatch.setattr(sources.Torchvision, "splits", served)
    assert_is_what_was_written(load("cifar10", tmp_path, download=True))
    assert asked == [False, True, False]
    assert_is_what_was_written(load("cifar10", tmp_path, download=True))
    assert asked == [False, True, False], "it is kept as what the whole files hold"


def test_files_that_hold_something_else_are_refused(tmp_path):
    write_parquet(tmp_path / "a", side=28)
    with pytest.raises(ValueError, match="cifar10 has images of 32x32, but image 0 of cifar10 train is 28x28"):
        load("cifar10", tmp_path / "a")
    write_parquet(tmp_path / "b")
    with pytest.raises(ValueError, match=r"cifar100 has 100 classes, but .* has 10 classes and train labels from 0 to 9"):
        load("cifar100", tmp_path / "b")
    write_parquet(tmp_path / "c", columns=("picture", "label"))
    with pytest.raises(ValueError, match="no columns img and label, but picture, label"):
        load("cifar10", tmp_path / "c")
    write_folder(tmp_path / "d")
    (tmp_path / "d" / "test" / "cat").rename(tmp_path / "d" / "test" / "lynx")
    with pytest.raises(ValueError, match="test has classes that train/ has not: lynx"):
        load("cifar10", tmp_path / "d")
    write_folder(tmp_path / "e")
    next((tmp_path / "e" / "train" / "dog").iterdir()).write_bytes(b"not an image")
    with pytest.raises(ValueError, match="of cifar10 train does not decode"):
        load("cifar10", tmp_path / "e")
    write_parquet(tmp_path / "f")
    next((tmp_path / "f").glob("test-*")).write_bytes(b"PAR1 cut off")
    with pytest.raises(DataNotFound, match="incomplete or damaged"):
        load("cifar10", tmp_path / "f")


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown dataset 'cifar01': did you mean 'cifar\d+'\? choices: synthetic, cifar10"):
        load("cifar01")


def test_a_subset_is_drawn_by_the_seed(tmp_path):
    write_parquet(tmp_path)
    one, same, other = (load("cifar10", tmp_path, train_size=13, test_size=7, seed=seed) for seed in (1, 1, 2))
    assert (len(one.train), len(one.test)) == (13, 7)
    assert torch.equal(one.train.pixels, same.train.pixels)
    assert not torch.equal(one.train.pixels, other.train.pixels)
    whole = {image.numpy().tobytes() for image in load("cifar10", tmp_path).train.pixels}
    assert len({image.numpy().tobytes() for image in one.train.pixels} & whole) == 13


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 24}, "train_size must be at most the 23 images there are, got 24"),
        ({"test_size": 12}, "test_size must be at most the 11 images there are, got 12"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"test_size": -1}, "test_size must be at least 1, got -1"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path, sizes, message):
    write_parquet(tmp_path)
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path, **sizes)


# Resizing


@pytest.mark.parametrize("side", [16, 45, 64])
def test_images_are_resized_as_pillow_does(tmp_path, side):
    write_parquet(tmp_path)
    whole, resized = load("cifar10", tmp_path), load("cifar10", tmp_path, side=side)
    assert resized.image_shape == data.image_shape("cifar10", side) == (3, side, side)
    assert torch.equal(resized.train.labels, whole.train.labels)
    for before, after in zip(whole.test.pixels, resized.test.pixels, strict=True):
        expected = Image.fromarray(before.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BILINEAR)
        # Pillow rounds to bytes between rows and columns as well.
        assert np.abs(after.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_smaller_image_keeps_its_mean():
    drawn, small = (load("synthetic", train_size=20, test_size=3, side=side) for side in (None, 16))
    assert small.train.pixels.shape == (20, 3, 16, 16)
    # Each pixel is a weighted mean of its neighbourhood; at the border weights are renormalised, hence the tolerance of 1 level.
    means = [images.train.pixels.float().mean((2, 3)) for images in (drawn, small)]
    assert (means[0] - means[1]).abs().mean() < 1


def test_the_same_side_changes_nothing(tmp_path):
    write_parquet(tmp_path)
    assert torch.equal(load("cifar10", tmp_path, side=32).train.pixels, load("cifar10", tmp_path).train.pixels)


@pytest.mark.parametrize("name", ["synthetic", "mnist", "cifar100"])
def test_the_shape_of_images_is_known_before_they_are_read(name):
    assert data.image_shape(name) == {"synthetic": (3, 32, 32), "mnist": (1, 28, 28), "cifar100": (3, 32, 32)}[name]
    assert data.image_shape(name, 64)[1:] == (64, 64)


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("synthetic", 7, "side must be a whole number in 8..512, got 7"),
        ("synthetic", 16.5, "side must be a whole number in 8..512, got 16.5"),
        ("text", 16, "side is for images, and data=text has none, got 16"),
    ],
)
def test_a_side_that_cannot_be_is_refused(name, side, message):
    with pytest.raises(ValueError, match=message):
        load(name, train_size=3, test_size=3, side=side)


# The cache


def test_images_are_decoded_once(tmp_path, own_cache, count_decoding):
    write_parquet(tmp_path / "plain_text")
    first = load("cifar10", tmp_path)
    assert len(count_decoding) == 2
    again = load("cifar10", tmp_path)
    assert len(count_decoding) == 2
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert again.classes == first.classes
    assert [file.suffix for file in own_cache.iterdir()] == [".safetensors"], "a partial file was left behind"


def test_changed_files_are_decoded_again(tmp_path, count_decoding):
    write_parquet(tmp_path)
    load("cifar10", tmp_path)
    os.utime(next(tmp_path.glob("train-*")), ns=(1, 1))
    load("cifar10", tmp_path)
    assert len(count_decoding) == 4


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda content: b"", lambda content: b"nonsense" * 99], ids=["cut", "flip", "empty", "other"]
)
def test_a_damaged_cache_is_made_anew(tmp_path, own_cache, count_decoding, damage):
    write_parquet(tmp_path)
    load("cifar10", tmp_path)
    (file,) = own_cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert_is_what_was_written(load("cifar10", tmp_path))
    assert len(count_decoding) == 4
    load("cifar10", tmp_path)
    assert len(count_decoding) == 4, "the cache was not repaired"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file" / "cache"))
    write_parquet(tmp_path)
    assert_is_what_was_written(load("cifar10", tmp_path))


def test_only_large_synthetic_sets_are_kept(own_cache):
    load("synthetic", train_size=500, test_size=100)
    assert not own_cache.exists()
    made = load("synthetic", train_size=9_500, test_size=500)
    assert len(list(own_cache.iterdir())) == 1
    assert torch.equal(load("synthetic", train_size=9_500, test_size=500).test.pixels, made.test.pixels)


# The synthetic images


def test_synthetic_images_depend_on_the_seed_and_the_split_only():
    (one, labels), (same, _), (seed, _), (split, _) = (
        synthetic.images(1_003, seed=s, split=p) for s, p in ((1, "train"), (1, "train"), (2, "train"), (1, "test"))
    )
    assert one.dtype == torch.uint8
    assert one.shape == (1_003, 3, 32, 32)
    assert torch.equal(one, same)
    assert not torch.equal(one, seed)
    assert not torch.equal(one, split)
    assert labels.bincount().sub(100).abs().max() <= 3  # 1,000 images are in equal shares


def test_a_small_synthetic_set_is_the_beginning_of_a_larger_one():
    (small, few), (large, many) = (synthetic.images(n, seed=0, split="train") for n in (7, 701))
    assert torch.equal(small, large[:7])
    assert torch.equal(few, many[:7])


def test_synthetic_classes_cannot_be_told_by_their_mean_image():
    """Pose, colour and clutter vary too much: the nearest class mean is right in under 3 of 10 cases, where chance is 1."""
    made = load("synthetic", train_size=5_000, test_size=1_000)
    images, labels = made.train.batch(torch.arange(5_000))
    means = torch.stack([images[labels == k].mean(0) for k in range(10)]).flatten(1)
    guess = torch.cdist(made.test.batch(torch.arange(1_000))[0].flatten(1), means).argmin(1)
    assert (guess == made.test.labels).float().mean() < 0.3


def test_every_synthetic_shape_is_in_the_middle_and_fits():
    """With its unit at 10 pixels and its centre in the middle, a shape covers 8 to 40 % of the image and leaves its border free."""
    y, x = np.meshgrid(synthetic.CENTRES / 10, synthetic.CENTRES / 10, indexing="ij")
    for name, shape in synthetic.SHAPES.items():
        inside = shape(x, y) < 0
        assert 0.08 < inside.mean() < 0.4, name
        assert not inside[[0, 1, -2, -1]].any(), name
        assert not inside[:, [0, 1, -2, -1]].any(), name


def test_importing_loads_nothing_slow():
    slow = {"torchvision", "datasets", "flwr_datasets", "pyarrow", "PIL"}
    ask = f"import sys, fedsim.data, fedsim.models; print(*{slow} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == "\n"


# Images as tensors


def test_batches_in_order_are_all_images():
    made = load("synthetic", train_size=23, test_size=5).train
    images, labels = (torch.cat(parts) for parts in zip(*made.batches(7), strict=True))
    assert [len(y) for _, y in made.batches(7)] == [7, 7, 7, 2]
    assert images.dtype == torch.float32
    assert torch.equal(images, made.pixels / 255)
    assert torch.equal(labels, made.labels)
    picked, their = made.batch(torch.tensor([3, 1]))
    assert torch.equal(picked, images[[3, 1]])
    assert torch.equal(their, labels[[3, 1]])


def test_statistics_are_those_of_the_training_pixels():
    made = load("synthetic", train_size=53, test_size=5)
    images, _ = made.train.batch(torch.arange(53))
    channels = images.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(made.mean, channels.mean(1).float())
    torch.testing.assert_close(made.std, channels.std(1, correction=0).float())
    torch.testing.assert_close(made.mean_image, images.double().mean(0).float())
    assert repr(made) == "Dataset('synthetic', train=Images(53 of 3x32x32), test=Images(5 of 3x32x32), 10 classes)"


def test_images_of_another_type_are_refused():
    with pytest.raises(ValueError, match="pixels must be uint8"):
        Images(torch.rand(2, 3, 5, 7), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be int64 \(2,\)"):
        Images(torch.zeros(2, 3, 5, 7, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


# Partitions

PARTITIONS = [
    IID(),
    Dirichlet(0.1),
    Dirichlet(100, min_size=20),
    ByClass(),
    ByClass(3),
    ByClass(10),
    SizeSkewed(),
    SizeSkewed("square"),
    SizeSkewed("exponential"),
]
LABELS = torch.randint(0, 10, (2_003,), generator=generator(0))
CLIENTS = 7  # the exponential skew leaves nothing to the first of more than 8


def skew(shards):
    """Mean over clients of the largest share that one class has of a shard: 0.1 would be even."""
    return float(torch.stack([LABELS[s].bincount(minlength=10).max() / len(s) for s in shards]).mean())


@pytest.mark.parametrize("rule", PARTITIONS, ids=repr)
class TestEveryPartition:
    def test_no_image_is_given_twice(self, rule):
        shards = rule(LABELS, CLIENTS, seed=0)
        assert len(shards) == CLIENTS
        places = torch.cat(shards)
        assert places.dtype == torch.int64
        assert len(places.unique()) == len(places)
        assert all(torch.equal(shard, shard.sort().values) for shard in shards)

    def test_every_image_of_a_class_that_is_held_is_given(self, rule):
        places = torch.cat(rule(LABELS, CLIENTS, seed=0))
        held = torch.isin(LABELS, LABELS[places])
        assert torch.equal(places.sort().values, held.nonzero().flatten())
        if not isinstance(rule, ByClass):
            assert held.all()

    def test_the_seed_decides_and_nothing_else(self, rule, own_cache, monkeypatch):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        one = rule(LABELS, CLIENTS, seed=3)
        monkeypatch.setenv("FEDSIM_CACHE", str(own_cache / "another"))
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        same, other = rule(LABELS, CLIENTS, seed=3), rule(LABELS, CLIENTS, seed=4)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        assert before == after, "global random state was touched"
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_it_is_dealt_once(self, rule, monkeypatch):
        dealt = rule(LABELS, CLIENTS, seed=3)
        monkeypatch.setattr(partition, "_dealt", None)
        kept = rule(LABELS, CLIENTS, seed=3)
        assert [share.dtype for share in kept] == [torch.int64] * CLIENTS
        assert all(torch.equal(a, b) for a, b in zip(dealt, kept, strict=True))
        for labels, clients, seed in ((LABELS, CLIENTS, 4), (LABELS, CLIENTS - 1, 3), (LABELS.roll(1), CLIENTS, 3)):
            with pytest.raises(TypeError, match="not callable"):
                rule(labels, clients, seed)

    def test_its_repr_makes_it_again(self, rule):
        assert eval(repr(rule)) == rule

    def test_more_clients_than_images_are_refused(self, rule):
        with pytest.raises(ValueError, match="num_clients must be at most the 31 images there are, got 32"):
            rule(LABELS[:31], 32, seed=0)


def test_no_two_rules_share_what_is_kept(own_cache):
    for rule in PARTITIONS:
        rule(LABELS, CLIENTS, seed=3)
    assert len(list(own_cache.iterdir())) == len(PARTITIONS)


def test_a_kept_partition_that_is_damaged_is_dealt_anew(own_cache):
    dealt = IID()(LABELS, CLIENTS, 0)
    (file,) = own_cache.iterdir()
    file.write_bytes(flip(file.read_bytes()))
    assert all(torch.equal(a, b) for a, b in zip(dealt, IID()(LABELS, CLIENTS, 0), strict=True))


def test_the_newest_partitions_are_kept_and_nothing_else_goes(own_cache, monkeypatch):
    monkeypatch.setattr(partition, "KEPT", 2)
    own_cache.mkdir()
    (own_cache / "other-0.safetensors").touch()
    for seed in range(3):
        IID()(LABELS, CLIENTS, seed)
        for file in own_cache.iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    assert len(list(own_cache.glob("partition-*"))) == 2
    assert (own_cache / "other-0.safetensors").exists()
    monkeypatch.setattr(partition, "_dealt", None)
    for seed in (1, 2):
        IID()(LABELS, CLIENTS, seed)
    with pytest.raises(TypeError, match="not callable"):
        IID()(LABELS, CLIENTS, 0)


def test_iid_shares_differ_by_one_image_at_most():
    sizes = [len(s) for s in IID()(LABELS, CLIENTS, 0)]
    assert sorted(set(sizes)) == [286, 287]  # 2003 = 7 * 286 + 1
    assert skew(IID()(LABELS, CLIENTS, 0)) < 0.2


def test_a_small_alpha_is_more_skewed_than_a_large_one():
    by_alpha = [skew(Dirichlet(alpha)(LABELS, CLIENTS, 0)) for alpha in (0.1, 1.0, 1000.0)]
    assert by_alpha == sorted(by_alpha, reverse=True)
    assert by_alpha[0] > 2 * by_alpha[-1]


def test_dirichlet_gives_every_client_its_minimum():
    assert min(map(len, Dirichlet(0.5, min_size=50)(LABELS, CLIENTS, 0))) >= 50
    with pytest.raises(
        ValueError, match=r"Dirichlet\(alpha=0.01, min_size=280\) cannot give 7 clients .* fewer clients or a milder skew"
    ):
        Dirichlet(0.01, min_size=280)(LABELS, CLIENTS, 0)


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_by_class_gives_every_client_exactly_its_number_of_classes(classes):
    for shard in ByClass(classes)(LABELS, 23, 0):
        assert len(LABELS[shard].unique()) == classes


def test_by_class_uses_all_classes_when_there_are_clients_enough():
    assert len(torch.cat(ByClass(1)(LABELS, 10, 0))) == len(LABELS)


@pytest.mark.parametrize(("kind", "law"), [("linear", lambda i: i), ("square", lambda i: i**2), ("exponential", np.exp)])
def test_sizes_follow_their_law(kind, law):
    units = law(np.arange(1, CLIENTS + 1, dtype=float))
    sizes = [len(s) for s in SizeSkewed(kind)(LABELS, CLIENTS, 0)]
    # Rounded down; the last takes what rounding leaves, one image at most from each.
    assert np.abs(sizes - units / units.sum() * len(LABELS)).max() <= CLIENTS
    assert sum(sizes) == len(LABELS)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Dirichlet(-1), "alpha must be > 0, got -1"),
        (lambda: Dirichlet(float("nan")), "alpha must be > 0, got nan"),
        (lambda: Dirichlet(1, min_size=0), "min_size must be a whole number >= 1, got 0"),
        (lambda: ByClass(0), "partition.classes_per_client must be a whole number >= 1, got 0"),
        (lambda: ByClass(11)(LABELS, 5, 0), "classes_per_client must be at most the 10 classes there are, got 11"),
        (lambda: SizeSkewed("linar"), "unknown kind of size skew 'linar': did you mean 'linear'?"),
        (lambda: SizeSkewed("exponential")(LABELS, 50, 0), "cannot give 50 clients their share of 2003 images"),
        (lambda: IID()(LABELS, 0, 0), "num_clients must be at least 1, got 0"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(mistake, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mistake()
    assert message in str(error.value)


# Batches

SHARD = torch.arange(100, 123)


def test_an_epoch_is_the_shard_once():
    batches = batches_of(SHARD, seed=0, round=1, client=2, batch_size=5)
    assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(batches).sort().values, SHARD)
    assert not torch.equal(torch.cat(batches), SHARD)


def test_every_epoch_is_a_new_shuffle_of_the_shard():
    batches = batches_of(SHARD, seed=0, round=1, client=2, batch_size=5, epochs=3)
    passes = [torch.cat(batches[i : i + 5]) for i in (0, 5, 10)]
    assert all(torch.equal(one.sort().values, SHARD) for one in passes)
    assert not torch.equal(passes[0], passes[1])


def test_steps_go_on_past_the_end_of_the_shard():
    batches = batches_of(SHARD, seed=0, round=1, client=2, batch_size=5, steps=7)
    assert len(batches) == 7
    longer = batches_of(SHARD, seed=0, round=1, client=2, batch_size=5, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(batches, longer, strict=False))


def test_batches_are_a_function_of_seed_round_and_client():
    def first(**change):
        return batch_of(SHARD, **({"seed": 0, "round": 1, "client": 2, "batch_size": 20} | change))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first(), first())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not torch.equal(first(), first(**change)) for change in ({"seed": 1}, {"round": 2}, {"client": 3}))


def test_a_batch_larger_than_the_shard_is_the_shard():
    assert torch.equal(batch_of(SHARD, seed=0, round=1, client=2, batch_size=999).sort().values, SHARD)


@pytest.mark.parametrize(
    ("shard", "settings", "message"),
    [
        (SHARD[:0], {}, "client 2 has no images to train on"),
        (SHARD, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (SHARD, {"epochs": 0}, "epochs must be at least 1, got 0"),
        (SHARD, {"steps": 0}, "steps must be at least 1, got 0"),
        (SHARD, {"epochs": None}, "a client trains for a number of epochs or of steps, got neither"),
    ],
)
def test_batches_that_cannot_be_are_refused(shard, settings, message):
    with pytest.raises(ValueError, match=message):
        batches_of(shard, **({"seed": 0, "round": 1, "client": 2, "batch_size": 5} | settings))


# The real thing


def test_cifar10_has_5000_training_images_of_each_of_10_classes(own_cache, monkeypatch):
    root = os.environ.get("FEDSIM_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("FEDSIM_DATA names no folder with the real CIFAR-10")
    try:
        data.check("cifar10")
    except DataNotFound as error:
        pytest.skip(str(error))
    monkeypatch.delenv("FEDSIM_CACHE")  # decoded once for all sessions
    cifar = load("cifar10")
    assert (len(cifar.train), len(cifar.test)) == (50_000, 10_000)
    assert cifar.classes == CIFAR_CLASSES
    assert cifar.train.labels.bincount().tolist() == [5_000] * 10
    assert cifar.test.labels.bincount().tolist() == [1_000] * 10
    # The published channel means, which JPEG moves by less than one level of 255.
    torch.testing.assert_close(cifar.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1 / 255, rtol=0)
