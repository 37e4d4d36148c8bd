"""One picture as the victim, without a federation: a client computes its update from it, and an attack takes it back.

What `invert` leaves in its folder:

    metrics.json          scores and those of the trivial baselines, the configuration, versions, device and command
    theft.safetensors     image (B, C, H, W) in [0, 1], label (B,); gradient/NAME, the client's true update; sent/NAME, what the
                          defense let out of it; params/NAME and buffers/NAME, the model; reconstruction (B, C, H, W),
                          label_found (B,); and, if the attack recorded it, trace/evaluations (T,), trace/losses (T,),
                          trace/images (T, B, C, H, W), trace/layers/NAME (T,)
    history.parquet       a row for each moment of the trace: evaluations, loss, mse, psnr_db, and gap/NAME for each layer
    original.png, reconstruction.png      as the model sees them, pixel by pixel
    comparison, panels, layers, kernels, surfaces    figures, PNG and SVG; animation.gif, .webp, .mp4
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from rich import box
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from attacks import metrics
from experiments import pictures, scoring
from experiments.canvas import save
from experiments.config import Config, build_checked
from experiments.naming import label as label_of
from experiments.runner import attack_of, attackers, check_config, environment
from fedsim.checks import whole
from fedsim.client import chance_seeded
from fedsim.cores import one_thread
from fedsim.data import Dataset, load
from fedsim.defense import Exposure, hooks_of
from fedsim.files import write_bytes, write_with
from fedsim.observation import Observation, Reconstruction
from fedsim.run import trace_tensors
from fedsim.seeding import generator, seed_of
from fedsim.setup import Setup, device_of, planned
from fedsim.training import Hooks, local_update, split
from fedsim.updates import Update
from fedsim.wire import nbytes, pack

MOMENTS = 100  # about so many are recorded when nothing else is said: ten seconds of animation
SMALL = 1000  # images of synthetic data, of which an own picture needs no more than statistics


@dataclasses.dataclass(frozen=True)
class Theft:
    """What was stolen, from what; `true` is the client's update before its defense, `rows` are as in a table of leaks."""

    setup: Setup
    image: Tensor
    label: Tensor
    seen: Observation
    true: Update
    made: Reconstruction
    rows: list[dict[str, Any]]
    adaptive: bool  # whether the attacker knew the defense

    @property
    def attack(self) -> str:
        """What the attack is called."""
        return f"{self.setup.config['choices']['attack']}{scoring.ADAPTIVE if self.adaptive else ''}"


def read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The picture in a file as (C, H, W) in [0, 1]: its largest centred part of that aspect, resized. Turned as its camera says."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):  # 16 bits, of which Pillow's conversions keep the lowest eight
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            if upright.mode in ("I", "F"):
                raise ValueError(f"{path} has {upright.mode} pixels, whose white is not known: save it with 8 or 16 bits a channel")
            flat = upright.convert("RGBA" if "transparency" in file.info or upright.mode in ("LA", "PA", "RGBA") else "RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow reads, such as JPEG, PNG or WebP") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if flat.mode == "RGBA":  # on white, as a browser shows it
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat).convert("RGB")
    fitted = ImageOps.fit(flat.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.reshape(height, width, channels).permute(2, 0, 1).float() / 255


def prepare(config: Config, path: Path | None, index: int | None, label: int | None) -> tuple[Setup, Tensor, Tensor]:
    """The setup of a configuration, and the victim: image (1, C, H, W) and label (1,), from a file or from the training images."""
    if config["choices"].get("aggregation", "plain") != "plain":
        raise ValueError("fedsim invert has one client, and aggregation=secure adds up several: leave it out, or take fedsim run")
    dataset = load(**config["data"], seed=config["seed"])
    if not isinstance(dataset, Dataset):
        raise ValueError(f"fedsim invert takes pictures, data={dataset.name} has none: leave data= out, or take data=cifar10")
    if label is not None:
        whole(f"--label (a class of {dataset.name})", label, 0, dataset.num_classes - 1)
    if path is not None:
        image, found = read(path, dataset.image_shape)[None], torch.tensor([0])
    else:
        whole(f"--index (a training image of {dataset.name})", index, 0, len(dataset.train) - 1)
        image, found = dataset.train.batch(torch.tensor([index]))
    protocol, defense = build_checked("federation", config["federation"]), build_checked("defense", config["defense"])
    defense = planned(defense, [Exposure(1, *protocol.uses(1))])  # one update is sent, of one image
    shards = [torch.tensor([index or 0])] * protocol.clients
    device, server = device_of(config["device"]), build_checked("server", config["server"])
    setup = Setup(config, config["seed"], dataset, shards, protocol, defense, device, server)
    return setup, image.to(setup.device), torch.tensor([label] if label is not None else found.tolist()).to(setup.device)


def steal(
    setup: Setup,
    image: Tensor,
    label: Tensor,
    attack: Any,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    adaptive: bool = False,
    told: bool = False,
) -> Theft:
    """The update of a client whose one image is `image`, as its defense sends it, attacked and scored.

    adaptive  whether the attacker knows the defense, in tables
    told      whether the attack is told it
    """
    one_thread()
    model = setup.model()
    params, buffers = split(model)
    steps = len(setup.protocol.batches(torch.tensor([0]), setup.seed, 1, 0))
    with chance_seeded(model, image, seed_of(setup.seed, "dropout", 1, 0)):
        proximal = setup.config["strategy"].get("proximal_mu", 0.0)
        true = setup.protocol.train(model, params, buffers, [(image, label)] * steps, proximal)
    with chance_seeded(model, image, seed_of(setup.seed, "dropout", 1, 0)):
        hooks = hooks_of(setup.defense, setup.dataset.num_classes, setup.seed, 1, 0)
        trained = (
            true if hooks == Hooks() else setup.protocol.train(model, params, buffers, [(image, label)] * steps, proximal, hooks)
        )
    packets, _ = setup.defense(pack(trained.update), setup.defense.init(trained.update), generator(setup.seed, "defense", 1, 0))
    seen = Observation(params, packets, 1, buffers=buffers, sent_buffers=trained.buffers)
    (made,) = scoring.attacked(setup, attack, [seen], generator(setup.seed, "attack"), report, told=told, labels=[label])
    return Theft(setup, image, label, seen, true.update, made, scoring.compared(setup, seen, made, image, label), adaptive)


def completed(config: Config, path: Path | None) -> Config:
    """The configuration with what one theft needs where nothing was said: a trace, and no more synthetic images than statistics."""
    attack, data = config["attack"], config["data"]
    if attack and attack.get("record") == 0:
        budget = attack.get("evaluations") or attack.get("iterations") or MOMENTS
        attack = attack | {"record": max(1, budget // MOMENTS)}
    if path is not None and data["name"] == "synthetic" and data["train_size"] is None:
        data = data | {"train_size": SMALL, "test_size": data["test_size"] or SMALL}
    return config | {"attack": attack, "data": data}


def invert(
    config: Config,
    folder: Path,
    command: str,
    *,
    path: Path | None = None,
    index: int | None = None,
    label: int | None = None,
    log: bool = True,
    normalise: bool = False,
    mp4: bool = False,
) -> tuple[Theft, list[Path]]:
    """Steals one image and writes all there is to see of it into `folder`; returns the theft and the files to look at."""
    if not config["attack"]:
        raise ValueError("attack=none attacks nothing; see `fedsim list attacks`")
    with _alone(folder):
        animations = [".gif", ".webp", *([".mp4"] if mp4 else [])]
        for suffix in animations:
            pictures.check_animation(suffix)
        check_config(config)
        config = completed(config, path)
        setup, image, truth = prepare(config, path, index, label)
        # One theft is drawn: that of an attacker who knows the defense only if asked for, and if knowing it changes anything.
        who = "adaptive" if config["attacker"] == "adaptive" else "naive"
        (attacker,) = attackers(setup, attack_of(config), config["choices"]["attack"], who)
        theft = steal(setup, image, truth, attacker.attack, adaptive=attacker.adaptive, told=attacker.told)
        _artefacts(theft, folder)
        files = draw(theft, folder, animations, log=log, normalise=normalise)
        about: dict[str, Any] = {
            "scores": theft.rows,
            "attacker": "adaptive" if attacker.adaptive else "naive",
            "found_by": theft.made.attack or attacker.name,
            "bars": {name: bool(rate.passed) for name, rate in metrics.success_rates(pd.DataFrame(theft.rows)).items()},
            "victim": {"image": None if path is None else str(path), "index": index, "label": theft.label.tolist()},
            "bytes_sent": sum(map(nbytes, theft.seen.packets.values())),
            "config": config,
            "environment": environment(setup, command),
        }
        if theft.made.trace is not None:
            rank = pictures.agreement(theft.made.trace, theft.image[0].cpu())
            about["spearman_loss_mse"] = None if math.isnan(rank) else rank
        # Last: it marks a finished folder.
        write_bytes(folder / "metrics.json", (json.dumps(_finite(about), indent=2) + "\n").encode())
        return theft, [*files, folder / "metrics.json"]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, the folder is there and empty, and no other process steals into it. Raises ValueError where that cannot be.

    It is claimed before the long work. Where nothing came of that, no folder is left that was not there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a new folder with -o")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if inside := sorted(set(os.listdir(folder)) - {".lock"}):
            raise ValueError(f"{folder} is not empty, it holds {inside[0]}: name a new folder with -o")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process steals into {folder}: name a new folder with -o") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; name another folder with -o") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # something is in it
            for path in missing:
                path.rmdir()


def draw(theft: Theft, folder: Path, animations: Sequence[str], *, log: bool = True, normalise: bool = False) -> list[Path]:
    """Every picture of a theft; those of how it came about only where the attack recorded its trace."""
    truth, found = theft.image[0].cpu(), theft.made.images[0].cpu()
    for name, image in (("original", truth), ("reconstruction", found)):
        _png(folder / f"{name}.png", image)
    made = [folder / "original.png", folder / "reconstruction.png"]
    about = f"by {theft.attack} from the update of one image"
    made.append(save(pictures.comparison(truth, found, normalise), folder / "comparison", f"Original, stolen, difference, {about}"))
    if theft.made.trace is not None:
        made += pictures.draw_trace(theft.made.trace, truth, folder, about, animations, log=log, normalise=normalise)
    return made + draw_kernels(theft, folder)


def draw_kernels(theft: Theft, folder: Path) -> list[Path]:
    """A convolution's filters and gradients, and the surfaces of its gradient in eval and in training mode."""
    layers = pictures.convolutions(theft.true)
    if not layers:
        return []
    setup, params, buffers = theft.setup, theft.seen.params, theft.seen.buffers
    modes: dict[str, Update] = {}
    for mode in ("eval", "training"):
        model = setup.model().train(mode == "training")
        with chance_seeded(model, theft.image, seed_of(setup.seed, "dropout", 1, 0)):
            modes[f"{mode} mode"] = local_update(model, params, buffers, [(theft.image, theft.label)], lr=1.0).update
    if not theft.seen.buffers:  # without BatchNorm the mode changes nothing that is shown here
        modes = {"gradient": modes["eval mode"]}
    first, last = layers[0], layers[min(1, len(layers) - 1)]  # the second convolution mixes what the first has found
    rows = {
        "filters": params[first],
        "update": theft.true[first],
        "update as sent": theft.seen.update[first],
    }
    surface = pictures.kernel_surfaces({title: update[last] for title, update in modes.items()}, last)
    return [
        save(pictures.kernel_strips(rows, first), folder / "kernels", f"Filters of {first} and what the client sent of them"),
        save(surface, folder / "surfaces", f"Magnitude of the gradient over the kernels of {last}, {' and '.join(modes)}"),
    ]


def summary(theft: Theft) -> Table:
    """What was stolen, beside what knowing nothing scores."""
    (row,) = theft.rows
    config = theft.setup.config
    chosen = config["choices"]
    title = f"{theft.attack} on {chosen['model']}, defense {label_of(config)}, seed {config['seed']}: {row['verdict']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("MSE", "PSNR", "SSIM", "passes"):
        table.add_column(column, justify="right")
    baselines = (("a grey card", "grey_"), ("the mean image", "mean_image_"), ("its mean colour", "mean_colour_"))
    for name, prefix in (("reconstruction", ""), *baselines):
        cells = [f"{row[prefix + 'mse']:.3g}", f"{row[prefix + 'psnr_db']:.1f} dB", f"{row[prefix + 'ssim']:.2f}"]
        passed = [
            bar
            for bar, rate in metrics.success_rates({name: [value] for name, value in row.items()}, prefix).items()
            if rate.passed
        ]
        table.add_row(name, *cells, ", ".join(passed) or "no bar", style="dim" if prefix else None)
    found = f"label {row['label_found']}, {'right' if row['label_right'] else 'wrong: it is ' + str(row['label'])}"
    table.caption = f"{found}; {row['evaluations']:,} evaluations of the gradient, {row['seconds']:.0f} s; loss {row['loss']:.1e}"
    table.caption_justify = "left"
    return table


def _artefacts(theft: Theft, folder: Path) -> None:
    groups: dict[str, Mapping[str, Tensor]] = {
        "gradient": theft.true,
        "sent": theft.seen.update,
        "params": theft.seen.params,
        "buffers": theft.seen.buffers,
    }
    tensors = {"image": theft.image, "label": theft.label, "reconstruction": theft.made.images, "label_found": theft.made.labels}
    tensors |= {f"{group}/{name}": t for group, some in groups.items() for name, t in some.items()}
    if theft.made.trace is not None:
        trace = theft.made.trace
        tensors |= {f"trace/{name}": t for name, t in trace_tensors(trace).items()}
        error = pictures.errors(trace, theft.image[0])
        table = pd.DataFrame(
            {
                "evaluations": trace.evaluations.tolist(),
                "loss": trace.losses.tolist(),
                "mse": error.tolist(),
                "psnr_db": (-10 * error.log10()).tolist(),
                **{f"gap/{name}": gaps.tolist() for name, gaps in trace.layers.items()},
            }
        )
        write_with(folder / "history.parquet", lambda name: table.to_parquet(name, index=False))
    whole_tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_with(folder / "theft.safetensors", lambda name: save_file(whole_tensors, name))


def _png(path: Path, image: Tensor) -> None:
    from PIL import Image

    pixels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    write_with(path, lambda name: picture.save(name))


def _finite(value: Any) -> Any:
    """`value` with infinities, of which JSON knows nothing, as the words "inf" and "-inf", and what is not a number as null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
