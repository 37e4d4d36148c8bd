"""What an attacker does about a defense it knows: it works from what the defense leaves possible, and rehearses on public images.

Whoever knows a defense can run it. So the choices that decide under noise, rounding or missing entries, such as the weight of a
prior, are not guessed: each variant of an attack is tried on updates of public images that went through the same defense, and the
one that sees most of them is used on the victims (adaptive evaluation: Tramer et al. 2020; by defense: Balunovic et al. 2022).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks import metrics
from attacks.evidence import size_of
from attacks.generative import GenerativePrior
from attacks.hidden_noise import hidden_noises
from attacks.matching import GradientMatching, Plan, Problems
from attacks.optimizers import Stop
from attacks.terms import TotalVariation
from fedsim.defense import Defense, hooks_of
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator
from fedsim.training import local_update
from fedsim.wire import pack

WEIGHTS = (1e-3, 1e-2, 1e-1)  # of total variation: from a tie-break to images that are nearly smooth
AS_WELL = 1.1  # a gap is as good as the truth's up to this factor: the truth's own varies by as much from one draw to the next


@dataclass(frozen=True)
class Rehearsed:
    """The one of `variants` that reconstructs public images best from updates that went through the known defense.

    A reconstruction `converged` if it explains what was seen as well as the truth explained it in rehearsals: then more of the same
    search cannot help, and what was not stolen was protected from it. `attack` names the variant.

    Threat model: that of the variants, of an attacker who also knows the clients' defense (`known.defense`) and has public images.

    variants    attacks by name
    rehearsals  public victims for each variant
    evaluations of a rehearsal, at most: enough to tell the variants apart
    """

    variants: Mapping[str, GradientMatching]
    rehearsals: int = 8
    evaluations: int = 500

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("a rehearsal needs at least one variant, got none")
        if self.rehearsals < 1:
            raise ValueError(f"rehearsals must be >= 1, got {self.rehearsals}")

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order. ValueError without a defense or public images."""
        if not isinstance(known.defense, Defense):
            raise ValueError("an attack that rehearses needs known.defense, the clients' defense")
        if known.public is None or len(known.public) <= self.rehearsals:
            raise ValueError(f"an attack that rehearses needs known.public, more than {self.rehearsals} images of the same kind")
        seed = int(torch.randint(2**62, (), generator=rng))
        found: dict[int, Reconstruction] = {}
        # What is left of a trained network's gradient is not what is left of an untrained one's: each round has its rehearsal.
        for kind in sorted({(size_of(one, known), one.round) for one in seen}):
            members = [i for i, one in enumerate(seen) if (size_of(one, known), one.round) == kind]
            told = known if known.labels is None else replace(known, labels=[known.labels[i] for i in members])
            victims = [seen[i] for i in members]
            name, as_well = self._rehearse(victims, told, model, seed)
            attack = self.variants[name]
            units = Problems.of(victims, Plan.of(victims[0], told, attack.imitate), told, model, attack).unit
            made = attack(victims, told, model, generator(seed, "attack"))
            for i, one, unit in zip(members, made, units.tolist(), strict=True):
                explained = one.loss <= (as_well + attack.tolerance) * unit
                found[i] = replace(one, attack=one.attack or name, converged=explained)
            if report:
                report(len(found), len(seen))
        return [found[i] for i in range(len(seen))]

    def _rehearse(self, seen: Sequence[Observation], known: Knowledge, model: nn.Module, seed: int) -> tuple[str, float]:
        """The best variant's name, and the gap, in units, that the truth leaves at most."""
        assert known.public is not None
        images = size_of(seen[0], known)
        order = torch.randperm(len(known.public), generator=generator(seed, "rehearsal"))
        count = min(self.rehearsals, (len(order) - 1) // images) or 1
        truth = [known.public.batch(index) for index in order[: count * images].split(images)]
        rest = known.public.take(order[count * images :])  # what a generative prior may learn from
        device = next(iter(seen[0].params.values())).device
        truth = [(x.to(device), y.to(device)) for x, y in truth]
        played = [self._played(seen[i % len(seen)], x, y, known, model, seed, i) for i, (x, y) in enumerate(truth)]
        told = replace(known, labels=[y for _, y in truth], public=rest)
        scores = {}
        for name, attack in self.variants.items():
            brief = replace(
                attack,
                optimizer=replace(attack.optimizer, evaluations=min(self.evaluations, attack.optimizer.evaluations)),
                restarts=1,
                record=0,
            )
            made = brief(played, told, model, generator(seed, "rehearsal", "attack"))
            decibels = []
            for one, (x, _) in zip(made, truth, strict=True):
                i, j = metrics.match(one.images, x)
                decibels.append(metrics.psnr_db(one.images[i], x[j]).mean())
            scores[name] = float(torch.stack(decibels).mean())
        best = max(scores, key=lambda name: scores[name])
        return best, AS_WELL * self._gap_of_truth(played, truth, told, model, self.variants[best])

    def _played(
        self, one: Observation, x: Tensor, y: Tensor, known: Knowledge, model: nn.Module, seed: int, number: int
    ) -> Observation:
        """What a client with these images would have sent in the place of a victim."""
        assert isinstance(known.defense, Defense)
        plan = Plan.of(one, known, True)
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(seed + number)  # for models that draw
            trained = local_update(
                model,
                one.params,
                one.buffers,
                [(x[places], y[places]) for places in (torch.tensor(step) % plan.images for step in plan.steps)],
                lr=known.lr or 1.0,
                momentum=known.momentum,
                weight_decay=known.weight_decay,
                proximal=known.proximal,
                hooks=hooks_of(known.defense, known.num_classes, seed, one.round, number),
            )
        packets, _ = known.defense(
            pack(trained.update), known.defense.init(trained.update), generator(seed, "rehearsal", "defense", number)
        )
        return replace(one, packets=packets, client=number, sent_buffers={})

    def _gap_of_truth(
        self,
        played: Sequence[Observation],
        truth: Sequence[tuple[Tensor, Tensor]],
        known: Knowledge,
        model: nn.Module,
        attack: GradientMatching,
    ) -> float:
        if attack.noises(model):  # what the clients drew is part of the truth, and not among what is told here
            return 0.0
        plan = Plan.of(played[0], known, attack.imitate)
        group = Problems.of(played, plan, known, model, attack)
        group.labels = torch.stack([y for _, y in truth]).repeat(1, plan.copies)
        points = torch.stack([x.repeat(plan.copies, 1, 1, 1).flatten() for x, _ in truth]).to(group.dtype)
        gaps = [group.gaps(points[i : i + 1], torch.tensor([i], device=points.device)) for i in range(len(points))]
        return float((torch.cat(gaps) / group.unit).max())


def adapted(attack: Attack, model: nn.Module) -> Attack | None:
    """What somebody who means to use `attack`, and comes to know of the clients' defense, does instead; None if nothing else.

    Gradient matching is rehearsed with total variation of several weights, and does not stop at a small gap, which a defense may
    leave at other images too. Where the model draws at random, leaving out what stands behind the draw and looking for the draw
    are rehearsed as well. A search among a generator's images knows the defense by `known.defense` alone.
    """
    if isinstance(attack, GenerativePrior):
        return attack
    if not isinstance(attack, GradientMatching):
        return None
    others = tuple(prior for prior in attack.priors if not isinstance(prior, TotalVariation))
    ways: dict[str, GradientMatching] = {"": attack}
    if hidden_noises(model):
        ways = {"before_noise ": replace(attack, matched="before_noise"), "sought ": replace(attack, noise="sought")}
    return Rehearsed(
        {
            f"{way}tv={weight:g}": replace(changed, priors=(*others, TotalVariation(weight)), stop=Stop())
            for way, changed in ways.items()
            for weight in WEIGHTS
        }
    )
