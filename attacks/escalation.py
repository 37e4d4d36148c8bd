"""From the attack that is exact and takes milliseconds to the one that searches for minutes: the first that works."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from attacks.evidence import Unsupported, relative_gap, size_of
from fedsim.defense import mixes
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator

# What has a kink, by the name of its step backward.
KINKED = {"Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Hardtanh", "Hardswish", "Hardsigmoid", "Threshold", "Softshrink"}
KINKED |= {"Hardshrink", "Abs", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Max", "Min", "Amax", "Amin"}
KINKED |= {"MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"}


@dataclass(frozen=True)
class Escalation:
    """Tries attacks in order, each on those victims only whose reconstruction has not `converged` yet.

    An attack that cannot work on the model or the batch is passed over. Where none converges, the reconstruction whose gradient
    points most nearly where the one that was sent does is reported (recomputed: the attacks' own losses do not compare). Soft
    labels explain what images do not, so it is the gradient for their likeliest labels, unless a known defense mixes labels.
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
                    labels = one.labels if one.probabilities is None or not mixes(known.defense) else one.probabilities
                    gap = relative_gap(seen[i], known, model, one.images, labels, scale_free=True)
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
        if refusal := self.refusal(seen[0], known, model):
            raise Unsupported(refusal)
        return self.attack(seen, known, model, rng)

    def refusal(self, one: Observation, known: Knowledge, model: nn.Module) -> str | None:
        """Why the attack is none for this network, if so."""
        if self.smooth != bool(kinks := _kinks(one, known, model)):
            return None
        kind = f"has {', '.join(kinks)}" if kinks else "is smooth"
        return f"{self.attack} is for {'smooth' if self.smooth else 'kinked'} networks, and this one {kind}"


def _kinks(one: Observation, known: Knowledge, model: nn.Module) -> list[str]:
    """The functions with kinks that a network computes of images, as modules or in its `forward`."""
    params = {name: t.detach().requires_grad_() for name, t in one.params.items()}
    buffers = {name: t.clone() for name, t in one.buffers.items()}  # BatchNorm writes to them
    images = next(iter(params.values())).new_zeros(2, *known.image_shape)
    with torch.enable_grad(), torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        output = functional_call(model, {**params, **buffers}, (images,))
    nodes = [(output[0] if isinstance(output, tuple) else output).grad_fn]
    seen, found = set(nodes), set()
    while nodes:
        if (node := nodes.pop()) is None:
            continue
        found.add(re.sub(r"Backward\d*$", "", type(node).__name__))
        further = {following for following, _ in node.next_functions} - seen
        nodes += further
        seen |= further
    return sorted(found & KINKED)
