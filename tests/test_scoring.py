"""Scoring holds what was stolen against what it was stolen from, and never calls a search that got lost a protection."""

import pytest
import torch

import attacks
from attacks import metrics
from experiments import scoring
from experiments.config import compose
from fedsim.client import chance_seeded
from fedsim.observation import Observation, Reconstruction
from fedsim.seeding import generator, seed_of
from fedsim.setup import model_of, setup_of
from fedsim.training import split
from fedsim.wire import pack

BATCH = 3
OVERRIDES = ["data.train_size=60", "data.test_size=10", "federation.clients=3", "federation.per_round=3"]


@pytest.fixture(scope="module")
def setup():
    return setup_of(compose([*OVERRIDES, f"federation.batch_size={BATCH}"]))


def observed(setup, round=2, client=1):
    params, buffers = split(setup.model())
    index = setup.protocol.batches(setup.shards[client], setup.seed, round, client)
    model = model_of(setup)
    with chance_seeded(model, setup.batch(index[0])[0], seed_of(setup.seed, "dropout", round, client)):
        trained = setup.protocol.train(model, params, buffers, (setup.batch(i) for i in index))
    return Observation(params, pack(trained.update), len(torch.cat(index)), round, client, buffers, trained.buffers)


def made_of(images, labels, converged):
    return Reconstruction(images, labels, 0.5, converged, images[None], torch.tensor([0.5]), 7, 0.1)


def test_a_copy_in_another_order_is_a_theft_of_every_image(setup):
    images, labels = setup.truth(2, 1)
    order = torch.tensor([2, 0, 1])
    rows = scoring.leaks(setup, "copy", [observed(setup)], [made_of(images[order], labels[order], True)])
    assert [row["verdict"] for row in rows] == ["stolen"] * BATCH
    assert all(row["mse"] == 0 and row["first_start_mse"] == 0 and row["label_right"] for row in rows)
    # Reconstruction j is image order[j].
    assert {row["reconstruction"]: row["image"] for row in rows} == {0: 2, 1: 0, 2: 1}


@pytest.mark.parametrize(("converged", "verdict"), [(True, "not stolen"), (False, "not converged")])
def test_a_lost_search_is_not_a_protection(setup, converged, verdict):
    images, labels = setup.truth(2, 1)
    rows = scoring.leaks(setup, "lost", [observed(setup)], [made_of(1 - images.round(), labels, converged)])
    assert {row["verdict"] for row in rows} == {verdict}


def test_what_knowing_nothing_scores_stands_beside(setup):
    images, labels = setup.truth(2, 1)
    rows = scoring.leaks(setup, "grey", [observed(setup)], [made_of(torch.full_like(images, 0.5), labels, True)])
    assert all(row["mse"] == row["grey_mse"] for row in rows)
    assert all(row["mean_colour_mse"] <= row["grey_mse"] for row in rows)  # the mean is the best constant


def test_an_undefended_update_is_the_true_one(setup):
    assert scoring.true_update_error(setup, observed(setup)) == (0.0, 0.0)


def test_an_undefended_update_is_the_true_one_under_dropout():
    setup = setup_of(compose([*OVERRIDES, "model=mlp_2nn", "model.dropout=0.5"]))
    assert scoring.true_update_error(setup, observed(setup)) == (0.0, 0.0)


def test_an_error_of_a_tenth_in_the_first_layer_is_told_as_such(setup):
    seen = observed(setup)
    update = seen.update
    first = next(iter(update))
    changed = Observation(seen.params, pack({**update, first: 1.1 * update[first]}), BATCH, seen.round, seen.client)
    whole, layer = scoring.true_update_error(setup, changed)
    assert layer == pytest.approx(0.1, rel=1e-5)
    assert whole < layer


def test_fewer_reconstructions_than_images_are_each_held_against_the_nearest():
    true = torch.rand(5, 3, 11, 11, generator=generator(0, "true"))
    found, places = metrics.match(true[[3, 1]] + 0.01, true)
    assert dict(zip(found.tolist(), places.tolist(), strict=True)) == {0: 3, 1: 1}


def test_the_attacker_of_local_training_is_told_each_clients_own_steps():
    setup = setup_of(
        compose([*OVERRIDES, "federation=fedavg", "federation.batch_size=4", "federation.epochs=2", "federation.lr=0.1"])
    )
    # 10 images in batches of 4 are 3 steps, twice.
    known = scoring.knowledge(setup, 10)
    assert (known.local_steps, known.batch_size, known.lr) == (6, 4, 0.1)
    assert scoring.knowledge(setup, 3).batch_size == 3


def test_victims_told_different_things_come_back_in_order():
    setup = setup_of(compose([*OVERRIDES, "federation=fedavg", "federation.batch_size=4"]))
    seen = [observed(setup, 1, client) for client in (0, 1, 2)]
    seen = [Observation(one.params, one.packets, n, 1, one.client) for one, n in zip(seen, (10, 20, 10), strict=True)]
    calls, reports = [], []

    def attack(victims, known, model, rng, report):
        calls.append(([one.client for one in victims], known.local_steps, rng.initial_seed(), torch.rand((), generator=rng).item()))
        report(len(victims), len(victims))
        return [made_of(torch.zeros(4, 3, 32, 32), torch.full((4,), one.client), False) for one in victims]

    found = scoring.attacked(setup, attack, seen, generator(0, "attack"), lambda done, total: reports.append((done, total)))
    assert [int(one.labels[0]) for one in found] == [0, 1, 2]
    assert [(clients, steps) for clients, steps, _, _ in calls] == [([0, 2], 3), ([1], 5)]
    assert len({(seed, draw) for _, _, seed, draw in calls}) == 1  # everybody's chance is the same whoever else is attacked
    assert reports == [(2, 3), (3, 3)]


@pytest.mark.parametrize("knowing", [False, True])
def test_an_attacker_who_is_told_the_labels_has_them_in_a_run_too(setup, knowing):
    attack = attacks.cosine_adam(iterations=2, told=True)
    if knowing:
        attack = attacks.Rehearsed({"tv": attack}, rehearsals=1, evaluations=2)
    seen = [observed(setup, client=0), observed(setup, client=1)]
    found = scoring.attacked(setup, attack, seen, generator(0, "attack"), lambda done, total: None, told=knowing)
    for one, made in zip(seen, found, strict=True):
        assert torch.equal(made.labels.cpu(), setup.truth(one.round, one.client)[1].cpu())
    if not knowing:
        (together,) = scoring.attacked_together([(setup, seen)], attack, lambda done, total: None)
        for one, other in zip(found, together, strict=True):
            assert torch.allclose(one.images, other.images, atol=1e-4)
