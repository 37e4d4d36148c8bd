"""How much of the truth an attack found. Here, and only here, what was stolen meets what was stolen from."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attacks import metrics
from attacks.hidden_noise import hidden_noises
from fedsim.client import chance_seeded
from fedsim.data import Corpus, Dataset
from fedsim.data.text import filled, is_word
from fedsim.observation import Knowledge, Observation, Reconstruction
from fedsim.protocols import FedAvg
from fedsim.run import on_device
from fedsim.seeding import generator, seed_of
from fedsim.setup import Setup, model_of
from fedsim.updates import Update, relative_error

STOLEN_MSE = metrics.BARS["MSE < 0.03"].level
ADAPTIVE = "_adaptive"  # ends the name of an attack by somebody who knows the defense
STOLEN_TOKENS = 0.8  # share of a sentence's words in their places; the usual word at each place is right for 0.07 of them


def knowledge(setup: Setup, num_examples: int, clients: int = 1) -> Knowledge:
    """What an honest but curious server is told: the shapes, and the training that it ordered itself.

    The dataset's test images are public: clients' shards are parts of its training images.

    A sum of clients is taken for one client with batches as large as all of theirs together. That is what it is after one step;
    after several, each client has gone its own way.

    num_examples  what the client reports, from which the number of its local steps follows; of a sum, what all report
    clients       in the sum
    """
    protocol, dataset = setup.protocol, setup.dataset
    told = Knowledge(
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        batch_size=num_examples,
        local_steps=1,
        lr=1.0,
        public=dataset.test if isinstance(dataset, Dataset) else None,
        # Fewer than it was ordered to use: it has no more.
        same_images=clients == 1 and num_examples < protocol.batch_size,
    )
    if not isinstance(protocol, FedAvg):
        return told
    each = num_examples / clients
    batch = min(protocol.batch_size, each)
    return replace(
        told,
        batch_size=round(batch * clients),
        local_steps=protocol.steps or protocol.epochs * math.ceil(each / batch),
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        proximal=setup.config["strategy"].get("proximal_mu", 0.0),
    )


def leaks(
    setup: Setup, attack: str, seen: Sequence[Observation], found: Sequence[Reconstruction], *, adaptive: bool = False
) -> list[dict[str, Any]]:
    """One row for each image or sentence that was attacked, in a sum those of all its clients, with trivial baselines beside it.

    adaptive  whether the attacker knew the defense
    """
    rows_of = _sentence_rows if isinstance(setup.dataset, Corpus) else _rows
    who = "adaptive" if adaptive else "naive"
    return [row for one, made in zip(seen, found, strict=True) for row in rows_of(setup, attack, who, one, made)]


def verdict(passed: bool, converged: bool) -> str:
    """`stolen`, `not stolen`, or `not converged`: a search that did not come to its end says nothing about protection."""
    if passed:
        return "stolen"
    return "not stolen" if converged else "not converged"


def true_update_error(setup: Setup, seen: Observation) -> tuple[float, float]:
    """Relative error of what was seen against the client's true update, or several clients' mean: over all layers, in the first."""
    examples = {client: len(setup.examples(seen.round, client)) for client in seen.clients}
    true: Update = {}
    for client, count in examples.items():
        for name, t in _true_update(setup, seen, client).items():
            part = t * (count / sum(examples.values()))
            true[name] = true[name] + part if name in true else part
    sent = {name: t.to(setup.device) for name, t in seen.update.items()}
    first = next(iter(true))
    return relative_error(sent, true), relative_error({first: sent[first]}, {first: true[first]})


def _true_update(setup: Setup, seen: Observation, client: int) -> Update:
    """What `client` computed from what was broadcast, before any defense."""
    index = setup.protocol.batches(setup.shards[client], setup.seed, seen.round, client)
    params = {name: t.to(setup.device) for name, t in seen.params.items()}
    buffers = {name: t.to(setup.device) for name, t in seen.buffers.items()}
    model, proximal = model_of(setup), setup.config["strategy"].get("proximal_mu", 0.0)
    with chance_seeded(model, setup.batch(index[0])[0], seed_of(setup.seed, "dropout", seen.round, client)):
        return setup.protocol.train(model, params, buffers, (setup.batch(i) for i in index), proximal).update


def sight(seen: Observation) -> str:
    """What kind of thing was attacked: `update`, `masked update`, or `sum of 4`."""
    return f"sum of {len(seen.summed)}" if seen.summed else "masked update" if seen.masked else "update"


def _owned(setup: Setup, seen: Observation, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the client whose `image` it is and its place in that client's batch, not in that of the sum."""
    owners = [(client, i) for client in seen.clients for i in range(len(setup.examples(seen.round, client)))]
    return [row | dict(zip(("client", "image"), owners[row["image"]], strict=True)) for row in rows]


def _sentence_rows(setup: Setup, attack: str, who: str, seen: Observation, made: Reconstruction) -> list[dict[str, Any]]:
    """As `_rows`; `image` and `reconstruction` are places in the batch, and `truth` and `recovered` the sentences themselves."""
    assert isinstance(setup.dataset, Corpus)
    inputs, labels = (t.cpu() for t in setup.truth(seen.round, *seen.clients))
    guessed, whole_batch = made.labels.cpu(), filled(made.images.cpu(), made.labels.cpu())
    found, places = metrics.match_sentences(whole_batch, filled(inputs, labels))
    sentences, truths = whole_batch[found], filled(inputs, labels)[places]
    right = metrics.token_accuracy(sentences, truths)
    occurring = metrics.tokens_found(whole_batch, truths)
    typical = setup.dataset.typical.expand_as(truths)
    trivial = metrics.token_accuracy(typical, truths)
    whole, layer = true_update_error(setup, seen)
    rows = []
    for i in range(len(sentences)):
        text, true, common = (setup.dataset.vocabulary.decode(ids[i]) for ids in (sentences, truths, typical))
        hidden = labels[places[i]]
        rows.append(
            {
                "attack": attack,
                "server": setup.server.name,
                "found_by": made.attack or attack,
                "attacker": who,
                "seen": sight(seen),
                "round": seen.round,
                "client": seen.client,
                "image": int(places[i]),
                "reconstruction": int(found[i]),
                "verdict": verdict(float(right[i]) >= STOLEN_TOKENS, made.converged),
                "token_accuracy": float(right[i]),
                "tokens_found": float(occurring[i]),
                **metrics.rouge(text, true),
                "exact": bool((sentences[i] == truths[i])[is_word(truths[i])].all()),
                "truth": true,
                "recovered": text,
                "label_right": bool(torch.equal(hidden, guessed[found[i]])),
                "loss": made.loss,
                "converged": made.converged,
                "starts": len(made.starts),
                "evaluations": made.evaluations,
                "seconds": made.seconds,
                "typical_token_accuracy": float(trivial[i]),
                "typical_rougeL": metrics.rouge(common, true)["rougeL"],
                "update_error": whole,
                "first_layer_error": layer,
            }
        )
    return _owned(setup, seen, rows)


def _rows(setup: Setup, attack: str, who: str, seen: Observation, made: Reconstruction) -> list[dict[str, Any]]:
    whole, layer = true_update_error(setup, seen)
    rows = [
        {
            "attack": attack,
            "server": setup.server.name,
            "found_by": made.attack or attack,  # of an escalation, the attack that did it
            "attacker": who,
            "seen": sight(seen),
            "round": seen.round,
            "client": seen.client,
            **row,
            "update_error": whole,
            "first_layer_error": layer,
        }
        for row in compared(setup, seen, made, *setup.truth(seen.round, *seen.clients))
    ]
    return _owned(setup, seen, rows)


def compared(setup: Setup, seen: Observation, made: Reconstruction, truth: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """One row for each reconstructed image, held against the image of the batch `truth` (B, C, H, W) that it was matched with."""
    assert isinstance(setup.dataset, Dataset)
    truth, labels, images, guessed = (t.cpu() for t in (truth, labels, made.images, made.labels))
    certain = torch.full((len(images),), made.converged) if made.certain is None else made.certain.cpu()
    found, places = _matched(images, truth, made.certain)
    first = made.starts[0].cpu()
    first_found, first_places = _matched(first, truth, made.certain)
    first_mse = metrics.mse(first[first_found], truth[first_places])
    if made.missed:  # what the attack says it has nothing of is a row as well, or its rate would count its successes only
        rest = torch.tensor(sorted(set(range(len(truth))) - set(places.tolist()))[: made.missed], dtype=torch.int64)
        images = torch.cat([images[found], torch.zeros_like(truth[rest])])
        guessed, certain = (torch.cat([t[found], torch.full_like(rest, v).to(t)]) for t, v in ((guessed, -1), (certain, 0)))
        first_mse = torch.cat([first_mse, torch.ones(len(rest)).to(first_mse)])
        found, places = torch.cat([found, torch.full_like(rest, -1)]), torch.cat([places, rest])
    else:
        images, guessed, certain = images[found], guessed[found], certain[found]
    truths, labels = truth[places], labels[places]
    scores = {"mse": metrics.mse(images, truths), "psnr_db": metrics.psnr_db(images, truths), "ssim": metrics.ssim(images, truths)}
    for name, worst in {"mse": 1.0, "psnr_db": 0.0, "ssim": 0.0}.items():  # a black picture is not far from a dark original
        scores[name] = scores[name].masked_fill(found < 0, worst)
    model = model_of(setup)
    if any(isinstance(module, nn.Linear) for module in model.modules()):
        params, buffers = ({name: t.to(setup.device) for name, t in some.items()} for some in (seen.params, seen.buffers))
        scores["feature_distance"] = metrics.feature_distance(model, params, buffers, images, truths)
    if metrics.lpips_weights() and min(truths.shape[-2:]) >= metrics.BACKBONES["alex"][1]:
        scores["lpips"] = metrics.lpips(images, truths)
    trivial = metrics.baselines(truths, setup.dataset.mean_image)
    return [
        {
            "image": int(places[i]),
            "reconstruction": int(found[i]),
            "verdict": verdict(float(scores["mse"][i]) < STOLEN_MSE, bool(certain[i])),
            **{name: float(values[i]) for name, values in scores.items()},
            "label": int(labels[i]),
            "label_found": int(guessed[i]),
            "label_right": bool(labels[i] == guessed[i]),
            "loss": made.loss,
            "converged": bool(certain[i]),
            "starts": len(made.starts),
            "first_start_mse": float(first_mse[i]),
            "evaluations": made.evaluations,
            "seconds": made.seconds,
            **{f"{name}_{score}": float(values[i]) for name, both in trivial.items() for score, values in both.items()},
        }
        for i in range(len(images))
    ]


def _matched(images: torch.Tensor, truth: torch.Tensor, certain: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (i, j) of images and true images: those that the attack vouches for first, so that its guesses cannot displace them."""
    if certain is None or not certain.any() or certain.all():
        return metrics.match(images, truth)
    certain = certain.cpu()
    sure, unsure = certain.nonzero().squeeze(1), (~certain).nonzero().squeeze(1)
    found, places = metrics.match(images[sure], truth)
    free = torch.tensor(sorted(set(range(len(truth))) - set(places.tolist())), dtype=torch.int64)
    other_found, other_places = metrics.match(images[unsure], truth[free])
    return torch.cat([sure[found], unsure[other_found]]), torch.cat([places, free[other_places]])


def attacked(
    setup: Setup,
    attack: Any,
    seen: Sequence[Observation],
    rng: torch.Generator,
    report: Callable[[int, int], None],
    *,
    told: bool = False,
    labels: Sequence[Tensor] | None = None,
) -> list[Reconstruction]:
    """What `attack` makes of what was seen, on the run's device; `report(finished, total)` is called as victims finish.

    told    whether it is told the defense
    labels  (B,) of each victim, for an attack that is told them, where they are not those of the run's own shards
    """
    model, state = setup.model(), rng.get_state()
    draws = bool(hidden_noises(model))
    alike: dict[Knowledge, list[int]] = defaultdict(list)
    for i, one in enumerate(seen):
        known = knowledge(setup, one.num_examples, len(one.clients))
        if draws:  # other noise each round: updates of the same images are not of the same gradient
            known = replace(known, same_images=False)
        alike[replace(known, defense=setup.defense) if told else known].append(i)
    found: dict[int, Reconstruction] = {}
    for known, members in alike.items():
        before = len(found)
        made = attack(
            [on_device(seen[i], setup.device) for i in members],
            _with_labels(known, attack, [(setup, seen[i]) for i in members], labels and [labels[i] for i in members]),
            model,
            rng.set_state(state),  # a victim's chance does not depend on who else is attacked
            report=lambda done, _, before=before: report(before + done, len(seen)),
        )
        found |= zip(members, made, strict=True)
    return [found[i] for i in range(len(seen))]


def attacked_together(
    runs: Sequence[tuple[Setup, Sequence[Observation]]], attack: Any, report: Callable[[int, int], None]
) -> list[list[Reconstruction]]:
    """What `attack`, which knows no defense, makes of what was seen in several runs, of equal knowledge as one program.

    The runs share the structure of their model, their data and their protocol. Each victim's chance is that of its run alone,
    but what a model itself draws (dropout, a bottleneck) it draws for all of them together.
    """
    victims = [(setup, one) for setup, seen in runs for one in seen]
    told: dict[tuple[Knowledge, int], list[int]] = defaultdict(list)
    for i, (setup, one) in enumerate(victims):
        # Other data, or another part of it, is normalised otherwise.
        told[knowledge(setup, one.num_examples, len(one.clients)), id(setup.dataset)].append(i)
    found: dict[int, Reconstruction] = {}
    for (known, _), members in told.items():
        before, those = len(found), [victims[i] for i in members]
        chances = [int(torch.randint(2**62, (), generator=generator(setup.seed, "attack"))) for setup, _ in those]
        made = attack(
            [replace(on_device(one, setup.device), chance=chance) for (setup, one), chance in zip(those, chances, strict=True)],
            _with_labels(known, attack, those),
            those[0][0].model(),
            generator(those[0][0].seed, "attack"),
            report=lambda done, _, before=before: report(before + done, len(victims)),
        )
        found |= zip(members, made, strict=True)
    made_of = iter(found[i] for i in range(len(victims)))
    return [[next(made_of) for _ in seen] for _, seen in runs]


def _with_labels(
    known: Knowledge, attack: Any, victims: Sequence[tuple[Setup, Observation]], labels: Sequence[Tensor] | None = None
) -> Knowledge:
    """What is known, with the true labels, which are those of the runs' shards if not given, if the attack is told them."""
    if not is_told_labels(attack):
        return known
    return replace(known, labels=labels or [setup.truth(one.round, *one.clients)[1] for setup, one in victims])


def is_told_labels(attack: Any) -> bool:
    """Whether an attack, or one that it is made of, is given labels."""
    several = [one for name in ("variants", "attacks") for one in getattr(attack, name, {}).values()]
    alone = [getattr(attack, name) for name in ("attack", "matching", "init") if hasattr(attack, name)]
    return getattr(attack, "labels", None) == "given" or any(map(is_told_labels, [*several, *alone]))
