"""The tap: whom the eavesdropper listens to, as a table."""

import pytest

from fedsim.tap import Tap

CLIENTS = [1, 2, 3, 5, 8]
ROUNDS = range(1, 8)

WHEN = [
    (Tap(every=3, rounds=None), [3, 6]),
    (Tap(every=1, rounds=None), [1, 2, 3, 4, 5, 6, 7]),
    (Tap(every=None, rounds=[1, 4]), [1, 4]),
    (Tap(every=3, rounds=[1, 3]), [1, 3, 6]),
    (Tap(every=None, rounds="all"), [1, 2, 3, 4, 5, 6, 7]),
    (Tap(every=None, rounds=None), []),
    (Tap(every=100, rounds=[]), []),
]


@pytest.mark.parametrize(("tap", "rounds"), WHEN, ids=[repr(tap) for tap, _ in WHEN])
def test_a_tap_listens_in_the_rounds_it_names(tap, rounds):
    assert [round for round in ROUNDS if tap.listens(round)] == rounds
    assert [round for round in ROUNDS if tap.choose(0, round, CLIENTS)] == rounds


WHOM = [
    (Tap(1, clients="all"), CLIENTS),
    (Tap(1, clients=[8, 2, 4]), [2, 8]),
    (Tap(1, clients=[4]), []),
    (Tap(1, clients=9), CLIENTS),
]


@pytest.mark.parametrize(("tap", "clients"), WHOM, ids=[repr(tap) for tap, _ in WHOM])
def test_a_tap_listens_to_the_clients_it_names_if_they_take_part(tap, clients):
    assert all(tap.choose(0, round, CLIENTS) == clients for round in ROUNDS)


def test_a_tap_on_some_clients_takes_others_each_round_by_the_seed():
    picked = [tuple(Tap(1, clients=2).choose(0, round, CLIENTS)) for round in range(1, 200)]
    assert all(len(two) == 2 and sorted(two) == list(two) and set(two) <= set(CLIENTS) for two in picked)
    assert len(set(picked)) == 10  # 5 choose 2; one of them is missed by 199 draws with probability 1e-8
    assert picked == [tuple(Tap(1, clients=2).choose(0, round, CLIENTS)) for round in range(1, 200)]
    assert picked != [tuple(Tap(1, clients=2).choose(1, round, CLIENTS)) for round in range(1, 200)]


WRONG = [
    ({"every": 0}, "tap.every must be a whole number >= 1, got 0"),
    ({"every": "x"}, "tap.every must be a whole number >= 1, got 'x'"),
    ({"rounds": "some"}, "unknown tap.rounds 'some': choices: all"),
    ({"rounds": [1, 0]}, "tap.rounds must be a whole number >= 1, got 0"),
    ({"rounds": 3}, "tap.rounds must be a list of rounds, all, or null, got 3"),
    ({"clients": 0}, "tap.clients must be a whole number >= 1, got 0"),
    ({"clients": [-1]}, "tap.clients must be a whole number >= 0, got -1"),
    ({"clients": "everybody"}, "unknown tap.clients 'everybody': choices: all"),
    ({"clients": None}, "tap.clients must be a whole number >= 1, got None"),
    ({"when": "lvie"}, "unknown tap.when 'lvie': did you mean 'live'? choices: live, end, later"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_setting_of_a_tap_is_named(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Tap(**settings)
    assert str(error.value) == message


def test_a_client_is_followed_where_nothing_it_sends_is_missed():
    assert Tap(1, clients="all").follows(3)
    assert Tap(None, rounds="all", clients=[3]).follows(3)
    assert not Tap(1, clients=[3]).follows(4)
    for tap in (Tap(2, clients="all"), Tap(1, clients=5), Tap(None, rounds=[1, 2], clients=[3])):
        assert not tap.follows(3)
