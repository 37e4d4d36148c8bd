"""The pictures and animations of a report: WebP as text, each once, and no more than there is room for."""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from experiments.pictures import moments
from experiments.ranking import Row
from experiments.summary import sender
from fedsim.files import finite
from fedsim.run import RunFolder

FRAMES = 20  # of an animation
STILLS = 0.7  # share of the room for pictures that still ones may take
QUOTES = 3  # bytes that JSON puts around a picture
PLACES = len('"truth":99999,"stolen":99999,"film":99999,')  # what a victim's pictures add to what is said of it


@dataclass
class Album:
    """Victims that the page shows, with their pictures, each once.

    victims   what is said of each
    images    WebP as data URIs; `films` those of animations
    left_out  pictures and animations that there was no room for
    """

    folders: dict[str, RunFolder]
    places: dict[str, int]
    text: bool
    blur: bool
    victims: list[Row] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    films: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=lambda: {"pictures": 0, "animations": 0})
    _leaks: list[pd.Series] = field(default_factory=list)
    _places: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _first: set[int] = field(default_factory=set)
    _stored: dict[bytes, int] = field(default_factory=dict)
    _room: int = 0

    def want(self, leak: pd.Series, *, first: bool) -> int:
        """The place of a victim among `victims`; those wanted `first` have their pictures before others, and move if recorded."""
        key = (leak["run"], leak["made_by"], leak["seen"], *(int(leak[name]) for name in ("round", "client", "image")))
        if key not in self._places:
            self._places[key] = len(self.victims)
            self._leaks.append(leak)
            self.victims.append(self._told(leak))
        if first:
            self._first.add(self._places[key])
        return self._places[key]

    def _told(self, leak: pd.Series) -> Row:
        told: Row = {key: int(leak[key]) for key in ("seed", "round", "client", "image")}
        told |= {
            "kind": leak["kind"],
            "attacker": leak["attacker"],
            "attack": leak["attack"],
            "made_by": leak["made_by"],
            "run": self.places[leak["run"]],
        }
        told |= {"verdict": leak["verdict"], "score": finite(leak["score"]), "label_right": bool(leak["label_right"])}
        if self.text:
            return told | {"written": "" if self.blur else leak["truth"], "read": leak["recovered"]}
        return told | {name: finite(leak[name]) for name in ("mse", "psnr_db", "ssim", "lpips") if name in leak}

    def fill(self, room: int) -> None:
        """Adds pictures of up to `room` bytes: of runs on the same data one after the other, so that data are loaded once."""
        if self.text:
            return
        self._room = room - PLACES * len(self.victims)
        films = int((1 - STILLS) * self._room)
        self._room -= films

        def turn(i: int) -> tuple[Any, ...]:
            leak = self._leaks[i]
            return i not in self._first, leak["under"], leak["seed"], leak["run"]

        truths: dict[tuple[Any, ...], Tensor] = {}
        made: tuple[Any, dict[int, Tensor]] = None, {}
        for i in sorted(range(len(self._leaks)), key=turn):
            leak, told = self._leaks[i], self.victims[i]
            run, round, client = leak["run"], told["round"], told["client"]
            if (key := (leak["under"], leak["seed"], round, client)) not in truths:
                truths[key] = self.folders[run].setup().truth(round, client)[0].cpu()
            if (pictured := self.folders[run].pictured) and made[0] != (run, leak["made_by"], round):
                made = (run, leak["made_by"], round), self.folders[run].reconstructions(leak["made_by"], round)
            truth = truths[key][told["image"]]
            told["truth"] = self._still(_coarse(truth) if self.blur else truth)
            if (at := int(leak["reconstruction"])) >= 0:  # else the attack says that it has nothing of this one
                told["stolen"] = self._still(made[1][sender(leak, client)][at]) if pictured else None
        self._animate(self._room + films)

    def _still(self, image: Tensor) -> int | None:
        data = _webp([image])
        if data not in self._stored:
            uri = _uri(data)
            if (cost := len(uri) + QUOTES) > self._room:
                self.left_out["pictures"] += 1
                return None
            self._room -= cost
            self._stored[data] = len(self.images)
            self.images.append(uri)
        return self._stored[data]

    def _animate(self, room: int) -> None:
        """Films of those wanted first that have a trace; no contender takes more than its part of the room."""
        by: dict[tuple[str, str], list[tuple[int, str]]] = {}

        def where(i: int) -> tuple[str, str, int]:
            return self._leaks[i]["run"], self._leaks[i]["made_by"], int(self._leaks[i]["round"])

        for (run, made_by, round), victims in itertools.groupby(sorted(self._first, key=where), key=where):
            folder = self.folders[run]
            traces = folder.traces(made_by, round) if folder.pictured else {}
            for i in victims:
                leak = self._leaks[i]
                trace = traces.get(sender(leak, int(leak["client"])))
                if trace is not None and leak["reconstruction"] >= 0:
                    frames = trace.images[moments(trace, FRAMES), int(leak["reconstruction"])]
                    by.setdefault((leak["kind"], made_by), []).append((i, _uri(_webp(list(frames)))))
        for several in by.values():
            left = room // len(by)
            for i, uri in sorted(several):
                if (cost := len(uri) + QUOTES) > left:
                    self.left_out["animations"] += 1
                    continue
                left -= cost
                self.victims[i]["film"] = len(self.films)
                self.films.append(uri)


def _coarse(image: Tensor) -> Tensor:
    """What is left of an image (C, H, W) in 4x4 pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), 4)


def _webp(images: Sequence[Tensor]) -> bytes:
    """An image (C, H, W), or several as an animation that stands at its last; small ones exactly, pixel by pixel."""
    pixels = [
        (image.detach().cpu().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for image in images
    ]
    first, *rest = [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one).convert("RGB") for one in pixels]
    out = io.BytesIO()
    quality: Row = {"lossless": True, "quality": 50} if max(first.size) <= 64 and not rest else {"quality": 80}
    more: Row = {"save_all": True, "append_images": rest, "duration": [150] * len(rest) + [2000], "loop": 0} if rest else {}
    first.save(out, "WEBP", method=4, **quality, **more)
    return out.getvalue()


def _uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()
