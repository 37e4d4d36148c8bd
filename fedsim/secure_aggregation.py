"""Secure aggregation: the server learns the sum of its clients' vectors, and of none of them anything (Bonawitz et al. 2017, CCS).

Their protocol of figure 4 against an honest-but-curious server, which follows it and remembers everything. Keys are not signed, so
a server that lies about them can stand between two clients; and whatever the server is, it gets the sum. In a round, of n clients
any t of whom can put a shared secret together, each client

    advertises  two public keys, its number of examples, and a commitment to the seed of its own mask;
    shares      the secrets of its masks among all of them, each share encrypted for its holder;
    masks       its vector with a mask of its own and one for each other client, which that client subtracts;
    reveals     one share of each other client: of the own mask's seed if it answered, of the mask key if it vanished.

The server adds up, and `unmask` takes off the own masks of those who answered and what those who vanished left in the others.
Vectors are of whole numbers modulo 2**bits. Primitives: X25519, HKDF-SHA256, AES-GCM and AES-CTR of `cryptography`, Shamir's secret
sharing over GF(2**128) of PyCryptodome. Nothing here knows of Flower: see `fedsim/secure_rounds.py`.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsim.checks import number, whole

SECRET = 16  # bytes of a shared secret: what Shamir.split takes, and 128 bits are what X25519 is worth
NONCE = 12
SEALED = NONCE + 2 * SECRET + 16  # two shares and AES-GCM's tag

Codes = np.ndarray  # (d,) uint32 or uint64: whole numbers modulo 2**bits


class Rejected(ValueError):
    """A message that the protocol forbids, or that was changed on its way; the message is one line."""


class TooFew(Rejected):
    """Fewer clients than the threshold are left."""


@dataclass(frozen=True)
class Plain:
    """Each client's update travels by itself, and the server sees it."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Secure:
    """Updates are masked, and the server sees their sum (Bonawitz et al. 2017, against an honest-but-curious server).

    Each update is weighted by its client's share of the round's examples, so the sum is FedAvg's mean. The sum of fixed-point
    entries is exact, and rounding them moves an entry of the mean of n clients by n / 2**(fraction_bits + 1) at most: by less
    than 2**-16 for n < 512. Where clients vanish, it is so much times all examples over those of the clients that stayed. Dense
    vectors travel, `bits` an entry, whatever the defense left out, and 260 n**2 bytes of keys and shares.

    The server still learns who answers, and each client's number of examples. Against one that does not follow the protocol, or
    that chooses the model to steal, this is no protection: see docs/secure-aggregation.md.

    threshold      the round counts if more than this share of its clients stay to the end; so many must collude to unmask one
    clip           entries are clipped to [-clip, clip]
    fraction_bits  binary places of an entry
    bits           of an entry on the wire, 32 or 64
    timeout        seconds to wait for answers in the steps without training
    seeded         masks from the run's seed, so that captured masks are reproducible. Whoever knows the seed can unmask: for tests
    """

    threshold: float = 0.5
    clip: float = 64.0
    fraction_bits: int = 24
    bits: int = 32
    timeout: float = 600.0
    seeded: bool = False

    name: ClassVar[str] = "secure"

    def __post_init__(self) -> None:
        number("aggregation.threshold", self.threshold, 0.5, 1)
        number("aggregation.clip", self.clip, 0, above=True)
        if self.bits not in (32, 64):
            raise ValueError(f"aggregation.bits must be 32 or 64, got {self.bits!r}")
        whole("aggregation.fraction_bits", self.fraction_bits, high=52)  # a float64 has no more
        number("aggregation.timeout", self.timeout, 0, above=True)
        if self.clip * 2**self.fraction_bits > 2 ** (self.bits - 2):
            raise ValueError(
                f"aggregation.clip={self.clip:g} with {self.fraction_bits} binary places does not fit {self.bits} bits: take "
                f"aggregation.clip={2.0 ** (self.bits - 2 - self.fraction_bits):g}, fewer aggregation.fraction_bits, or bits=64"
            )

    def needed(self, clients: int) -> int:
        """t of n = `clients`: more than the threshold's share, and never more than all."""
        return min(clients, int(self.threshold * clients + 1e-9) + 1)  # 0.58 * 50 is 28.999999999999996

    def session(self, run: int, round: int) -> bytes:
        """The name of a round of a run; of all runs the same with `seeded`, since keys are made with it."""
        return session_of(0 if self.seeded else run, round)

    def encode(self, values: np.ndarray, weight: float) -> Codes:
        """`weight * values`, clipped, in fixed point modulo 2**bits; the weights of a round add up to 1 or less."""
        if not np.isfinite(values).all():
            raise ValueError("an update with entries that are no finite numbers cannot be added up: lower federation.lr")
        codes = np.rint(np.clip(values, -self.clip, self.clip).astype(np.float64) * (weight * 2.0**self.fraction_bits))
        return codes.astype(np.int64).astype(self._dtype)  # negative numbers wrap around

    def decode(self, codes: Codes, weight: float) -> np.ndarray:
        """(d,) float64, what `codes` stand for, divided by `weight`."""
        return codes.view(np.int32 if self.bits == 32 else np.int64).astype(np.float64) / (weight * 2.0**self.fraction_bits)

    def to_bytes(self, codes: Codes) -> bytes:
        """As they travel, little-endian."""
        return codes.astype(codes.dtype.newbyteorder("<"), copy=False).tobytes()

    def from_bytes(self, data: bytes | memoryview) -> Codes:
        """The codes that `to_bytes` wrote."""
        return np.frombuffer(data, self._dtype.newbyteorder("<")).astype(self._dtype)

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(np.uint32 if self.bits == 32 else np.uint64)


# What travels and what is kept.


@dataclass(frozen=True)
class Advert:
    """What a client makes known to all; 108 bytes.

    cipher_key  public key that its shares are encrypted for
    mask_key    public key that its pairwise masks are agreed with
    commitment  to the seed of its own mask, so that wrong shares of it are noticed
    """

    client: int
    examples: int
    cipher_key: bytes
    mask_key: bytes
    commitment: bytes

    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IQ32s32s32s")

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.client, self.examples, self.cipher_key, self.mask_key, self.commitment)

    def check(self) -> None:
        """Raises Rejected for keys with which nobody can agree on a secret (points of low order): others would fail over them."""
        for key in (self.cipher_key, self.mask_key):
            try:
                X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
            except ValueError:
                raise Rejected(f"client {self.client} advertised a key that gives no secret") from None

    @classmethod
    def all_from(cls, data: bytes | memoryview) -> "tuple[Advert, ...]":
        """The adverts that stand one behind the other in `data`."""
        if len(data) % cls._LAYOUT.size:
            raise Rejected(f"{len(data)} bytes are no adverts, which have {cls._LAYOUT.size} each")
        return tuple(cls(*fields) for fields in cls._LAYOUT.iter_unpack(data))


@dataclass(frozen=True)
class Secrets:
    """What a client keeps to itself during one round.

    session      names the run and the round; a message made for another one is rejected
    cipher_seed  private part of its cipher key
    mask_seed    private part of its mask key, shared among the clients
    self_seed    seed of its own mask, shared among the clients
    adverts      everybody's, once it has shared its secrets
    held         by client, what it holds of their two secrets, mask_seed and self_seed, once it has masked its vector
    """

    session: bytes
    client: int
    cipher_seed: bytes = field(repr=False)
    mask_seed: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    adverts: tuple[Advert, ...] = ()
    held: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    def advert(self, examples: int) -> Advert:
        cipher, mask = (
            _private(seed, use, self.session).public_key().public_bytes_raw()
            for seed, use in ((self.cipher_seed, b"cipher"), (self.mask_seed, b"mask"))
        )
        return Advert(self.client, examples, cipher, mask, _commitment(self.self_seed, self.session, self.client))


def session_of(run: int, round: int) -> bytes:
    """The name of a round of a run."""
    return f"fedsim/{run}/{round}".encode()


# What a client does.


def advertise(client: int, examples: int, session: bytes, entropy: Callable[[int], bytes] = os.urandom) -> tuple[Secrets, Advert]:
    """New secrets for a round, and what to make known of them. `entropy` gives so many random bytes."""
    secrets = Secrets(session, client, entropy(SECRET), entropy(SECRET), entropy(SECRET))
    return secrets, secrets.advert(examples)


def share(secrets: Secrets, adverts: Sequence[Advert], threshold: int) -> tuple[Secrets, dict[int, bytes]]:
    """Shares of the client's secrets, sealed for each other client, any `threshold` of which put the secrets together."""
    if secrets.adverts:
        raise Rejected(f"client {secrets.client} has shared its secrets of this round already")
    _enough("advertised keys", len(adverts), threshold)
    by_client = {one.client: one for one in adverts}
    if len(by_client) < len(adverts) or len({one.cipher_key for one in adverts}) < len(adverts):
        raise Rejected("two of the advertised keys are of one client")
    own = by_client.get(secrets.client)
    if own is None or own != secrets.advert(own.examples):
        raise Rejected(f"the keys that client {secrets.client} advertised are not among those handed out")
    everybody = tuple(by_client[client] for client in sorted(by_client))
    mask_parts, self_parts = (
        [part for _, part in Shamir.split(threshold, len(everybody), secret, ssss=False)]
        for secret in (secrets.mask_seed, secrets.self_seed)
    )
    shares = dict(zip(sorted(by_client), zip(mask_parts, self_parts, strict=True), strict=True))
    after = replace(secrets, adverts=everybody, held={secrets.client: shares.pop(secrets.client)})
    sealed = {}
    for client, (mask_part, self_part) in shares.items():
        nonce = os.urandom(NONCE)
        key, about = _channel(after, by_client[client], secrets.client, client)
        sealed[client] = nonce + AESGCM(key).encrypt(nonce, mask_part + self_part, about)
    return after, sealed


def mask(secrets: Secrets, sealed: Mapping[int, bytes], codes: Codes, threshold: int) -> tuple[Secrets, Codes]:
    """The client's vector under all its masks. `sealed` are the shares that other clients sent it: with these it goes on."""
    if not secrets.adverts or len(secrets.held) > 1:
        raise Rejected(f"client {secrets.client} was asked for its vector out of turn")
    by_client = {one.client: one for one in secrets.adverts}
    _enough("shared secrets", len(sealed) + 1, threshold)
    held = dict(secrets.held)
    private, masked = _private(secrets.mask_seed, b"mask", secrets.session), codes.copy()
    for client, data in sorted(sealed.items()):
        if client not in by_client or client == secrets.client:
            raise Rejected(f"client {secrets.client} was sent shares of client {client}, who advertised no keys")
        key, about = _channel(secrets, by_client[client], client, secrets.client)
        try:
            opened = AESGCM(key).decrypt(data[:NONCE], bytes(data[NONCE:]), about)
        except InvalidTag:
            raise Rejected(f"what client {client} sent to client {secrets.client} was changed, or is of another round") from None
        held[client] = (opened[:SECRET], opened[SECRET:])
        masked += _pairwise(private, by_client[client].mask_key, secrets.client, client, secrets.session, codes)
    masked += _stream(_derived(secrets.self_seed, b"own mask", secrets.session), codes)
    return replace(secrets, held=held), masked


def reveal(secrets: Secrets, answered: Collection[int], threshold: int) -> dict[int, bytes]:
    """By client, one share: of the seed of its own mask if it `answered`, else of its mask key. Both would lay its vector bare.

    So this must be asked once a round: the caller drops the secrets.
    """
    if len(secrets.held) < threshold or not secrets.adverts:
        raise Rejected(f"client {secrets.client} was asked to reveal shares out of turn")
    if unknown := set(answered) - set(secrets.held):
        raise Rejected(f"client {min(unknown)} is said to have answered, and had no part in this round")
    if secrets.client not in answered:
        raise Rejected(f"client {secrets.client} is said not to have answered, and did")
    _enough("masked vectors", len(set(answered)), threshold)
    return {client: own if client in answered else key for client, (key, own) in secrets.held.items()}


# What the server does.


def unmask(
    session: bytes,
    adverts: Sequence[Advert],
    masked: Mapping[int, Codes],
    sharers: Collection[int],
    revealed: Mapping[int, Mapping[int, bytes]],
    threshold: int,
) -> Codes:
    """The sum of the clients' vectors modulo 2**bits.

    masked    what those sent who answered, at least `threshold` of
    sharers   who had shared its secrets: those of them who are not in `masked` vanished
    revealed  by client, what it revealed; at least `threshold`. Of more, the first ones are used
    """
    _enough("masked vectors", len(masked), threshold)
    _enough("revealed shares", len(revealed), threshold)
    by_client = {one.client: one for one in adverts}
    places = {client: i for i, client in enumerate(sorted(by_client), 1)}
    holders = sorted(revealed)[:threshold]

    def combined(client: int) -> bytes:
        try:
            return Shamir.combine([(places[holder], revealed[holder][client]) for holder in holders], ssss=False)
        except KeyError:
            raise Rejected(f"a share of client {client}'s secret is missing") from None

    total = np.sum(list(masked.values()), axis=0, dtype=next(iter(masked.values())).dtype)
    for client in sorted(masked):
        seed = combined(client)
        if _commitment(seed, session, client) != by_client[client].commitment:
            raise Rejected(f"a share of client {client}'s own mask is wrong")
        total -= _stream(_derived(seed, b"own mask", session), total)
    for client in sorted(set(sharers) - set(masked)):
        private = _private(combined(client), b"mask", session)
        if private.public_key().public_bytes_raw() != by_client[client].mask_key:
            raise Rejected(f"a share of client {client}'s mask key is wrong")
        for other in sorted(masked):
            total += _pairwise(private, by_client[other].mask_key, client, other, session, total)
    return total


# Keys and masks.


def _enough(what: str, count: int, threshold: int) -> None:
    if count < threshold:
        raise TooFew(f"{count} {what}, and {threshold} are needed")


def _derived(secret: bytes, use: bytes, about: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=use + b"\0" + about).derive(secret)


def _private(seed: bytes, use: bytes, session: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(seed, b"private key, " + use, session))


def _commitment(seed: bytes, session: bytes, client: int) -> bytes:
    """Hides a seed of 128 random bits, and binds to it."""
    return hashlib.sha256(b"commitment\0%d\0" % client + session + b"\0" + seed).digest()


def _channel(secrets: Secrets, peer: Advert, sender: int, receiver: int) -> tuple[bytes, bytes]:
    """The key of one direction between two clients, and what is authenticated beside a message: both must know the same adverts."""
    agreed = _private(secrets.cipher_seed, b"cipher", secrets.session).exchange(X25519PublicKey.from_public_bytes(peer.cipher_key))
    known = hashlib.sha256(b"".join(one.to_bytes() for one in secrets.adverts)).digest()
    about = secrets.session + b"\0%d\0%d\0" % (sender, receiver) + known
    return _derived(agreed, b"channel", about), about


def _pairwise(private: X25519PrivateKey, key: bytes, mine: int, other: int, session: bytes, like: Codes) -> Codes:
    """What client `mine` adds for `other`: the smaller adds the mask that the two agree on, the larger subtracts it."""
    agreed = private.exchange(X25519PublicKey.from_public_bytes(key))
    stream = _stream(_derived(agreed, b"pairwise mask", session), like)
    return stream if mine < other else np.negative(stream)


def _stream(key: bytes, like: Codes) -> Codes:
    """Uniform numbers of the same length and type: AES-256 in counter mode. Each key is used once, so the counter starts at 0."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(like.nbytes))
    return np.frombuffer(stream, like.dtype.newbyteorder("<")).astype(like.dtype)
