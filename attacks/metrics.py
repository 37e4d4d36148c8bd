"""How much of an image or a sentence came back: pure functions of what was reconstructed and what is true, one number for each.

Images are (N, C, H, W) with pixels in [0, 1]. Every metric clamps first: an image file cannot hold more, and a float that is cast
to 8 bits unclamped wraps around (1.01 turns black), which makes a perfect reconstruction look and score like a failure.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.checks import one_of
from fedsim.data.text import is_word
from fedsim.models import Classifier

WINDOW = 11  # side of SSIM's Gaussian window, sigma 1.5 (Wang et al. 2004)
BACKBONES = {"alex": ("AlexNet_Weights", 31), "vgg": ("VGG16_Weights", 16), "squeeze": ("SqueezeNet1_1_Weights", 17)}  # least side


def _pair(reconstructed: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    if reconstructed.shape != true.shape or true.dim() != 4:
        raise ValueError(f"images must be two tensors (N, C, H, W) of one shape, got {_shape(reconstructed)} and {_shape(true)}")
    return reconstructed.detach().float().clamp(0, 1), true.detach().float().clamp(0, 1)


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def mse(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Mean squared error over channels and pixels, (N,)."""
    a, b = _pair(reconstructed, true)
    return (a - b).square().flatten(1).mean(1)


def l1(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error over channels and pixels, (N,)."""
    a, b = _pair(reconstructed, true)
    return (a - b).abs().flatten(1).mean(1)


def psnr_db(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, 10 log10(1 / MSE), (N,); inf where the images are equal."""
    return -10 * mse(reconstructed, true).log10()


def ssim(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), Gaussian window of 11 pixels, data range 1, (N,).

    All pixels count, the image being continued by its mirror image; where the 5 pixels at the border are left out, as by
    scikit-image, other values result, for 32x32 images in the second decimal.
    """
    a, b = _pair(reconstructed, true)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM's window is {WINDOW} pixels wide, images are {_shape(a)[-2:]}; use mse or psnr_db")
    from kornia.metrics import ssim as ssim_map  # in a second; torchmetrics' brings torchvision and torch's compiler, in ten

    # Of float32, kornia's value of a grey image depends in the last bits on how many images there are.
    return ssim_map(a.double(), b.double(), WINDOW).flatten(1).mean(1).float()


def lpips(reconstructed: Tensor, true: Tensor, *, net: str = "alex", weights: str | Path | None = None) -> Tensor:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1), (N,), 0 for equal images.

    Images of one channel are taken as grey. `net` is the backbone, "alex", "vgg" or "squeeze"; its ImageNet weights come from
    the file `weights`, a state dict of torchvision's network, or else from the folder in which torchvision keeps what it has
    downloaded. Nothing is downloaded here. Raises ValueError when there is no such file, see `lpips_weights`.
    """
    a, b = _pair(reconstructed, true)
    one_of("net", net, BACKBONES)
    if a.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS compares images of 1 or 3 channels, got {a.shape[1]}; use mse or ssim")
    side = BACKBONES[net][1]
    if min(a.shape[-2:]) < side:
        raise ValueError(
            f"LPIPS by {net!r} needs images of {side} pixels a side, got {_shape(a)[-2:]}; vgg needs {BACKBONES['vgg'][1]}"
        )
    path = Path(weights) if weights is not None else _cached_weights(net)
    if not path.is_file():
        raise ValueError(
            f"LPIPS by {net!r} needs its backbone's weights and {path} is not there: give weights=FILE, or fetch them once with "
            f"torchvision.models.get_model_weights({_backbone(net)!r}).DEFAULT.get_state_dict(); mse, psnr_db and ssim need none"
        )
    network = _lpips_network(net, path, path.stat().st_mtime_ns).to(a.device)
    with torch.no_grad():
        return network(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1), normalize=True).reshape(len(a))


def lpips_weights(net: str = "alex") -> Path | None:
    """The installed weights file of a backbone that `lpips` would use, or None."""
    one_of("net", net, BACKBONES)
    if not any(_downloads().glob(f"{_backbone(net)}-*.pth")):  # whose exact name takes seconds to ask torchvision for
        return None
    path = _cached_weights(net)
    return path if path.is_file() else None


def _backbone(net: str) -> str:
    return BACKBONES[net][0].removesuffix("_Weights").lower()


def _cached_weights(net: str) -> Path:
    import torchvision

    url = getattr(torchvision.models, BACKBONES[net][0]).DEFAULT.url
    return _downloads() / url.rsplit("/", 1)[1]


def _downloads() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


@functools.lru_cache(maxsize=3)
def _lpips_network(net: str, path: Path, changed: int) -> Any:
    """torchmetrics' network, which brings the linear layers, with its backbone read from `path`."""
    from torchmetrics.functional.image.lpips import _LPIPS  # the public function would download the backbone

    with torch.random.fork_rng(devices=[]):  # it is drawn at random before it is read
        network = _LPIPS(net=net, pnet_rand=True)  # type: ignore[arg-type]
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
        # "slice2.3.weight" and "slices.1.3.weight" are what torchvision calls "features.3.weight".
        names = {name: "features." + re.sub(r"^slices?\.?\d+\.", "", name) for name in network.net.state_dict()}
        network.net.load_state_dict({name: read[there] for name, there in names.items()})
    except Exception as error:  # whatever a file that is no state dict makes torch raise
        raise ValueError(
            f"{path} holds no weights of torchvision's {_backbone(net)} ({' '.join(str(error).split())[:200]})"
        ) from error
    return network


def features(model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """(N, D) what the model's last linear layer is given for images (N, C, H, W), in eval mode.

    For a `fedsim.models.Classifier`, its features before any bottleneck, which may be random, flattened; for another module, the
    input of the linear layer that runs last. Raises ValueError for a model in which none runs.
    """
    caught: list[Tensor] = []
    was_training = model.training
    watched: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if isinstance(model, Classifier):
        watched = [model.head if model.bottleneck is None else model.bottleneck]
    hooks = [module.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])) for module in watched]
    try:
        model.eval()
        with torch.no_grad():
            functional_call(model, {**params, **buffers}, (images,))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not caught:
        raise ValueError(f"{type(model).__name__} runs no linear layer, so it has no features in front of one")
    return caught[-1].flatten(1)


def feature_distance(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], reconstructed: Tensor, true: Tensor
) -> Tensor:
    """|f(x') - f(x)| / |f(x)| in the l2 norm, (N,), with f the model's `features` at `params`.

    What was stolen may look like the image to the network and not to the eye, or the reverse: 0 says that the network cannot tell
    them apart. Geiping et al. (2020) print with their attack the mean square of such a difference, of logits ("FMSE"); it is taken
    here in front of the head, and over the norm, so that networks and rounds compare. Best with an image's own network: the
    features of an untrained one say little about content.
    """
    a, b = _pair(reconstructed, true)
    device = next(iter(params.values())).device
    mine, theirs = features(model, params, buffers, torch.cat([a, b]).to(device)).chunk(2)
    gap, norm = (mine - theirs).norm(dim=1), theirs.norm(dim=1)
    return torch.where(gap > 0, gap / norm, 0.0)


def label_accuracy(reconstructed: Tensor, true: Tensor) -> float:
    """Share of a batch's labels found, repetitions counted, in whatever order: the overlap of two multisets."""
    if reconstructed.shape != true.shape or true.dim() != 1 or not len(true):
        raise ValueError(f"labels must be two tensors (B,) of one length >= 1, got {_shape(reconstructed)} and {_shape(true)}")
    classes = int(torch.stack([reconstructed.max(), true.max()]).max()) + 1
    counts = torch.stack([torch.bincount(labels, minlength=classes) for labels in (reconstructed, true)])
    return int(counts.amin(0).sum()) / len(true)


def match(reconstructed: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (i, j), each (min(M, N),), of reconstructions (M, C, H, W) and true images (N, C, H, W) with the least squared error.

    A gradient is a mean over its batch, which has no order: a batch is scored after this matching (Kuhn 1955). Where an attack
    reconstructs fewer images than the client used, each is held against the one it comes closest to, in the attacker's favour.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = reconstructed.clamp(0, 1), true.clamp(0, 1)
    if a.dim() != 4 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"images must be two tensors (N, C, H, W) of one image shape, got {_shape(a)} and {_shape(b)}")
    cost = torch.cdist(b.flatten(1).double(), a.flatten(1).double()).square()
    cost = torch.nan_to_num(cost, nan=torch.finfo(torch.float64).max / (1 + cost.numel()))
    places, found = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(found, device=a.device), torch.as_tensor(places, device=a.device)


def align(reconstructed: Tensor, true: Tensor) -> Tensor:
    """The permutation (B,) for which `reconstructed[permutation]` lies closest to `true` in total squared error."""
    a, b = _pair(reconstructed, true)
    return match(a, b)[0]


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a rate of which `successes` out of `n` were seen (Wilson 1927); some may have been successes in part."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"0 <= successes <= n and n >= 1 must hold, got {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    # At the ends the formula is exact, its rounding is not.
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


@dataclass(frozen=True)
class Rate:
    """`passed` of `n`, with the 95 % Wilson interval.

    Images of one update are found or missed together: where there are several of each, the interval is that of as many trials as
    there are `updates`, as wide as it is if all images of one share its fate.
    """

    passed: int
    n: int
    updates: int | None = None

    @property
    def share(self) -> float:
        return self.passed / self.n

    @property
    def interval(self) -> tuple[float, float]:
        trials = self.updates or self.n
        return wilson(self.passed * trials / self.n, trials)  # exactly `passed` where trials are images

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.passed}/{self.n}, {100 * low:.0f}-{100 * high:.0f} %"


@dataclass(frozen=True)
class Bar:
    """What a reconstruction's `score` must be for it to count as a theft: below `level`, above it, or at least it."""

    score: str
    level: float
    sense: str

    def passes(self, values: Any) -> Tensor:
        """Which of `values` (N,) pass, (N,) bool; a value that is not a number passes no bar."""
        values = torch.as_tensor(values, dtype=torch.float64)
        return {"<": values < self.level, ">": values > self.level, ">=": values >= self.level}[self.sense]


# Zhu et al. 2019 count MSE < 0.03, which an image's mean colour passes on a third of CIFAR-10, see `baselines`; so two stricter
# bars stand beside it. 20 dB is MSE < 0.01, about what is left of an image shrunk to a quarter of its sides.
BARS = {
    "MSE < 0.03": Bar("mse", 0.03, "<"),
    "> 20 dB": Bar("psnr_db", 20.0, ">"),
    "SSIM ≥ 0.6": Bar("ssim", 0.6, ">="),
}


class Scores(Protocol):
    """Values by name: a dict of lists or tensors, or a table."""

    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> Any: ...


def success_rates(scores: Scores, prefix: str = "", updates: int | None = None) -> dict[str, Rate]:
    """How many of n reconstructions pass each of `BARS`; `scores` maps a metric's name, after `prefix`, to n values.

    A table of leaks is such a mapping; `updates` says of how many updates they are, if of several images each. A bar is left out
    whose score is not there: images below 11 pixels have no SSIM.
    """
    rates = {}
    for name, bar in BARS.items():
        if prefix + bar.score in scores:
            passed = bar.passes(list(scores[prefix + bar.score]))
            if not len(passed):
                raise ValueError("a success rate needs at least one reconstruction, got none")
            rates[name] = Rate(int(passed.sum()), len(passed), updates)
    return rates


def baselines(true: Tensor, mean_image: Tensor) -> dict[str, dict[str, Tensor]]:
    """What knowing nothing scores: `{name: {metric: (N,)}}` of a grey card, the data's mean image, each image's own mean colour."""
    names: Sequence[tuple[str, Tensor]] = (
        ("grey", torch.full_like(true, 0.5)),
        ("mean_image", mean_image.to(true).expand_as(true)),
        ("mean_colour", true.mean((-2, -1), keepdim=True).expand_as(true)),
    )
    metrics = {"mse": mse, "psnr_db": psnr_db} | ({"ssim": ssim} if min(true.shape[-2:]) >= WINDOW else {})
    return {name: {metric: f(guess, true) for metric, f in metrics.items()} for name, guess in names}


def token_accuracy(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Share of each sentence's words that stand in their places, (N,), of ids (N, L); [PAD], [CLS] and [SEP] are no words."""
    if reconstructed.shape != true.shape or true.dim() != 2:
        raise ValueError(f"sentences must be two tensors (N, L) of one shape, got {_shape(reconstructed)} and {_shape(true)}")
    words = is_word(true)
    return ((reconstructed == true) & words).sum(1) / words.sum(1)


def tokens_found(reconstructed: Tensor, true: Tensor) -> Tensor:
    """Share of each sentence's different words that occur anywhere in the reconstruction of its batch (M, L), (N,)."""
    return torch.stack([torch.isin(row[is_word(row)].unique(), reconstructed).double().mean() for row in true])


def match_sentences(reconstructed: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """As `match`, of sentences (M, L) and (N, L): the pairs with the most words in their places."""
    from scipy.optimize import linear_sum_assignment

    if reconstructed.dim() != 2 or reconstructed.shape[1:] != true.shape[1:]:
        raise ValueError(f"sentences must be two tensors (N, L) of one L, got {_shape(reconstructed)} and {_shape(true)}")
    right = (reconstructed[None] == true[:, None]) & is_word(true)[:, None]
    places, found = linear_sum_assignment(right.sum(2).cpu().numpy(), maximize=True)
    return torch.as_tensor(found, device=true.device), torch.as_tensor(places, device=true.device)


def rouge(reconstructed: str, true: str) -> dict[str, float]:
    """F-measures `rouge1`, `rouge2`, `rougeL` (Lin 2004): common words, pairs of words, longest common subsequence.

    In lower case, punctuation left out; 0 where one of the texts has no word.
    """
    from torchmetrics.functional.text.rouge import rouge_score  # takes ten seconds to import

    keys = ("rouge1", "rouge2", "rougeL")
    scores = rouge_score(reconstructed, true, rouge_keys=keys)
    return {key: float(scores[f"{key}_fmeasure"]) for key in keys}
