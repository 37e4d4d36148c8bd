"""A run's rows as a tracker's points: of each round accuracy, loss and bytes; of each attacked round what each attacker stole."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from experiments.config import build_checked
from fedsim.observation import SUM
from fedsim.run import RunFolder
from fedsim.setup import Setup
from fedsim.tracking import Journal

Row = Mapping[Any, Any]

# Columns of rounds.parquet, and what their curves are called.
CURVES = {"accuracy": "accuracy", "loss": "loss", "train_loss": "train_loss", "client_accuracy": "client_accuracy"}
CURVES |= {"bytes_up": "bytes/up", "bytes_up_dense": "bytes/up_dense", "bytes_down": "bytes/down", "epsilon": "epsilon"}
PERFECT = 60.0  # dB; an exact copy has no finite PSNR
SIDE = 96  # pixels; smaller images are shown enlarged


class Tracking:
    """Hands a run's rows to a journal, or to nobody; rows that were handed on before do no harm."""

    def __init__(self, setup: Setup, folder: RunFolder, journal: Journal | None, pictures: int = 0) -> None:
        self.setup, self.folder, self.journal, self.pictures = setup, folder, journal, pictures

    def rounds(self, rows: Sequence[Row]) -> None:
        """Finished rounds."""
        if self.journal is None:
            return
        for row in rows:
            told = {name: row.get(column) for column, name in CURVES.items()}
            self.journal.numbers(int(row["round"]), {name: float(value) for name, value in told.items() if value is not None})

    def leaks(self, rows: Sequence[Row]) -> None:
        """Images or sentences that were attacked."""
        table = pd.DataFrame(rows)
        if self.journal is None or not len(table):
            return
        table = table.assign(seen=table.get("seen", "update"))  # tables of earlier versions
        for (attack, seen, _), of in table.groupby(["attack", "seen", "round"], sort=False):
            round, who = int(of["round"].iloc[0]), str(attack) if seen == "update" else f"{attack}/{seen}"
            who = who.replace("=", ":")  # which MLflow does not take in a name
            told = {f"stolen/{who}": float((of["verdict"] == "stolen").mean())}
            if "psnr_db" in of:
                told[f"psnr_db/{who}"] = float(of["psnr_db"].clip(upper=PERFECT).median())
            else:
                told[f"in_place/{who}"] = float(of["token_accuracy"].mean())
            self.journal.numbers(round, told)
            if "psnr_db" in of and self.pictures:
                self.journal.picture(round, f"pictures/{who}", self._picture(str(attack), round, of.head(self.pictures)))

    def _picture(self, attack: str, round: int, leaks: pd.DataFrame) -> Tensor:
        """Originals above what was stolen of them, (C, H, W); white where the attack says that it has nothing."""
        from torchvision.utils import make_grid

        made, truths, stolen = self.folder.reconstructions(attack, round), [], []
        for leak in leaks.to_dict("records"):
            truth = self.setup.truth(round, leak["client"])[0][leak["image"]].cpu()
            sender = SUM if leak["seen"].startswith("sum") else leak["client"]
            at = leak["reconstruction"]
            truths.append(truth)
            stolen.append(made[sender][at].cpu().float().nan_to_num().clamp(0, 1) if at >= 0 else torch.ones_like(truth))
        images = torch.stack([*truths, *stolen])
        scale = math.ceil(SIDE / images.shape[-1])
        return make_grid(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), nrow=len(truths), pad_value=1.0)


@contextlib.contextmanager
def tracked(setup: Setup, folder: RunFolder) -> Iterator[Tracking]:
    """The run's tracking, with all that is in its tables already; folders of earlier versions name no tracker."""
    node = folder.config.get("tracker")
    if not node:
        yield Tracking(setup, folder, None)
        return
    tracker = build_checked("tracker", node)
    journal = tracker.open(folder.path, folder.config)
    finished = False
    try:
        track = Tracking(setup, folder, journal, tracker.pictures)
        track.rounds(folder.rounds().to_dict("records"))
        track.leaks(folder.leaks().to_dict("records"))
        yield track
        finished = True
    finally:
        journal.close(finished)
