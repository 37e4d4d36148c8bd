"""What an attacker does about a defense it knows: it works from what the defense leaves possible, and rehearses on public images.

Whoever knows a defense can run it. So the choices that decide under noise, rounding or missing entries, such as the weight of a
prior, are not guessed: each variant of an attack is tried on updates of public images that went through the same defense, and the
one that sees most of them is used on the victims (adaptive evaluation: Tramer et al. 2020; by defense: Balunovic et al. 2022).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks import metrics
from attacks.escalation import Escalation, Where
from attacks.evidence import Unsupported, size_of, views
from attacks.generative import GenerativePrior
from attacks.hidden_noise import hidden_noises
from attacks.matching import GradientMatching
from attacks.optimizers import Stop
from attacks.problems import Plan, Problems, in_chunks
from attacks.terms import CosineGap, TotalVariation
from attacks.unmixing import Undone, Unmixed
from fedsim.defense import (
    BatchDefense,
    Defense,
    Explained,
    GradientDefense,
    Mixing,
    Reversible,
    State,
    batch_parts,
    hooks_of,
    parts_of,
)
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.seeding import generator
from fedsim.training import Batch, local_update
from fedsim.updates import Update
from fedsim.wire import Packets, pack, unpack

WEIGHTS = (1e-3, 1e-2, 1e-1)  # of total variation: from a tie-break to images that are nearly smooth
WARM_UP = 8  # rounds that fill a memory before a rehearsal
REHEARSED = ""  # name of what is rehearsed in an escalation: its variants have those of its members
AS_WELL = 1.1  # a gap is as good as the truth's up to this factor
SETTLED = 0.5  # decibels that the second half of a search gains at most, of one that more evaluations do not help


@dataclass(frozen=True)
class Rehearsed:
    """The one of `variants` that reconstructs public images best from updates that went through the known defense.

    A reconstruction `converged` if it explains what was seen as well as the truth explained it in rehearsals, and the second half
    of so long a search brought public images no nearer: then more of the same does not help, and what was not stolen was protected
    from it. Not so behind a defense that does not say what it leaves possible (`explain`): who does not know what it does to an
    update explains it by wrong images as well as by the truth. `attack` names the variant.

    Threat model: that of the variants, of an attacker who also knows the clients' defense (`known.defense`) and has public images.

    variants     attacks by name; one for networks of one kind is left out of rehearsals on another (`Where`)
    rehearsals   public victims for each variant and round, or as many as there are images for
    evaluations  of a rehearsal, at most: enough to tell the variants apart
    """

    variants: Mapping[str, GradientMatching | Where]
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
        if not seen:
            return []
        variants = self._fitting(seen[0], known, model)
        seed = int(torch.randint(2**62, (), generator=rng))
        # What is left of a trained network's gradient is not what is left of an untrained one's: each round has its rehearsal.
        kinds: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, one in enumerate(seen):
            kinds[_kind(one, known)].append(i)
        stages = [self._stage([seen[i] for i in members], known, model, seed) for members in kinds.values()]
        chosen = dict(zip(kinds, self._rehearsed(variants, stages, known, model, seed), strict=True))
        found: dict[int, Reconstruction] = {}
        for name, attack in variants.items():
            members = [i for kind, those in kinds.items() if chosen[kind].name == name for i in those]
            if not members:
                continue
            told = known if known.labels is None else replace(known, labels=[known.labels[i] for i in members])
            before = len(found)
            made = attack(
                [seen[i] for i in members],
                told,
                model,
                generator(seed, "attack"),
                report=lambda done, _, before=before: report(before + done, len(seen)) if report else None,  # type: ignore[misc]
            )
            explained: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for i, stolen in zip(members, made, strict=True):
                found[i] = replace(stolen, attack=name)
                kind, unit = _kind(seen[i], known), float(_problems([seen[i]], known, model, attack).unit)
                if not stolen.converged and stolen.loss <= chosen[kind].gap * unit and _is_understood(known.defense):
                    explained[kind].append(i)
            settled = self._settle(attack, [chosen[kind] for kind in explained], known, model, seed)
            for kind, ended in zip(explained, settled, strict=True):
                found |= {i: replace(found[i], converged=ended) for i in explained[kind]}
        return [found[i] for i in range(len(seen))]

    def _fitting(self, one: Observation, known: Knowledge, model: nn.Module) -> dict[str, GradientMatching]:
        """The variants for networks of this kind. Raises Unsupported if there are none."""
        fitting, refusals = {}, []
        for name, attack in self.variants.items():
            if isinstance(attack, GradientMatching):
                fitting[name] = attack
            elif (refusal := attack.refusal(one, known, model)) is None:
                assert isinstance(attack.attack, GradientMatching)
                fitting[name] = attack.attack
            else:
                refusals.append(refusal)
        if not fitting:
            raise Unsupported("; ".join(dict.fromkeys(refusals)))
        return fitting

    def _stage(self, seen: Sequence[Observation], known: Knowledge, model: nn.Module, seed: int) -> "_Stage":
        """Public victims in the place of these."""
        images, public = size_of(seen[0], known), known.public
        count = 0 if public is None else min(self.rehearsals, len(public) // images)
        if public is None or count == 0:
            raise ValueError(f"an attack that rehearses needs known.public, {images} or more images of the same kind")
        order = torch.randperm(len(public), generator=generator(seed, "rehearsal"))
        device = next(iter(seen[0].params.values())).device
        batches = [public.batch(index) for index in order[: count * images].split(images)]
        own = [(x.to(device), y.to(device)) for x, y in batches]
        played = [self._played(seen[i % len(seen)], own[i:] + own[:i], known, model, seed, i) for i in range(count)]
        return _Stage(played, [_trained_on(one, batch, known, seed) for one, batch in zip(played, own, strict=True)])

    def _rehearsed(
        self,
        variants: Mapping[str, GradientMatching],
        stages: "Sequence[_Stage]",
        known: Knowledge,
        model: nn.Module,
        seed: int,
    ) -> "list[_Chosen]":
        """The best variant for each stage."""
        tried: list[list[tuple[float, str, list[Reconstruction]]]] = [[] for _ in stages]
        for name, attack in variants.items():
            made = _performed(attack, self.evaluations, stages, known, model, generator(seed, "rehearsal", "attack"))
            for stage, found, scored in zip(stages, made, tried, strict=True):
                score = stage.decibels(found)
                scored.append((-math.inf if math.isnan(score) else score, name, found))  # images that are no numbers are no use
        best = [max(scored, key=lambda one: one[0]) for scored in tried]
        return [
            _Chosen(stage, name, AS_WELL * self._gap_of_truth(stage, known, model, variants[name], seed), found)
            for stage, (_, name, found) in zip(stages, best, strict=True)
        ]

    def _settle(
        self, attack: GradientMatching, chosen: "Sequence[_Chosen]", known: Knowledge, model: nn.Module, seed: int
    ) -> list[bool]:
        """For each stage whether more of this search, which was chosen, would bring public images no nearer."""
        budget, made = attack.optimizer.evaluations, [one.found for one in chosen]
        if budget > self.evaluations and chosen:  # else a rehearsal was the whole search
            stages = [one.stage for one in chosen]
            made = _performed(attack, budget, stages, known, model, generator(seed, "settling"))
        return [one.stage.settled(found, budget) for one, found in zip(chosen, made, strict=True)]

    def _played(
        self, one: Observation, batches: Sequence[Batch], known: Knowledge, model: nn.Module, seed: int, number: int
    ) -> Observation:
        """What would have been seen in the place of a victim, with the first of these batches.

        A client with a memory sent the other batches before, unless its images are always the same. Of a sum each client has its
        part of the batch, and no past.
        """
        assert isinstance(known.defense, Defense)
        if one.summed:
            packets, buffers = self._played_sum(one, batches[0], known, model, seed, number)
            return replace(one, packets=packets, sent_buffers=buffers)
        state = known.defense.init(one.update)
        sent: Observation | None = None
        for back, view in _history(one, remembered=bool(state)):
            batch = batches[0 if known.same_images else back % len(batches)]
            packets, state, buffers = self._sent(view, batch, (0, 1), state, known, model, seed, number, back)
            previous = None if view.previous is None else sent
            sent = replace(view, packets=packets, client=number, sent_buffers=buffers, previous=previous)
        assert sent is not None
        return sent

    def _played_sum(
        self, one: Observation, batch: Batch, known: Knowledge, model: nn.Module, seed: int, number: int
    ) -> tuple[Packets, Update]:
        """The mean update, and buffers, of as many clients, which share the batch."""
        assert isinstance(known.defense, Defense)
        clients, state = len(one.summed), known.defense.init(one.update)
        sent = [self._sent(one, batch, (i, clients), state, known, model, seed, number * clients + i, 0) for i in range(clients)]
        return pack(_mean([unpack(packets) for packets, _, _ in sent])), _mean([buffers for _, _, buffers in sent])

    def _sent(
        self,
        view: Observation,
        batch: Batch,
        part: tuple[int, int],
        state: State,
        known: Knowledge,
        model: nn.Module,
        seed: int,
        number: int,
        back: int,
    ) -> tuple[Packets, State, Update]:
        """What one of several clients sends, that has each `part[1]`-th image of every step's batch from `part[0]` on: its update,
        what it remembers, and those of its buffers that are sent in the victim's place."""
        assert isinstance(known.defense, Defense)
        plan, (x, y), (first, step) = Plan.of(view, known, True), batch, part
        places = [torch.tensor(places)[first::step] % plan.images for places in plan.steps]
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(seed + number)  # for models that draw
            trained = local_update(
                model,
                view.params,
                view.buffers,
                [(x[those], y[those]) for those in places],
                lr=known.lr or 1.0,
                momentum=known.momentum,
                weight_decay=known.weight_decay,
                proximal=known.proximal,
                hooks=hooks_of(known.defense, known.num_classes, seed, view.round, number),
            )
        packets, state = known.defense(pack(trained.update), state, generator(seed, "rehearsal", "defense", number, back))
        return packets, state, {name: trained.buffers[name] for name in view.sent_buffers}

    def _gap_of_truth(self, stage: "_Stage", known: Knowledge, model: nn.Module, attack: GradientMatching, seed: int) -> float:
        if attack.noises(model):  # what the clients drew is part of the truth, and not among what is told here
            return 0.0
        group = _problems(stage.played, known, model, attack)
        group.labels = torch.stack([torch.cat([y] * group.plan.copies) for _, y in stage.truth])
        points = torch.stack([x.repeat(group.plan.copies, 1, 1, 1).flatten() for x, _ in stage.truth]).to(group.dtype)
        with torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []):
            torch.manual_seed(seed)  # for models that draw
            gaps = in_chunks(group.gaps, points, torch.arange(len(points), device=points.device), 1)
        return float((gaps / group.unit).max())


def _mean(updates: Sequence[Update]) -> Update:
    return {name: torch.stack([one[name] / len(updates) for one in updates]).sum(0) for name in updates[0]}


def _performed(
    attack: GradientMatching,
    evaluations: int,
    stages: "Sequence[_Stage]",
    known: Knowledge,
    model: nn.Module,
    rng: torch.Generator,
) -> list[list[Reconstruction]]:
    """What the search makes of each stage's public victims from one start, within so many evaluations, and what it had halfway.

    All stages are one program.
    """
    budget = min(evaluations, attack.optimizer.evaluations)
    alone = replace(attack, optimizer=replace(attack.optimizer, evaluations=budget), restarts=1, record=max(1, budget // 2))
    told = replace(known, labels=[y for stage in stages for _, y in stage.truth])
    made = iter(alone([one for stage in stages for one in stage.played], told, model, rng))
    return [[next(made) for _ in stage.played] for stage in stages]


def _is_understood(defense: object) -> bool:
    """Whether all that a defense does to an update is told by its `explain`; what it does in training, it does in rehearsals."""
    parts = parts_of(defense)
    return all(map(_is_understood, parts)) if parts else isinstance(defense, Explained | BatchDefense | GradientDefense)


@dataclass(frozen=True)
class _Chosen:
    """What a rehearsal says of a stage.

    stage  what was rehearsed
    name   of the variant that came nearest to the public images
    gap    in units, that the truth leaves at most
    found  what that variant made of them
    """

    stage: "_Stage"
    name: str
    gap: float
    found: list[Reconstruction]


@dataclass(frozen=True)
class _Stage:
    """Public victims: what they would have sent, and which images and labels they would have trained on."""

    played: list[Observation]
    truth: list[tuple[Tensor, Tensor]]

    def decibels(self, made: Sequence[Reconstruction]) -> float:
        """Mean PSNR of what was made of them."""
        scores = []
        for one, (x, _) in zip(made, self.truth, strict=True):
            i, j = metrics.match(one.images, x)
            scores.append(metrics.psnr_db(one.images[i], x[j]).mean())
        return float(torch.stack(scores).mean())

    def settled(self, made: Sequence[Reconstruction], budget: int) -> bool:
        """Whether the second half of a search of `budget` evaluations brought them less than SETTLED nearer, in the mean."""
        halfway = []
        for one in made:
            assert one.trace is not None
            spent = one.trace.evaluations
            earlier = (spent <= budget // 2 + 1) & (spent < budget)
            if not bool(earlier.any()):  # so few evaluations have no half
                return False
            halfway.append(replace(one, images=one.trace.images[int(earlier.nonzero().max())]))
        return self.decibels(made) - self.decibels(halfway) < SETTLED


def _trained_on(one: Observation, batch: Batch, known: Knowledge, seed: int) -> Batch:
    """What a public victim's defense made of its batch, as it did for what was seen of it.

    The batch itself, where there were several local steps, which changed the same image in several ways, or several clients.
    """
    change = hooks_of(known.defense, known.num_classes, seed, one.round, one.client).batch
    return batch if change is None or (known.local_steps or 1) > 1 or one.summed else change(*batch)


def _kind(one: Observation, known: Knowledge) -> tuple[int, ...]:
    """What a victim must share with another to be rehearsed with it: images, round, views, clients."""
    return size_of(one, known), one.round, len(views(one, known)), len(one.clients)


def _history(one: Observation, *, remembered: bool) -> list[tuple[int, Observation]]:
    """What a client sent up to a message, the oldest first, each with how many came after it.

    remembered  whether the defense has a memory: rounds of which nothing was seen are then played as well, at the oldest weights
    """
    found = [one]
    while found[-1].previous is not None:
        found.append(found[-1].previous)
    if remembered and not found[-1].followed:
        found += [found[-1]] * min(found[-1].round - 1, WARM_UP)
    return list(enumerate(found))[::-1]


def _problems(seen: Sequence[Observation], known: Knowledge, model: nn.Module, attack: GradientMatching) -> Problems:
    return Problems.of(seen, Plan.of(seen[0], known, attack.imitate), known, model, attack)


def adapted(attack: Attack, model: nn.Module, defense: object) -> Attack | None:
    """What somebody who means to use `attack`, and comes to know of the clients' `defense`, does instead; None if nothing else.

    Gradient matching is rehearsed with total variation of several weights, and does not stop at a small gap, which a defense may
    leave at other images too. Where the defense hides the length of an update, a gap that ignores it is rehearsed as well, from
    grey; where the model draws at random, leaving out what stands behind the draw, and looking for the draw. Where the defense
    mixes images, soft labels are looked for; where it reflects pixels, |2 p - 1| is what varies little. What it did to the images
    is then undone, whatever found them; of reflected ones no more than that, as they may be their negatives. The searches of an
    escalation are rehearsed together. A search among a generator's images knows the defense by `known.defense` alone.
    """
    other = _informed(attack, model, defense)
    if isinstance(other, GenerativePrior):
        return other
    for part in reversed(batch_parts(defense)):  # what was done last is undone first
        if isinstance(part, Reversible):
            other = Undone(other or attack, part)
        elif isinstance(part, Mixing):
            other = Unmixed(other or attack, part)
            if part.reflects:
                break
    return other


def _rehearsed_together(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks, with one rehearsal in the place of all those that rehearse: behind a defense each of them may explain what was
    seen as well as the truth does, and what it made of public images tells which of them sees most."""
    found: dict[str, Attack] = {}
    variants: dict[str, GradientMatching | Where] = {}
    for name, attack in attacks.items():
        if isinstance(attack, Rehearsed):
            variants |= {f"{name} {way}": one for way, one in attack.variants.items()}
        elif isinstance(attack, Where) and isinstance(attack.attack, Rehearsed):
            variants |= {f"{name} {way}": replace(attack, attack=one) for way, one in attack.attack.variants.items()}
        else:
            found[name] = attack
            continue
        found[REHEARSED] = Rehearsed(variants)
    return found


def rehearses(attack: object) -> bool:
    """Whether an attack, or one that it is made of, rehearses."""
    inner = (*getattr(attack, "attacks", {}).values(), *([attack.attack] if hasattr(attack, "attack") else []))
    return isinstance(attack, Rehearsed) or any(map(rehearses, inner))


def _informed(attack: Attack, model: nn.Module, defense: object) -> Attack | None:
    """As `adapted`, for what was trained on, whatever that was made of."""
    if isinstance(attack, GenerativePrior):
        return attack
    if isinstance(attack, Escalation):
        return replace(
            attack, attacks=_rehearsed_together({n: _informed(one, model, defense) or one for n, one in attack.attacks.items()})
        )
    if isinstance(attack, Where):
        return replace(attack, attack=_informed(attack.attack, model, defense) or attack.attack)
    if not isinstance(attack, GradientMatching):
        return None
    mixing = [part for part in batch_parts(defense) if isinstance(part, Mixing)]
    if mixing:
        attack = replace(attack, labels="joint", init="grey" if attack.init == "normal" else attack.init)
    weights = [TotalVariation(weight, reflected=any(part.reflects for part in mixing)) for weight in WEIGHTS]
    others = tuple(prior for prior in attack.priors if not isinstance(prior, TotalVariation))
    ways: dict[str, GradientMatching] = {"": attack}
    if hidden_noises(model):
        # Each of several local steps draws anew, so where the draw is looked for they are taken for one.
        ways = {"before_noise ": replace(attack, matched="before_noise"), "sought ": replace(attack, noise="sought", imitate=False)}
    if getattr(defense, "rescales", False) and not attack.gap.scale_free:
        # Random noise is a start that a gap of directions does not get away from.
        init = "grey" if attack.init == "normal" else attack.init
        ways |= {f"cosine {way}": replace(one, gap=CosineGap(), init=init) for way, one in ways.items()}
    return Rehearsed(
        {
            f"{way}tv={prior.weight:g}": replace(changed, priors=(*others, prior), stop=Stop())
            for way, changed in ways.items()
            for prior in weights
        }
    )
