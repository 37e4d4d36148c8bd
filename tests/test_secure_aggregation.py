"""Secure aggregation: the sum is exact, each vector is noise to whoever lacks the keys, and who vanishes takes nothing along."""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import pytest
from scipy import stats

from fedsim import secure_aggregation as protocol
from fedsim.secure_aggregation import (
    Advert,
    Codes,
    Rejected,
    Secrets,
    Secure,
    TooFew,
    advertise,
    mask,
    reveal,
    session_of,
    share,
    unmask,
)

CLIENTS = (2, 3, 5, 11, 17)  # any numbers: who is not chosen leaves a gap
T = 3  # of 5: more than half
SESSION = session_of(7, 1)
SECURE = Secure()


def seeded(client: int) -> Callable[[int], bytes]:
    """Randomness for keys and seeds that is the same each time."""
    return np.random.default_rng(client).bytes


def vectors(length: int = 101, dtype: type = np.uint32) -> dict[int, Codes]:
    return {c: np.random.default_rng(c).integers(0, 2 ** (8 * dtype().itemsize), length, dtype) for c in CLIENTS}


def summed(codes: dict[int, Codes], of: Collection[int]) -> Codes:
    return sum(codes[client] for client in of)  # type: ignore[return-value]


@dataclasses.dataclass
class Round:
    """A round as far as it got: what each client keeps, and what the server has."""

    adverts: list[Advert]
    secrets: dict[int, Secrets]
    sealed: dict[int, dict[int, bytes]]
    masked: dict[int, Codes] = dataclasses.field(default_factory=dict)
    revealed: dict[int, dict[int, bytes]] = dataclasses.field(default_factory=dict)

    def sent_to(self, client: int) -> dict[int, bytes]:
        return {sender: sealed[client] for sender, sealed in self.sealed.items() if sender != client}

    def sum(self, threshold: int = T) -> Codes:
        return unmask(SESSION, self.adverts, self.masked, self.sealed, self.revealed, threshold)


def begun(session: bytes = SESSION, sharing: Collection[int] = CLIENTS) -> Round:
    """Everybody has advertised keys, and those of `sharing` have shared their secrets."""
    made = {client: advertise(client, 10 * client, session, seeded(client)) for client in CLIENTS}
    adverts = [advert for _, advert in made.values()]
    shared = {client: share(made[client][0], adverts, T) for client in sharing}
    return Round(adverts, {c: s for c, (s, _) in shared.items()}, {c: sealed for c, (_, sealed) in shared.items()})


def gone_through(
    codes: dict[int, Codes],
    sharing: Collection[int] = CLIENTS,
    masking: Collection[int] = CLIENTS,
    revealing: Collection[int] = CLIENTS,
) -> Round:
    """A round in which some clients vanish before a step."""
    now = begun(sharing=sharing)
    for client in masking:
        now.secrets[client], now.masked[client] = mask(now.secrets[client], now.sent_to(client), codes[client], T)
    for client in revealing:
        now.revealed[client] = reveal(now.secrets[client], masking, T)
    return now


# The sum --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_the_sum_is_exact(dtype):
    codes = vectors(dtype=dtype)
    assert np.array_equal(gone_through(codes).sum(), summed(codes, CLIENTS))


@pytest.mark.parametrize("clients", [1, 2, 13])
def test_any_number_of_clients_can_be_added_up(clients):
    needed = SECURE.needed(clients)
    made = [advertise(client, 1, SESSION) for client in range(clients)]
    adverts = [advert for _, advert in made]
    shared = [share(secrets, adverts, needed) for secrets, _ in made]
    kept, masked = {}, {}
    for client, (secrets, _) in enumerate(shared):
        sealed = {peer: shared[peer][1][client] for peer in range(clients) if peer != client}
        kept[client], masked[client] = mask(secrets, sealed, np.arange(7, dtype=np.uint32), needed)
    revealed = {client: reveal(secrets, range(clients), needed) for client, secrets in kept.items()}
    assert np.array_equal(unmask(SESSION, adverts, masked, range(clients), revealed, needed), clients * np.arange(7))


@pytest.mark.parametrize(("bits", "places"), [(32, 24), (64, 40)])
def test_the_fixed_point_sum_is_the_real_one_to_the_last_places(bits, places):
    secure = Secure(bits=bits, fraction_bits=places)
    rng = np.random.default_rng(0)
    updates, weights = rng.normal(0, 5, (7, 1009)), rng.dirichlet(np.ones(7))
    total = sum(secure.encode(update, weight) for update, weight in zip(updates, weights, strict=True))
    error = np.abs(secure.decode(total, 1.0) - weights @ updates).max()
    # Each of 7 entries is rounded by half a place at most; 1e-14 for float64 itself.
    assert error <= 7 * 2.0 ** -(places + 1) + 1e-14 < 2**-16


def test_survivors_are_averaged_by_their_own_weights():
    update = np.array([3.0, -2.5])
    total = SECURE.encode(update, 0.25) + SECURE.encode(update, 0.5)  # who vanished had a quarter of the examples
    assert SECURE.decode(total, 0.75) == pytest.approx(update, abs=1e-6)


def test_what_is_clipped_is_clipped_and_no_more():
    values = np.array([-65.0, -64.0, -1.5, 0.0, 63.75, 64.0, 1e30])
    assert SECURE.decode(SECURE.encode(values, 1.0), 1.0).tolist() == [-64, -64, -1.5, 0, 63.75, 64, 64]


def test_codes_travel_little_endian_and_come_back():
    codes = SECURE.encode(np.array([1.0, -1.0]), 1.0)
    data = SECURE.to_bytes(codes)
    assert data == bytes.fromhex("00000001000000ff")  # 2**24, and 2**32 - 2**24
    assert np.array_equal(SECURE.from_bytes(data), codes)


# What a masked vector shows -------------------------------------------------------------------------------------------------------


def uniform(codes: Codes) -> tuple[float, float]:
    """p-values of a chi-square test of the bytes, and of a KS test of the values, against uniform ones."""
    counts = np.bincount(codes.view(np.uint8), minlength=256)
    return stats.chisquare(counts).pvalue, stats.kstest(codes / 2.0**32, "uniform").pvalue


@pytest.fixture(scope="module")
def gradients() -> dict[int, np.ndarray]:
    return {client: np.random.default_rng(client).normal(0, 3, 400_000) for client in CLIENTS}


def test_masked_vectors_look_like_noise_and_unmasked_ones_do_not(gradients):
    codes = {client: SECURE.encode(gradient, 0.2) for client, gradient in gradients.items()}
    now = gone_through(codes)
    for client in CLIENTS:
        # Seeded, so this passes always or never; of 10 true p-values one is below 1e-3 in 1 % of seeds.
        assert min(uniform(now.masked[client])) > 1e-3
        assert max(uniform(codes[client])) < 1e-100
        # Of 400,000 independent entries the correlation is 0 +- 0.0016.
        read = SECURE.decode(now.masked[client], 0.2)
        assert abs(np.corrcoef(read, gradients[client])[0, 1]) < 0.01
    assert np.corrcoef(SECURE.decode(now.sum(), 1.0), sum(gradients.values()))[0, 1] > 0.9999


def test_a_vector_that_comes_late_stays_hidden_though_its_mask_key_is_known(gradients):
    """The reason for the second mask (section 4 of the paper): the server was told the key of a client it took for gone."""
    codes = {client: SECURE.encode(gradient, 0.2) for client, gradient in gradients.items()}
    late, others = CLIENTS[0], CLIENTS[1:]
    now = gone_through(codes, masking=others, revealing=others)
    assert np.array_equal(now.sum(), summed(codes, others))
    _, arrived = mask(now.secrets[late], now.sent_to(late), codes[late], T)
    private = protocol._private(now.secrets[late].mask_seed, b"mask", SESSION)  # what the server has put together
    for advert in now.adverts:
        if advert.client != late:
            arrived -= protocol._pairwise(private, advert.mask_key, late, advert.client, SESSION, arrived)
    assert min(uniform(arrived)) > 1e-3
    assert abs(np.corrcoef(SECURE.decode(arrived, 0.2), gradients[late])[0, 1]) < 0.01
    # Its own mask is all that hides it now.
    own = protocol._stream(protocol._derived(now.secrets[late].self_seed, b"own mask", SESSION), arrived)
    assert np.array_equal(arrived - own, codes[late])


def test_a_client_hands_out_one_kind_of_share_of_each_other():
    now = gone_through(vectors(), masking=(2, 3, 5), revealing=())
    held = now.secrets[2].held
    assert reveal(now.secrets[2], (2, 3, 5), T) == {client: held[client][client in (2, 3, 5)] for client in CLIENTS}


def test_fewer_shares_than_the_threshold_put_nothing_together():
    now = gone_through(vectors(), revealing=(2, 17))
    with pytest.raises(TooFew, match="2 revealed shares, and 3 are needed"):
        now.sum()
    with pytest.raises(Rejected, match="a share of client 2's own mask is wrong"):
        now.sum(threshold=2)  # a server that does with two


# Whoever vanishes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present",
    [
        {"sharing": (2, 3, 5, 17), "masking": (2, 3, 5, 17), "revealing": (2, 3, 5, 17)},
        {"masking": (2, 5, 11, 17), "revealing": (2, 5, 11, 17)},
        {"masking": (3, 5, 11), "revealing": (3, 5, 11)},
        {"revealing": (3, 11, 17)},
        {"sharing": (2, 3, 5, 17), "masking": (2, 3, 5), "revealing": (2, 3, 5)},
        {"masking": (2, 3, 5, 17), "revealing": (3, 5, 17)},
    ],
    ids=[
        "before sharing",
        "before masking",
        "two before masking",
        "two before revealing",
        "one each before two",
        "masked and left",
    ],
)
def test_whoever_vanishes_the_sum_is_that_of_those_who_sent_a_vector(present):
    codes = vectors()
    assert np.array_equal(gone_through(codes, **present).sum(), summed(codes, present.get("masking", CLIENTS)))


def test_a_round_with_too_few_clients_ends_at_each_step():
    secrets, advert = advertise(2, 1, SESSION)
    _, other = advertise(3, 1, SESSION)
    with pytest.raises(TooFew, match="2 advertised keys, and 3 are needed"):
        share(secrets, [advert, other], T)
    now = begun(sharing=(2, 3))
    with pytest.raises(TooFew, match="2 shared secrets, and 3 are needed"):
        mask(now.secrets[2], now.sent_to(2), vectors()[2], T)
    now = gone_through(vectors(), masking=(2, 3), revealing=())
    with pytest.raises(TooFew, match="2 masked vectors, and 3 are needed"):
        reveal(now.secrets[2], (2, 3), T)
    with pytest.raises(TooFew, match="2 masked vectors, and 3 are needed"):
        now.sum()


@pytest.mark.parametrize(
    ("clients", "threshold", "needed"),
    [(1, 0.5, 1), (2, 0.5, 2), (5, 0.5, 3), (10, 0.5, 6), (10, 0.7, 8), (10, 1, 10), (50, 0.58, 30)],
)
def test_more_than_the_threshold_s_share_is_needed_and_never_more_than_all(clients, threshold, needed):
    assert Secure(threshold=threshold).needed(clients) == needed


# Whatever is forged ---------------------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(("of", "what"), [(5, "own mask"), (11, "mask key")])
def test_a_wrong_share_is_noticed(of, what):
    now = gone_through(vectors(), masking=(2, 3, 5), revealing=(2, 3, 5))
    now.revealed[3][of] = flipped(now.revealed[3][of])
    with pytest.raises(Rejected, match=f"a share of client {of}'s {what} is wrong"):
        now.sum()


def test_a_share_that_is_missing_is_noticed():
    now = gone_through(vectors())
    del now.revealed[3][5]
    with pytest.raises(Rejected, match="a share of client 5's secret is missing"):
        now.sum()


def test_sealed_shares_that_were_changed_or_meant_for_somebody_else_are_rejected():
    now = begun()
    for sealed in (flipped(now.sealed[3][2]), now.sealed[5][2], now.sealed[3][5], now.sealed[2][3]):
        with pytest.raises(Rejected, match="what client 3 sent to client 2 was changed, or is of another round"):
            mask(now.secrets[2], now.sent_to(2) | {3: sealed}, vectors()[2], T)
    with pytest.raises(Rejected, match="shares of client 4, who advertised no keys"):
        mask(now.secrets[2], now.sent_to(2) | {4: now.sealed[3][2]}, vectors()[2], T)


def test_an_old_round_cannot_be_played_again():
    """Even with the same keys: seeded clients draw the same ones in both rounds."""
    old, now = begun(session_of(7, 1)), begun(session_of(7, 2))
    with pytest.raises(Rejected, match="was changed, or is of another round"):
        mask(now.secrets[2], old.sent_to(2), vectors()[2], T)
    with pytest.raises(Rejected, match="the keys that client 2 advertised are not among those handed out"):
        share(advertise(2, 20, session_of(7, 2), seeded(2))[0], old.adverts, T)


def test_every_step_is_taken_once_and_in_order():
    secrets, _ = advertise(2, 1, SESSION)
    with pytest.raises(Rejected, match="client 2 was asked for its vector out of turn"):
        mask(secrets, {}, vectors()[2], T)
    now = gone_through(vectors(), revealing=())
    with pytest.raises(Rejected, match="client 2 has shared its secrets of this round already"):
        share(now.secrets[2], now.adverts, T)
    with pytest.raises(Rejected, match="client 2 was asked for its vector out of turn"):
        mask(now.secrets[2], now.sent_to(2), vectors()[3], T)
    with pytest.raises(Rejected, match="client 3 was asked to reveal shares out of turn"):
        reveal(begun().secrets[3], CLIENTS, T)


def test_keys_that_the_server_changed_for_some_are_noticed():
    made = {client: advertise(client, 1, SESSION) for client in CLIENTS}
    adverts = [advert for _, advert in made.values()]
    _, stranger = advertise(3, 1, SESSION)
    swapped = [stranger if advert.client == 3 else advert for advert in adverts]
    with pytest.raises(Rejected, match="the keys that client 3 advertised are not among those handed out"):
        share(made[3][0], swapped, T)
    # Client 5's keys are what they were on both sides, but the two were told different keys of client 3.
    two, five = share(made[2][0], adverts, T), share(made[5][0], swapped, T)
    with pytest.raises(Rejected, match="what client 2 sent to client 5 was changed"):
        mask(five[0], {2: two[1][5], 11: bytes(60)}, vectors()[5], T)
    with pytest.raises(Rejected, match="two of the advertised keys are of one client"):
        share(made[2][0], [*adverts, stranger], T)


def test_who_is_said_to_have_answered_must_have_taken_part():
    now = gone_through(vectors(), revealing=())
    with pytest.raises(Rejected, match="client 4 is said to have answered, and had no part in this round"):
        reveal(now.secrets[2], (2, 3, 4), T)
    with pytest.raises(Rejected, match="client 2 is said not to have answered, and did"):
        reveal(now.secrets[2], (3, 5, 11), T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.4}, r"aggregation.threshold must be a number in \[0.5, 1\], got 0.4"),
        ({"clip": 0}, "aggregation.clip must be a number > 0, got 0"),
        ({"bits": 16}, "aggregation.bits must be 32 or 64, got 16"),
        ({"fraction_bits": 60, "bits": 64}, "aggregation.fraction_bits must be a whole number in 1..52, got 60"),
        ({"clip": 65}, "aggregation.clip=65 with 24 binary places does not fit 32 bits: take aggregation.clip=64, fewer"),
        ({"timeout": 0}, "aggregation.timeout must be a number > 0, got 0"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Secure(**settings)


def test_an_update_that_is_no_number_is_not_added_up():
    with pytest.raises(ValueError, match="entries that are no finite numbers cannot be added up"):
        SECURE.encode(np.array([0.0, np.nan]), 1.0)
