"""The threat-model card: who sees what, and which conditions of this run make its attack weak or hopeless."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from attacks import LBFGS, SPEAR, BagOfTokens, GradientMatching, Imprint, SpanCheck
from attacks.hidden_noise import hidden_noises
from fedsim import servers
from fedsim.accounting import quoted_epsilon, reconstruction_bound
from fedsim.data import Corpus
from fedsim.defense import Guarantee, Private, is_followed, mixes
from fedsim.models import Bert, Stochastic
from fedsim.protocols import FedAvg, FedSGD
from fedsim.secure_aggregation import Secure
from fedsim.seeding import generator
from fedsim.setup import Setup
from fedsim.tap import Tap
from fedsim.training import split
from fedsim.wire import nbytes, pack

GRADIENT_MATCHING_BATCH = 8  # Zhu et al. 2019 stop here; beyond it one gradient has too many explanations

LOOKS = {
    "off": "train whatever they are sent",
    "warn": "look for a malicious server's traps, and warn",
    "refuse": "look for a malicious server's traps, and send nothing where they find one",
}
SCORES = "accuracy and loss on all its own examples (evaluate.clients)"
GUESS = 0.1  # success of an attacker who sees nothing, for which the bound on reconstruction is told
LONELY = "none: the defense mixes the images of a batch, and a batch has one; federation.batch_size=4"
SPEAR_BATCH = 16  # what it recovers within seconds on 200 hidden units
SPAN_BATCH = 4  # what `SpanCheck` was seen to put together


def card(
    setup: Setup, tap: Tap, attack: str, defense: str, told: Sequence[bool] = (False,), *, given: bool = False
) -> list[tuple[str, str]]:
    """Lines (what, what the eavesdropper on the server knows of it).

    told   for each of the run's attackers, whether it is told the defense
    given  whether the attack is told the labels
    """
    protocol, model = setup.protocol, setup.model()
    steps = _steps(setup)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    one_gradient = isinstance(protocol, FedSGD)
    return [
        ("attacker", _attacker(setup)),
        ("the defense", _told(told) if defended(setup.config["choices"], setup.model) else "there is none"),
        ("weights", "seen: those broadcast each round"),
        (
            "update",
            ("masked" if isinstance(setup.aggregation, Secure) else "seen")
            + f", as the defense ({defense}) left it: "
            + ("the gradient of one batch" if one_gradient else "weights moved"),
        ),
        *([("sum", _sum(setup, setup.aggregation))] if isinstance(setup.aggregation, Secure) else []),
        *([("scores", f"seen, unprotected: each client's {SCORES}, every round")] if _scored(setup) else []),
        ("labels", "told: the true ones" if given else "not told"),
        ("other images", f"{len(setup.dataset.test)} test {_examples(setup)}, no client's, for attacks that use any: gias"),
        (
            "batch size",
            f"told: {_batch(setup)}" + ("" if one_gradient else f" a step, out of {_images(setup)} {_examples(setup)}"),
        ),
        ("local steps", f"told: {steps}"),
        ("learning rate", "not needed: the gradient itself is sent" if one_gradient else f"told: {protocol.lr:g}"),
        ("BatchNorm", _statistics(setup) if batch_norm else "none in this model"),
        ("clients", LOOKS[setup.inspection.action]),
        *_proved(setup, batch_norm),
        *([("mixing", LONELY)] if mixes(setup.defense) and protocol.batch_size == 1 else []),
        ("taps", _taps(tap)),
        *([("other rounds", line) for line in _other_rounds(setup, tap)] if any(told) else []),
        ("attack", attack),
    ]


def _statistics(setup: Setup) -> str:
    if not setup.protocol.train_mode:
        return "running statistics seen, and used by the clients"
    if isinstance(setup.aggregation, Secure):
        return "running statistics seen; those of the batches tell in the sum"
    return "running statistics seen; those of the batch follow from what is sent back, past the defense (gradinversion)"


def guarantee_of(setup: Setup, rounds: int) -> Guarantee | None:
    """What the defense proves of the most exposed client after so many rounds; None for one without a proof."""
    return setup.defense.guarantee(setup.exposures(rounds)) if isinstance(setup.defense, Private) else None


def _proved(setup: Setup, batch_norm: bool) -> list[tuple[str, str]]:
    rounds = setup.config.get("rounds", 1)
    if (proved := guarantee_of(setup, rounds)) is None:
        return []
    z, exposures = proved.noise_multiplier, setup.exposures(rounds)
    every = [(e.rounds * e.uses, e.rate) if proved.unit == "example" else (e.rounds, 1.0) for e in exposures]
    quoted = max(quoted_epsilon(z, releases, proved.delta, rate) for releases, rate in every)
    bound = math.ceil(1000 * reconstruction_bound(GUESS, z, proved.releases)) / 1000  # never below what is proved
    beside = "the reported training loss and number of examples" + (", BatchNorm statistics" if batch_norm else "")
    beside += f", each client's {SCORES}" if _scored(setup) else ""
    beside += ", whether a client refuses" if setup.inspection.action == "refuse" else ""
    beside += "; a server that draws the noise again from the run's seed, which it knows"
    return [
        (
            "privacy",
            f"epsilon {proved.epsilon:.3g} at delta {proved.delta:g} if one {proved.unit} is replaced, after {rounds} rounds: "
            f"noise multiplier {z:.3g}, {proved.releases} releases; {quoted:.3g} as papers quote it, added or removed",
        ),
        *_promised(setup, proved),
        ("reconstruction", f"an attacker who guesses right with {GUESS:.0%} succeeds with {bound:.1%} at most"),
        ("not covered", beside),
    ]


def _promised(setup: Setup, proved: Guarantee) -> list[tuple[str, str]]:
    """That delta is too large, where it is: a mechanism that publishes one of n units whole is (0, 1/n)-private."""
    n = min(map(len, setup.shards)) if proved.unit == "example" else len(setup.shards)
    if proved.delta * n < 1:
        return []
    of = f"the {n} examples of the smallest shard" if proved.unit == "example" else f"{n} clients"
    return [("delta", f"{proved.delta:g} promises next to nothing: it allows for giving one of {of} away; take less than 1/{n}")]


def _batch(setup: Setup) -> str:
    """Examples of a step, for clients that have so many."""
    asked, most = setup.protocol.batch_size, max(map(len, setup.shards))
    return f"{asked}" if asked <= most else f"{most}, all that a client has (federation.batch_size={asked})"


def _scored(setup: Setup) -> bool:
    return bool(setup.config.get("evaluate", {}).get("clients"))


def defended(choices: Mapping[str, str], model: Callable[[], nn.Module]) -> bool:
    """Whether there is a defense to know of: of updates, in the model, or in how they are added up."""
    summed = choices.get("aggregation", "plain") != "plain"
    return summed or choices["defense"] != "none" or bool(hidden_noises(model()))


def _told(attackers: Sequence[bool]) -> str:
    ways = {False: "not told", True: "told, and rehearsed on public images: adaptive in tables"}
    return "; and once more ".join(ways[told] for told in attackers) or ways[False]


def _attacker(setup: Setup) -> str:
    if setup.server.changes:
        return f"malicious: changes the model: {setup.server.changes}"
    return "honest but curious: reads the wire, changes nothing"


def obstacles(setup: Setup, attack: Any) -> list[tuple[str, str]]:
    """Conditions (`weak` or `hopeless`, why) under which the attack fails with no defense at all."""
    if isinstance(setup.server, servers.Imprint) and isinstance(attack, Imprint):
        return _crowded(setup, setup.server)
    if isinstance(attack, BagOfTokens):
        return []  # every step leaves its words in the update, of however many sentences
    protocol = setup.protocol
    found = []
    steps = _steps(setup)
    one_gradient = not getattr(attack, "imitate", False)
    if one_gradient and steps > 1:
        grade = "hopeless" if steps > 5 else "weak"
        found.append(
            (
                grade,
                f"{steps} local steps: the attack explains one gradient; attack=fedavg imitates them, federation=fedsgd has none",
            )
        )
    if one_gradient and isinstance(protocol, FedAvg) and protocol.momentum and steps > 1:
        found.append(("weak", f"local momentum {protocol.momentum:g}: later steps repeat earlier gradients; federation.momentum=0"))
    clients = _summed(setup)
    batch = clients * min(protocol.batch_size, max(map(len, setup.shards)))
    if isinstance(attack, SpanCheck):
        found += _span_obstacles(setup, batch)
    elif batch > (SPEAR_BATCH if isinstance(attack, SPEAR) else 1):
        grade = "hopeless" if batch > GRADIENT_MATCHING_BATCH else "weak"
        what = f"sums of {clients} clients are" if clients > 1 else "batches of"
        smaller = "federation.per_round=1" if clients > 1 else "federation.batch_size=1"
        share = "that share" if clients > 1 else "share"
        found.append((grade, f"{what} {batch} {_examples(setup)} {share} one gradient; {smaller}"))
    modules = list(setup.model().modules())
    if protocol.train_mode:
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in modules):
            found.append(("hopeless", "dropout: the attacker does not know which units were dropped; model.dropout=0"))
        blind = isinstance(attack, GradientMatching) and attack.noise == "drawn" and attack.matched == "all"
        if blind and any(isinstance(m, Stochastic) for m in modules):
            found.append(("hopeless", "the model draws at random, and the attack draws anew each time; attack=precode_aware"))
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
            found.append(("weak", "BatchNorm in training mode ties the images of a batch together; federation.train_mode=false"))
    if isinstance(getattr(attack, "optimizer", None), LBFGS) and any(isinstance(m, nn.ReLU) for m in modules):
        found.append(
            ("weak", "ReLU's second derivative is zero, so L-BFGS sees little; model.activation=sigmoid, or inverting_gradients")
        )
    return found


def _crowded(setup: Setup, server: servers.Imprint) -> list[tuple[str, str]]:
    found = []
    steps, images = _steps(setup), images_behind(setup)
    alone = (1 - 1 / server.bins) ** (images - 1)
    if alone < 0.5:
        found.append(
            ("weak", f"{images} images in {server.bins} bins: {alone:.0%} are alone in theirs; server.bins={2 * images}, or more")
        )
    if steps > 1 and server.kind == "relu":
        found.append(("weak", f"{steps} local steps move what one bin is subtracted from; server.kind=hardtanh"))
    return found


def _span_obstacles(setup: Setup, batch: int) -> list[tuple[str, str]]:
    tokens, model = batch * setup.dataset.image_shape[0], setup.model()
    width = model.stem.tokens.embedding_dim if isinstance(model, Bert) else 0
    if tokens < width - 1 and batch > SPAN_BATCH:
        return [("weak", f"the search rarely puts {batch} sentences together; federation.batch_size=2, or attack.starts=64")]
    if 4 * tokens <= 3 * width or (batch == 1 and tokens < width - 1):
        return []
    grade = "hopeless" if tokens >= width - 1 else "weak"
    return [(grade, f"{tokens} tokens fill most of the {width} dimensions of their span; federation.batch_size=1, or model.width")]


def images_behind(setup: Setup) -> int:
    """How many images are in what an attacker can read, at most."""
    return _summed(setup) * min(max(map(len, setup.shards)), _steps(setup) * setup.protocol.batch_size)


def _summed(setup: Setup) -> int:
    """How many clients' updates are in what an attacker can read."""
    return setup.protocol.per_round if isinstance(setup.aggregation, Secure) else 1


def _sum(setup: Setup, secure: Secure) -> str:
    """What the server gets of secure aggregation, and what becomes of the defense under it."""
    clients = _summed(setup)
    if clients == 1:
        return "seen: of one client, whose update it is: nothing is hidden; federation.per_round=2 or more"
    seen = f"seen: of {clients} clients, or at least {secure.needed(clients)}; also how many examples each has"
    params, _ = split(setup.model())
    sent, _ = setup.defense(pack(params), setup.defense.init(params), generator(0, "card"))
    if any(packet.support is not None for packet in sent.values()):
        return f"{seen}. Dense vectors travel, so sparsifying saves nothing, and what one client alone sends stands in it as it is"
    if sum(map(nbytes, sent.values())) < sum(map(nbytes, pack(params).values())):
        return f"{seen}. Dense vectors of {secure.bits} bits an entry travel, so compressing saves nothing"
    return seen


def _examples(setup: Setup) -> str:
    return "sentences" if isinstance(setup.dataset, Corpus) else "images"


def _steps(setup: Setup) -> int:
    """Local steps of the client with the most images."""
    return len(setup.protocol.batches(max(setup.shards, key=len), setup.seed, 1, 0))


def _other_rounds(setup: Setup, tap: Tap) -> list[str]:
    """What somebody who is told the defense makes of what a client sent before."""
    lines = []
    if is_followed(setup.defense):
        followed = "used: they bound what the defense remembers, of clients that are always listened to"
        lines.append(followed if tap.follows_any else "not used: what the defense remembers needs tap.rounds=all tap.clients=all")
    if min(map(len, setup.shards)) < setup.protocol.batch_size and not hidden_noises(setup.model()):
        lines.append("held together with this round's, of clients that have fewer images than a batch: they are the same each time")
    return lines


def _images(setup: Setup) -> str:
    sizes = sorted(map(len, setup.shards))
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def _taps(tap: Tap) -> str:
    every = [f"every {tap.every} rounds"] if tap.every else []
    named = ["all rounds"] if tap.rounds == "all" else [f"rounds {', '.join(map(str, tap.rounds))}"] if tap.rounds else []
    whom: Any = tap.clients
    if isinstance(whom, int):
        who = f"{whom} client{'s' * (whom > 1)} at random"
    else:
        who = "all clients" if whom == "all" else f"clients {list(whom)}"
    return f"{' and '.join(named + every) or 'none'}, {who}"
