"""From the attack that is exact and takes milliseconds to the one that searches for minutes: the first that works."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from attacks.evidence import Unsupported, relative_gap, size_of
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator

KINKED = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.PReLU, nn.Hardtanh, nn.MaxPool2d)


@dataclass(frozen=True)
class Escalation:
    """Tries attacks in order, each on those victims only whose reconstruction has not `converged` yet.

    An attack that cannot work on the model or the batch is passed over. Where none converges, the reconstruction whose gradient is
    nearest to the one that was sent is reported (relative squared gap, recomputed: the attacks' own losses do not compare).
    A reconstruction's `attack` names who made it; its seconds and evaluations are those of all that were tried.

    Threat model: that of its attacks.

    attacks  by name, from the cheapest to the dearest
    """

    attacks: Mapping[str, Attack]

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("an escalation needs at least one attack, got none")

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order. ValueError with all reasons if no attack supports a victim."""
        seed = int(torch.randint(2**62, (), generator=rng))
        best: dict[int, tuple[float, Reconstruction]] = {}
        spent = dict.fromkeys(range(len(seen)), (0, 0.0))
        refusals: dict[str, str] = {}
        for name, attack in self.attacks.items():
            left = [i for i in range(len(seen)) if i not in best or not best[i][1].converged]
            for size in sorted({size_of(seen[i], known) for i in left}):
                members = [i for i in left if size_of(seen[i], known) == size]
                told = known if known.labels is None else replace(known, labels=[known.labels[i] for i in members])
                try:
                    made = attack([seen[i] for i in members], told, model, generator(seed, name))
                except Unsupported as refusal:
                    refusals[name] = str(refusal)
                    continue
                for i, one in zip(members, made, strict=True):
                    spent[i] = (spent[i][0] + one.evaluations, spent[i][1] + one.seconds)
                    gap = relative_gap(
                        seen[i], known, model, one.images, one.labels if one.probabilities is None else one.probabilities
                    )
                    if i not in best or one.converged or gap < best[i][0]:
                        best[i] = (gap, replace(one, attack=f"{name} {one.attack}".strip()))
            if report:
                report(sum(one.converged for _, one in best.values()), len(seen))
        if len(best) < len(seen):
            raise Unsupported("; ".join(f"{name}: {why}" for name, why in refusals.items()))
        if report:
            report(len(seen), len(seen))
        return [replace(best[i][1], evaluations=spent[i][0], seconds=spent[i][1]) for i in range(len(seen))]


@dataclass(frozen=True)
class Where:
    """An attack for networks of one kind only: `smooth`, or those with ReLUs and maxima, which have kinks instead of curvature."""

    attack: Attack
    smooth: bool

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """What the attack makes of the observations; Unsupported on a network of the other kind."""
        kinks = sorted({type(m).__name__ for m in model.modules() if isinstance(m, KINKED)})
        if self.smooth == bool(kinks):
            kind = f"has {', '.join(kinks)}" if kinks else "is smooth"
            raise Unsupported(f"{self.attack} is for {'smooth' if self.smooth else 'kinked'} networks, and this one {kind}")
        return self.attack(seen, known, model, rng)
