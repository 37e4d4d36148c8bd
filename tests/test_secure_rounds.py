"""Secure aggregation in a federation: what it learns is what it would have learned, and what travels is masked."""

import logging
from dataclasses import replace

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from worlds import FEDAVG, FEDSGD, FLOWER, NORMED, TOPK_EF, History, assert_same, config, federate, nobody

import attacks
from attacks import Rehearsed, adapted
from attacks.evidence import believed
from experiments import scoring
from experiments.card import card, obstacles
from experiments.config import compose
from experiments.naming import contender
from experiments.runner import attack_of, check_config, finished, start
from experiments.summary import summarised
from experiments.table import drawn
from fedsim import secure_rounds
from fedsim.engines.inline import Inline, InlineGrid
from fedsim.errors import FederationError
from fedsim.observation import SUM
from fedsim.records import masked_reply_of, reply_of
from fedsim.run import RunFolder
from fedsim.secure_aggregation import SEALED
from fedsim.setup import setup_of
from fedsim.tap import Tap
from fedsim.updates import norm, relative_error
from fedsim.wire import pack, unpack

SECURE = {"_target_": "fedsim.secure_aggregation.Secure"}
SEEDED = SECURE | {"seeded": True}
ALL_SEVEN = FEDSGD | {"clients": 7, "per_round": 7}
SKEWED = {"_target_": "fedsim.data.SizeSkewed"}
SMALL = ["data.train_size=60", "data.test_size=10", "federation.clients=4", "federation.per_round=4", "device=cpu"]


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # Fixed point: 3 clients' halves of 2**-24, 9e-8; and float32 near 1, 6e-8, in each of a few operations.
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name


# The model, and what is seen of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"federation": FEDAVG, "partition": SKEWED},
        {"federation": FEDAVG, "partition": SKEWED, "model": NORMED},
        {"defense": {"_target_": "defenses.StochasticQuantization", "levels": 16}},
    ],
    ids=["FedSGD", "FedAvg, unequal shards", "BatchNorm", "quantized"],
)
def test_a_masked_federation_learns_what_a_plain_one_learns(made):
    plain, secure = federate(config(**made)), federate(config(**made, aggregation=SECURE))
    close(secure.weights, plain.weights)
    for mine, theirs in zip(secure.reports, plain.reports, strict=True):
        assert (mine.clients, mine.failures) == (theirs.clients, theirs.failures)
        assert mine.train_loss == pytest.approx(theirs.train_loss, abs=1e-6)


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedProx"])
def test_every_strategy_that_averages_works_on_sums(name):
    strategy = {"_target_": FLOWER + name} | ({"proximal_mu": 0.1} if name == "FedProx" else {})
    left = federate(config(strategy=strategy, aggregation=SECURE), rounds=3)
    assert all(t.isfinite().all() for t in left.weights.values())
    assert not torch.equal(left.weights["head.bias"], left.checkpoints[2].tensors["head.bias"])


def test_the_result_depends_neither_on_the_masks_nor_on_the_number_of_workers():
    one, again = (federate(config(federation=FEDAVG, aggregation=SECURE)) for _ in range(2))
    two = federate(config(federation=FEDAVG, aggregation=SECURE), Inline(2))
    for other in (again, two):
        assert_same(other.weights, one.weights)
        assert all(a.masked == b.masked for a, b in zip(one.seen, other.seen, strict=True))
        same = [torch.equal(a.update["head.bias"], b.update["head.bias"]) for a, b in zip(one.seen, other.seen, strict=True)]
        assert same == [not a.masked for a in one.seen]


def test_a_masked_run_that_goes_on_from_a_checkpoint_ends_as_one_that_never_stopped():
    made = config(strategy={"_target_": FLOWER + "FedAdam"}, federation=FEDAVG, aggregation=SECURE)
    whole = federate(made, rounds=4)
    assert_same(federate(made, rounds=4, start=whole.checkpoints[2]).weights, whole.weights)


def test_seeded_masks_are_the_same_each_time():
    one, again = (federate(config(aggregation=SEEDED), Inline(n)).seen for n in (1, 2))
    assert any(a.masked for a in one)
    for a, b in zip(one, again, strict=True):
        assert_same(a.update, b.update)


def test_who_listens_sees_masked_updates_and_their_sum():
    made = config(federation=FEDAVG, partition=SKEWED)
    plain, secure = federate(made, rounds=1).seen, federate(made | {"aggregation": SECURE}, rounds=1).seen
    assert [(one.client, one.masked, one.clients) for one in secure] == [
        *((one.client, True, (one.client,)) for one in plain),
        (SUM, False, tuple(one.client for one in plain)),
    ]
    *masked, total = secure
    for one, true in zip(masked, plain, strict=True):
        assert one.num_examples == true.num_examples  # the protocol tells
        assert norm(one.update) > 100 * norm(true.update)
    assert total.num_examples == sum(one.num_examples for one in plain)
    mean = {name: sum(one.num_examples * one.update[name] for one in plain) / total.num_examples for name in total.update}
    assert relative_error(total.update, mean) < 1e-5
    assert_same(total.params, plain[0].params)


def test_nobody_hears_a_sum_who_does_not_listen():
    assert federate(config(aggregation=SECURE), choose=nobody).seen == []


def test_nothing_of_a_client_travels_beside_its_masked_vector(monkeypatch):
    """BatchNorm statistics and the loss are under the mask; its name and its number of examples are not."""
    replies = []
    answer = InlineGrid._answer
    monkeypatch.setattr(InlineGrid, "_answer", lambda grid, message: replies.append(answer(grid, message)) or replies[-1])
    federate(config(model=NORMED, federation=FEDAVG, aggregation=SECURE), rounds=1)
    trained = [reply.content for reply in replies if reply.metadata.message_type == "train"]
    assert len(trained) == 3
    for content in trained:
        assert set(content) == {"masked", "metrics", "sender"}
        assert set(content.metric_records["metrics"]) == {"num-examples"}
        assert set(content.config_records["sender"]) == {"client", "summed", "bits", "scale"}


def test_what_a_round_sends_is_counted_keys_and_shares_too():
    n = 7
    left = federate(config(federation=ALL_SEVEN, aggregation=SECURE), rounds=1)
    entries = sum(t.numel() for t in left.weights.values())
    report = left.reports[1]
    # Up: an advert, a number and two sealed shares for each other client, the vector with the loss, a number and a share of each.
    assert report.bytes_up == n * (108 + (n - 1) * (4 + SEALED) + 4 * (entries + 1) + n * (4 + 16))
    # Down: everybody's adverts, the model, the others' sealed shares, and who answered.
    assert report.bytes_down == n * (n * 108 + 4 * entries + (n - 1) * (4 + SEALED) + 4 * n)
    assert SEALED == 12 + 2 * 16 + 16
    assert report.bytes_up_dense == n * 4 * entries


# Whoever vanishes -----------------------------------------------------------------------------------------------------------------


def vanishing(monkeypatch, step: str, clients: set[int], rounds: tuple[int, ...] = (1,)) -> None:
    """Makes clients fail at a step: a query by its name, or `train`."""
    ask = InlineGrid.send_and_receive
    begun: list[str] = []

    def failing(grid: InlineGrid, messages, **rest):
        messages = list(messages)
        kind = messages[0].metadata.message_type if messages else ""
        begun.extend(["a round"] * (kind == "query.advertise"))
        if kind in (step, f"query.{step}") and len(begun) in rounds:
            for message in messages:
                if message.metadata.dst_node_id - 2 in clients:
                    message.content = RecordDict()  # which the client fails to read
        return ask(grid, messages, **rest)

    monkeypatch.setattr(InlineGrid, "send_and_receive", failing)


def mean_step(history: History, clients: set[int]) -> torch.Tensor:
    """What one round of FedSGD moves head.bias by, of plain updates from `clients`."""
    return 0.1 * sum(one.update["head.bias"] for one in history.seen if one.client in clients) / len(clients)


@pytest.mark.parametrize(("step", "out"), [("advertise", {0, 4}), ("share", {0, 4}), ("train", {0, 4}), ("reveal", set())])
def test_a_client_that_vanishes_leaves_the_sum_of_the_others(step, out, monkeypatch, caplog):
    plain = federate(config(federation=ALL_SEVEN), rounds=1)
    vanishing(monkeypatch, step, {0, 4})
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(federation=ALL_SEVEN, aggregation=SECURE), rounds=1)
    stayed = set(range(7)) - out
    assert left.seen[-1].clients == tuple(sorted(stayed))
    before, after = (left.checkpoints[i].tensors["head.bias"] for i in (0, 1))
    assert torch.allclose(before - after, mean_step(plain, stayed), rtol=0, atol=1e-6)
    assert (left.reports[1].clients, left.reports[1].failures) == (len(stayed), len(out))
    assert "KeyError" in caplog.text
    if step != "train":
        assert f"round 1: 2 of 7 clients vanished when asked to {step}: " in caplog.text


@pytest.mark.parametrize("step", ["share", "train"])
def test_who_is_left_is_averaged_by_the_images_of_those_who_are_left(step, monkeypatch):
    made = {"federation": FEDAVG | {"per_round": 4}, "partition": SKEWED}
    plain = federate(config(**made), rounds=1)
    vanishing(monkeypatch, step, {1})
    left = federate(config(**made, aggregation=SECURE), rounds=1)
    stayed = [one for one in plain.seen if one.client in (0, 2, 3)]
    images = [one.num_examples for one in stayed]
    assert len(set(images)) == 3
    mean = {name: sum(one.num_examples * one.update[name] for one in stayed) / sum(images) for name in stayed[0].update}
    before, after = (left.checkpoints[i].tensors for i in (0, 1))
    close({name: before[name] - after[name] for name in mean}, mean)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("advertise", "3 clients advertised keys, and 4 are needed"),
        ("share", "3 clients shared their secrets, and 4 are needed"),
        ("train", "3 clients sent a masked update, and 4 are needed"),
        ("reveal", "3 clients revealed their shares, and 4 are needed"),
    ],
)
def test_a_round_without_enough_clients_leaves_the_model_as_it_is_and_the_run_goes_on(step, why, monkeypatch, caplog):
    made = config(federation=ALL_SEVEN, aggregation=SECURE)
    vanishing(monkeypatch, step, {0, 1, 4, 5}, rounds=(2,))
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(made, rounds=3)
    one, two, three = (left.checkpoints[i].tensors for i in (1, 2, 3))
    assert_same(two, one)
    assert not torch.equal(three["head.bias"], two["head.bias"])
    assert f"round 2: no sum, the model stays as it is: {why}" in caplog.text
    assert [one.round for one in left.seen if one.client == SUM] == [1, 3]
    assert left.reports[2].train_loss is None


def test_a_federation_in_which_nobody_has_keys_ends(monkeypatch):
    vanishing(monkeypatch, "advertise", set(range(7)))
    with pytest.raises(FederationError, match="round 1: none of the 7 chosen clients advertised keys"):
        federate(config(federation=ALL_SEVEN, aggregation=SECURE))


def test_a_wrong_share_costs_the_round_and_not_the_run(monkeypatch, caplog):
    tables = secure_rounds._entries

    def lying(data: bytes, size: int) -> dict[int, bytes]:
        read = tables(data, size)
        return {client: bytes(16) for client in read} if size == 16 else read

    monkeypatch.setattr(secure_rounds, "_entries", lying)
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(aggregation=SECURE), rounds=2)
    assert "no sum, the model stays as it is: a share of client" in caplog.text
    assert_same(left.weights, left.checkpoints[0].tensors)


def short(made: dict[int, bytes]) -> dict[int, bytes]:
    return {client: data for client, data in made.items() if client != 3}


def longer(made: dict[int, bytes]) -> dict[int, bytes]:
    return {client: data + b"x" for client, data in made.items()}


BROKEN = {
    "speaks for another": ("advertise", lambda out: (out[0], replace(out[1], client=1)), "client 0: it says that it is client 1"),
    "claims many examples": ("advertise", lambda out: (out[0], replace(out[1], examples=2**60)), f"it claims {2**60} examples"),
    "no key": ("advertise", lambda out: (out[0], replace(out[1], mask_key=bytes(32))), "advertised a key that gives no secret"),
    "keeps a share": ("share", lambda out: (out[0], short(out[1])), "its share for client 3 is missing"),
    "no shares": ("share", lambda out: (out[0], longer(out[1])), "are no table of entries of 60"),
    "a short vector": ("mask", lambda out: (out[0], out[1][:-1]), "client 0: its vector is uint8"),
    "reveals a share less": ("reveal", short, "its share for client 3 is missing"),
    "reveals no shares": ("reveal", longer, "are no table of entries of 16"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_client_that_keeps_to_no_protocol_costs_the_others_nothing(name, monkeypatch, caplog):
    step, broken, says = BROKEN[name]
    plain = federate(config(federation=ALL_SEVEN), rounds=1)
    done = getattr(secure_rounds, step)

    def stepped(first, *rest):
        mine = first if step == "advertise" else first.client
        return broken(done(first, *rest)) if mine == 0 else done(first, *rest)

    monkeypatch.setattr(secure_rounds, step, stepped)
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(federation=ALL_SEVEN, aggregation=SECURE), rounds=1)
    assert says in caplog.text
    stayed = set(range(7)) - ({0} if step != "reveal" else set())
    assert left.seen[-1].clients == tuple(sorted(stayed))
    assert left.reports[1].failures == 7 - len(stayed)
    before, after = (left.checkpoints[i].tensors["head.bias"] for i in (0, 1))
    assert torch.allclose(before - after, mean_step(plain, stayed), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sends", "says"),
    [
        (lambda vector, about, n, c: masked_reply_of(vector, about | {"bits": 64}, n, c), "its entries are of 64 bits"),
        (lambda vector, about, n, c: masked_reply_of(vector, about | {"scale": 0.0}, n, c), "in units of 1 / 0.0"),
        (lambda vector, about, n, c: masked_reply_of(vector, about, n, 3), "it says that it comes from client 3"),
        (lambda vector, about, n, c: masked_reply_of(vector, about, -n, c), "it claims -2 examples"),
        (lambda vector, about, n, c: reply_of({}, {}, n, 1.0, c), "its metrics are ['num-examples', 'train-loss']"),
    ],
    ids=["bits", "scale", "another", "examples", "unmasked"],
)
def test_a_reply_that_is_no_masked_vector_is_left_out(sends, says, monkeypatch, caplog):
    monkeypatch.setattr(secure_rounds, "masked_reply_of", lambda *about: (sends if about[-1] == 0 else masked_reply_of)(*about))
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(federation=ALL_SEVEN, aggregation=SECURE), rounds=1)
    assert says in caplog.text
    assert left.seen[-1].clients == (1, 2, 3, 4, 5, 6)


# Clients do not let go ------------------------------------------------------------------------------------------------------------


def lone_client() -> tuple[ClientApp, Context]:
    from fedsim.client import client_app

    return client_app(config(aggregation=SECURE)), Context(7, 2, {"partition-id": 0}, RecordDict(), {})


def test_a_client_of_a_masked_federation_sends_no_plain_update(monkeypatch):
    """A server that leaves out the protocol: its training messages come without anybody's shares."""
    monkeypatch.setattr(secure_rounds.SecureStrategy, "_shared", lambda strategy, round, messages, now: messages)
    with pytest.raises(FederationError, match=r"client \d was asked for its update, and this run has aggregation=secure"):
        federate(config(aggregation=SECURE))


def test_a_client_reveals_shares_once(monkeypatch, caplog):
    ask = secure_rounds.SecureStrategy._ask

    def twice(strategy, round, step, *about):
        if step == "reveal":
            ask(strategy, round, step, *about)
        return ask(strategy, round, step, *about)

    monkeypatch.setattr(secure_rounds.SecureStrategy, "_ask", twice)
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(config(aggregation=SECURE), rounds=1)
    assert "has no secrets: it advertised no keys, or has revealed its shares already" in caplog.text
    assert_same(left.weights, left.checkpoints[0].tensors)


def test_a_client_does_not_mask_for_a_round_it_has_no_keys_for():
    class Replayed:
        content = secure_rounds._sent(shares=b"")

    _, context = lone_client()
    secrets, _ = secure_rounds.advertise(0, 1, b"fedsim/7/1")
    secure_rounds._keep(context, secrets)
    with pytest.raises(ValueError, match="asked for its vector of round 2, and has advertised no keys for that round"):
        secure_rounds.shares_in(Replayed(), context, setup_of(config(aggregation=SECURE)), 2)  # type: ignore[arg-type]


def test_secrets_are_kept_as_they_are():
    _, context = lone_client()
    made = [secure_rounds.advertise(client, 5, b"a session") for client in (0, 3)]
    secrets, _ = secure_rounds.share(made[0][0], [advert for _, advert in made], 2)
    secure_rounds._keep(context, secrets)
    assert secure_rounds._kept(context) == secrets


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"])
def test_strategies_that_compare_updates_are_refused(name):
    with pytest.raises(ValueError, match=f"strategy={name.lower()} compares the clients' updates, which aggregation=secure hides"):
        federate(config(strategy=name, aggregation=SECURE))
    with pytest.raises(ValueError, match="compares the clients' updates"):
        check_config(compose([*SMALL, f"strategy={name.lower()}", "aggregation=secure"]))


# Attacks --------------------------------------------------------------------------------------------------------------------------


def test_the_sum_of_clients_is_the_gradient_of_all_their_images():
    """So attacking the sum of n clients with a batch of B is attacking a batch of n B."""
    made = config(federation=ALL_SEVEN, aggregation=SECURE)
    setup = setup_of(made)
    total = federate(made, rounds=1).seen[-1]
    truth = setup.truth(1, *total.clients)
    assert len(truth[0]) == total.num_examples == 14
    alone = setup.protocol.train(setup.model(), total.params, {}, [truth]).update
    assert relative_error(total.update, alone) < 1e-5
    assert scoring.true_update_error(setup, total)[0] < 1e-5
    assert scoring.true_update_error(setup, federate(made, rounds=1).seen[0])[0] > 10
    known = scoring.knowledge(setup, total.num_examples, 7)
    assert (known.batch_size, known.local_steps) == (14, 1)


def test_the_attacker_of_a_sum_of_local_training_takes_it_for_one_client_with_larger_batches():
    setup = setup_of(config(federation=FEDAVG | {"epochs": 2}))
    known = scoring.knowledge(setup, 3 * 13, 3)
    # 13 images in batches of 5 are 3 steps, twice; three clients take them side by side.
    assert (known.batch_size, known.local_steps) == (15, 6)


def test_a_sum_is_rehearsed_as_one_of_as_many_clients():
    made = config(federation=ALL_SEVEN, aggregation=SECURE, defense={"_target_": "defenses.Clip", "clip": 0.5})
    setup = setup_of(made)
    total = federate(made, rounds=1).seen[-1]
    known = replace(scoring.knowledge(setup, total.num_examples, 7), defense=setup.defense)
    rehearsed = adapted(attacks.idlg(evaluations=5), setup.model(), setup.defense)
    assert isinstance(rehearsed, Rehearsed)
    x, y = setup.dataset.test.batch(torch.arange(14))
    played = rehearsed._played(total, [(x, y)], known, setup.model(), 0, 0)
    each = [setup.protocol.train(setup.model(), total.params, {}, [(x[i::7], y[i::7])]).update for i in range(7)]
    clipped = [unpack(setup.defense(pack(update), {}, torch.Generator())[0]) for update in each]
    mean = {name: sum(one[name] for one in clipped) / 7 for name in total.update}
    assert relative_error(played.update, mean) < 1e-5
    assert all(torch.equal(b.low, b.high) for b in believed(total, known).values())  # what clipping leaves possible is said of one


def test_who_knows_of_the_masks_attacks_the_sum_alone(tmp_path):
    more = ["aggregation=secure", "attack=idlg", "attack.evaluations=5", "rounds=1", "tap.clients=all", "tap.rounds=[1]"]
    folder = start(compose([*SMALL, *more, "tap.every=null", "defense=clip"]), tmp_path / "run", "a test")
    leaks = folder.leaks()
    assert set(leaks.loc[leaks["attacker"] == "naive", "seen"]) == {"masked update", "sum of 4"}
    assert set(leaks.loc[leaks["attacker"] == "adaptive", "seen"]) == {"sum of 4"}
    assert finished(folder)
    with pytest.raises(ValueError, match=r"rehearses on as many test images as are in an update, 12, and there are 10: raise data"):
        start(compose([*SMALL, *more, "federation.batch_size=3"]), tmp_path / "few", "a test")


@pytest.fixture(scope="module")
def robbed(tmp_path_factory) -> RunFolder:
    """A malicious server reads sums: 4 clients of 3 images, 64 bins."""
    more = ["aggregation=secure", "server=imprint", "server.bins=64", "attack=imprint", "federation.batch_size=3"]
    made = compose([*SMALL, *more, "model=mlp_2nn", "rounds=1", "tap.clients=all", "tap.rounds=[1]"])
    check_config(made)
    return start(made, tmp_path_factory.mktemp("robbed") / "run", "test")


def test_a_malicious_server_reads_its_images_out_of_the_sum_and_nothing_out_of_one_update(robbed):
    leaks = robbed.leaks()
    masked, summed = (leaks[leaks["seen"] == what] for what in ("masked update", "sum of 4"))
    assert len(masked) == len(summed) == 12
    assert (masked["mse"] > 1e-3).all()
    assert not masked["converged"].any()
    # 12 images in 64 bins are alone with probability (1 - 1/64)^11 = 0.84: 10.1 of them; 6 is 3.2 deviations off.
    assert (summed["mse"] < 1e-6).sum() >= 6


def test_every_image_of_a_sum_is_held_against_its_owner_s(robbed):
    setup, leaks = setup_of(robbed.config), robbed.leaks()
    summed = leaks[leaks["seen"] == "sum of 4"]
    assert sorted(zip(summed["client"], summed["image"], strict=True)) == [(c, i) for c in range(4) for i in range(3)]
    made = robbed.reconstructions("imprint", 1)
    assert set(made) == {0, 1, 2, 3, SUM}
    for row in summed[summed["mse"] < 1e-6].to_dict("records"):
        truth, labels = setup.truth(1, row["client"])
        assert (made[SUM][row["reconstruction"]] - truth[row["image"]]).abs().max() < 0.01
        assert row["label"] == labels[row["image"]]


def test_what_was_seen_of_a_masked_round_comes_back_from_its_folder(robbed):
    seen = robbed.observations(1)
    assert [one.client for one in seen] == [0, 1, 2, 3, SUM]
    assert [one.masked for one in seen] == [True] * 4 + [False]
    assert seen[-1].clients == (0, 1, 2, 3)
    assert seen[-1].num_examples == 12


def test_masked_updates_and_sums_have_lines_of_their_own_in_the_table(robbed):
    from rich.console import Console

    console = Console(width=300, record=True)
    console.print(drawn(summarised([robbed])))
    text = console.export_text()
    name = "none, server=imprint bins=64, secure aggregation"
    assert contender(robbed.config) == name
    assert f"{name}: masked update" in text
    assert f"{name}: sum of 4" in text


SHORT = {"dlg": "attack.evaluations=20", "cosine_lbfgs": "attack.evaluations=20", "inverting_gradients": "attack.iterations=20"}


@pytest.mark.parametrize("attack", [*SHORT, "analytic"])
def test_every_attack_survives_a_masked_update_and_finds_nothing(attack):
    secure = ["aggregation=secure", "aggregation.seeded=true", "model=mlp_2nn"]
    made = compose([*SMALL, *secure, f"attack={attack}", *([SHORT[attack]] if attack in SHORT else [])])
    seen = [one for one in federate(made, rounds=1).seen if one.masked]
    setup = setup_of(made)
    found = scoring.attacked(setup, attack_of(made), seen, torch.Generator().manual_seed(0), lambda done, total: None)
    rows = scoring.leaks(setup, attack, seen, found)
    assert len(rows) == 4
    assert not any(row["converged"] for row in rows)
    assert all(row["psnr_db"] < 20 for row in rows)


# Telling --------------------------------------------------------------------------------------------------------------------------


def told(*overrides: str) -> dict[str, str]:
    return dict(card(setup_of(compose([*SMALL, "aggregation=secure", *overrides])), Tap(), "dlg", "none"))


def test_the_card_says_what_is_masked_and_what_is_seen():
    lines = told()
    assert lines["update"].startswith("masked")
    assert lines["sum"] == "seen: of 4 clients, or at least 3; also how many examples each has"
    assert "sparsifying saves nothing, and what one client alone sends stands in it as it is" in told("defense=topk")["sum"]
    for defense in ("stochastic", "kmeans", "powersgd"):
        assert "Dense vectors of 32 bits an entry travel, so compressing saves nothing" in told(f"defense={defense}")["sum"]
    assert "nothing is hidden; federation.per_round=2 or more" in told("federation.per_round=1")["sum"]
    assert "sum" not in dict(card(setup_of(compose(SMALL)), Tap(), "dlg", "none"))


def test_the_size_of_a_sum_is_an_obstacle():
    made = compose([*SMALL, "aggregation=secure", "attack=dlg"])
    assert ("weak", "sums of 4 clients are 4 images that share one gradient; federation.per_round=1") in obstacles(
        setup_of(made), attack_of(made)
    )


def test_entries_that_one_client_alone_sends_stand_in_the_sum_as_they_are():
    """Sparse updates under secure aggregation (2508.04285): of entries that somebody sent, most are one client's."""
    made = config(federation=ALL_SEVEN, defense=TOPK_EF["inner"] | {"ratio": 0.01})
    plain, total = federate(made, rounds=1).seen, federate(made | {"aggregation": SECURE}, rounds=1).seen[-1]
    name = "body.0.weight" if "body.0.weight" in total.update else max(total.update, key=lambda key: total.update[key].numel())
    sent = torch.stack([one.update[name].flatten() for one in plain])
    lone = (sent != 0).sum(0) == 1
    assert lone.sum() > 0.5 * (sent != 0).any(0).sum()
    # 7 clients with equal weights; the error is that of fixed point.
    assert (7 * total.update[name].flatten()[lone] - sent.sum(0)[lone]).abs().max() < 7 * 7 * 2.0**-25 + 1e-6
