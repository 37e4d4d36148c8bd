"""What gradients of a masked language model tell of the sentences behind them.

Three attackers, from the simplest: the words that occur, read off the embedding's gradient (`BagOfTokens`); words at their places
by matching gradients (`TextMatching`: token-level DLG and TAG); and both exactly, from the span of the first attention layer's
gradient (`SpanCheck`: DAGER). All are told the vocabulary and its special tokens, which ship with the model.

A reconstruction's `images` are the tokens (B, L) the model was given, [MASK] among them, and its `labels` (B, L) the words behind
the masks, IGNORED elsewhere: a batch as `fedsim.data` makes it. `fedsim.data.text.filled` puts them together to sentences.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from attacks.batching import one_by_one, streams
from attacks.evidence import gradient_of, size_of
from attacks.labels import analytic_labels
from attacks.optimizers import Adam, Minima, Stop, minimise
from attacks.terms import CosineGap, Gap
from fedsim.data.text import MASK, MASKED, PAD, Vocabulary, filled
from fedsim.models.bert import Bert
from fedsim.observation import Knowledge, Observation, Reconstruction, Trace
from fedsim.training import IGNORED, batch_loss
from fedsim.updates import Update

CHUNK = {"cpu": 16, "cuda": 512}  # problems at a time
Report = Callable[[int, int], None]


# What can be read off one gradient ------------------------------------------------------------------------------------------------


def embedding_of(model: nn.Module, vocabulary: int) -> str:
    """The name of the token embedding's weight (V, D): of the first `nn.Embedding` with V rows."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary:
            return f"{name}.weight"
    raise ValueError(
        f"{type(model).__name__} has no embedding of {vocabulary} tokens: attacks on text need data=text model=bert_tiny"
    )


def _head_of(gradient: Mapping[str, Tensor], embedding: str, vocabulary: int) -> Tensor:
    """(V, D) the gradient of the head's weight: the last matrix of V rows that is not the embedding."""
    found = [t for name, t in gradient.items() if t.dim() == 2 and len(t) == vocabulary and name != embedding]
    if not found:
        raise ValueError(f"the update has no head of {vocabulary} tokens beside {embedding}: is the head tied to the embedding?")
    return found[-1]


def input_tokens(gradient: Mapping[str, Tensor], embedding: str, decayed: bool = False) -> Tensor:
    """Ids, ascending, of all tokens the model was given: the rows of the embedding's gradient that are not zero.

    Exact for one gradient, unless the embedding is tied to the head. A row of a token that does not occur is never touched; where
    weight decay touched it, and was taken off again (`decayed`), rounding is left, below a millionth of the largest row.
    """
    largest = gradient[embedding].abs().amax(1)
    return (largest > (1e-6 * largest.max() if decayed else 0)).nonzero().squeeze(1)


def hidden_words(gradient: Mapping[str, Tensor], known: Knowledge, embedding: str, size: int) -> Tensor:
    """(M,) ids of the words behind the masks of a batch of `size`, ascending, repetitions counted.

    M is the rank of the head's gradient, the sum of M products of prediction error and feature. Which words they are stands in
    the gradient of the head's bias (see `attacks.labels`).
    """
    most = max(1, round(MASKED * (known.image_shape[0] - 2))) * size
    rank = int(torch.linalg.matrix_rank(_head_of(gradient, embedding, known.num_classes).double(), rtol=1e-5))
    return analytic_labels(gradient, known.num_classes, min(max(rank, size), most))


@dataclass(frozen=True)
class BagOfTokens:
    """All words of a batch, without their order: non-zero rows of the embedding's gradient, and the labels behind the masks.

    Threat model: sees one client's update and knows the architecture; computes nothing. Exact for one gradient of any batch; for
    several local steps the union over all. An update in which more tokens have rows than a batch can hold was noised: then the
    longest rows are named, and the search has not converged.

    The reconstruction lists the words in the order of their ids, which is not that of any sentence.
    """

    reads = "text"

    def __call__(
        self, seen: Sequence[Observation], known: Knowledge, model: nn.Module, rng: torch.Generator, *, report: Report | None = None
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order; `report(finished, total)` is called as victims finish."""
        embedding = embedding_of(model, known.num_classes)
        return one_by_one(seen, lambda one: self._read(one, known, embedding), report)

    def _read(self, one: Observation, known: Knowledge, embedding: str) -> Reconstruction:
        began = time.perf_counter()
        shape = (one.num_examples, *known.image_shape)
        places = int(torch.Size(shape).numel())
        gradient = gradient_of(one, known)
        tokens = input_tokens(gradient, embedding, bool(known.weight_decay))
        plausible = 0 < len(tokens) <= places
        if len(tokens) > places:
            tokens = gradient[embedding].norm(dim=1).topk(places).indices.sort().values
        words = hidden_words(gradient, known, embedding, one.num_examples)
        named = torch.cat([tokens[tokens != MASK], words]).unique()[:places]
        ids = torch.full((places,), PAD, device=named.device)
        ids[: len(named)] = named
        unmasked = torch.full(shape, IGNORED, device=ids.device)
        return _reconstruction(ids.reshape(shape), unmasked, 0.0, plausible, time.perf_counter() - began)


def _reconstruction(inputs: Tensor, labels: Tensor, loss: float, converged: bool, seconds: float) -> Reconstruction:
    """A reconstruction that was computed rather than searched for."""
    return Reconstruction(inputs, labels, loss, converged, inputs[None], torch.tensor([loss]), 0, seconds)


# Matching gradients --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextMatching:
    """Minimises gap(gradients of candidate embeddings, observed update) / unit, and names the nearest token of each embedding.

    Unknown are B x L embeddings, and where the masks are. The words behind the masks are read off the head's gradient first
    (`hidden_words`); each is then a distribution over the positions, and a position's share of them is how much of it is [MASK]: it
    mixes its embedding with [MASK]'s and weighs its prediction. When the optimizer's budget is spent, every word is given the
    position it leans to, and a second search of the same budget goes on from there. Labels that are "given" leave one search.

    The gradient of the token embedding is not matched, since a candidate embedding has no row in it. It serves as a check: the
    tokens named in the end have `converged` if they reproduce it. The gap that was minimised would not do: where one layer's
    gradient is much larger than the others, as in a network of small weights, it vanishes with hardly a word right.

    Threat model: an honest but curious server, or anyone who reads the wire: it knows the model, the broadcast parameters, one
    client's update and the shape of its batch.

    gap        distance between updates
    labels     "joint", or "given": told which positions are masked, and the words behind the masks
    optimizer  Adam(...); it also holds the budget of evaluations of one search
    restarts   starts for a victim, all run; the one with the smallest loss is reported
    tolerance  largest cosine gap to the observed gradient of the embedding at which a reconstruction `converged`; one wrong token
               of sixteen makes 0.01 or more
    stop       when a search ends before its budget
    moments    evaluations (the start is 0) at which the best point so far is kept in the reconstruction's trace
    chunk      problems computed at a time; None: 16 on a CPU, 512 on a GPU
    """

    gap: Gap = CosineGap()
    labels: Literal["joint", "given"] = "joint"
    optimizer: Adam = Adam(600, rate=0.0375, decay="linear")
    restarts: int = 1
    tolerance: float = 1e-3
    stop: Stop = Stop(threshold=1e-6)
    moments: tuple[int, ...] = ()
    chunk: int | None = None

    reads = "text"

    def __post_init__(self) -> None:
        if self.labels not in ("joint", "given"):
            raise ValueError(f'labels must be "joint" or "given", got {self.labels!r}')
        if self.restarts < 1:
            raise ValueError(f"restarts must be >= 1, got {self.restarts}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be >= 1 or None, got {self.chunk}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {self.tolerance}")

    def __call__(
        self, seen: Sequence[Observation], known: Knowledge, model: nn.Module, rng: torch.Generator, *, report: Report | None = None
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order; `report(finished, total)` is called as victims finish."""
        if self.labels == "given" and known.labels is None:
            raise ValueError('labels="given" needs known.labels; use "joint" for an attacker who is not told')
        if known.lr is None and (known.local_steps or 1) > 1 and not self.gap.scale_free:
            raise ValueError(
                f"{self.gap} needs known.lr to compare an update of {known.local_steps} local steps; or use CosineGap()"
            )
        embedding = embedding_of(model, known.num_classes)
        seed = int(torch.randint(2**62, (), generator=rng))
        groups: dict[tuple[int, int], list[_Victim]] = defaultdict(list)
        for i, (one, stream) in enumerate(zip(seen, streams(seen, seed, "start"), strict=True)):
            size, gradient = size_of(one, known), gradient_of(one, known)
            words = known.labels[i] if known.labels and self.labels == "given" else hidden_words(gradient, known, embedding, size)
            groups[(size, words.numel())].append(_Victim(i, one, gradient, words.to(gradient[embedding].device), stream))
        found: dict[int, Reconstruction] = {}
        for (size, _), victims in groups.items():
            before = len(found)

            def finished(count: int, before: int = before) -> None:
                if report:
                    report(before + count // self.restarts, len(seen))

            group = _Problems.of(victims, (size, *known.image_shape), known.num_classes, model, embedding, self)
            with torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []):
                torch.manual_seed(seed)  # for models that draw: dropout
                found |= zip((victim.place for victim in victims), self._solve(group, victims, finished), strict=True)
        return [found[i] for i in range(len(seen))]

    def _solve(self, group: "_Problems", victims: Sequence["_Victim"], report: Callable[[int], None]) -> list[Reconstruction]:
        began = time.perf_counter()
        starts = torch.cat([torch.randn(self.restarts, group.unknowns, generator=one.stream) for one in victims]).to(group.device)
        # As large as the model's own embeddings; a larger start drowns the positions that are added to it.
        starts[:, : group.size] *= group.scale.repeat_interleave(self.restarts)[:, None]
        if group.told is None:
            first = self._minimise(group, starts, lambda _: None)
            group.decide(first.points[:, 0])
            starts = first.points[:, 0, : group.size]
            minima = self._minimise(group, starts, report)
            spent = first.evaluations + minima.evaluations
        else:
            minima = self._minimise(group, starts, report)
            spent = minima.evaluations
        share = (time.perf_counter() - began) / len(victims)
        inputs, labels = group.decoded(minima.points[:, 0], torch.arange(len(starts), device=starts.device))
        made = []
        for v in range(len(victims)):
            own = slice(v * self.restarts, (v + 1) * self.restarts)
            losses = minima.losses[own, 0]
            best = int(losses.argmin())
            made.append(
                Reconstruction(
                    images=inputs[own][best],
                    labels=labels[own][best],
                    loss=float(losses[best]),
                    converged=group.unexplained(inputs[own][best], labels[own][best], v) <= self.tolerance,
                    starts=inputs[own],
                    losses=losses,
                    evaluations=int(spent[own].sum()),
                    seconds=share,
                    trace=group.trace(v * self.restarts + best) if self.moments else None,
                )
            )
        return made

    def _minimise(self, group: "_Problems", starts: Tensor, report: Callable[[int], None]) -> Minima:
        return minimise(
            group.evaluate,
            starts[:, None],
            self.optimizer,
            stop=self.stop,
            chunk=self.chunk or CHUNK.get(group.device.type, CHUNK["cpu"]),
            report=lambda finished, _: report(finished),
        )


def iteration_table(trace: Trace, vocabulary: Vocabulary, truth: Tensor) -> str:
    """How one sentence came about, in Markdown: evaluations, loss and text at each moment of a trace, and the true ids (L,)."""
    lines = ["| evaluations | gap / unit | sentence |", "| ---: | ---: | --- |"]
    for count, loss, ids in zip(trace.evaluations.tolist(), trace.losses.tolist(), trace.images, strict=True):
        lines.append(f"| {count} | {loss:.1e} | {vocabulary.decode(ids[0])} |")
    return "\n".join([*lines, f"| | | *{vocabulary.decode(truth)}* |"])


@dataclass(frozen=True)
class _Victim:
    """One observation, at `place` among those attacked; `words` are those behind the masks (M,), or the labels (B, L) told."""

    place: int
    seen: Observation
    gradient: Update
    words: Tensor
    stream: torch.Generator


@dataclass
class _Problems:
    """V victims of equal shapes with R starts each: N = V R problems, those of one victim next to each other."""

    model: nn.Module
    params: dict[str, Tensor]  # (V, …)
    buffers: dict[str, Tensor]
    target: dict[str, Tensor]
    held_out: Tensor  # (V, …) the embedding's gradient
    embedding: str
    shape: tuple[int, int]  # (B, L)
    vocabulary: int
    gap: Gap
    restarts: int
    moments: tuple[int, ...]
    words: Tensor  # (V, M) words whose positions are searched for
    told: Tensor | None  # (N, B, L) labels that are settled
    seen: dict[int, list[tuple[int, float, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[int] = field(default_factory=Counter)
    best: dict[int, tuple[float, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        victims: "Sequence[_Victim]",
        shape: tuple[int, ...],
        vocabulary: int,
        model: nn.Module,
        embedding: str,
        attack: TextMatching,
    ) -> "_Problems":
        def stack(dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}

        size, length = shape
        words = torch.stack([one.words for one in victims])
        target = stack([one.gradient for one in victims])
        held_out = target.pop(embedding)
        return cls(
            model=model,
            params=stack([one.seen.params for one in victims]),
            buffers=stack([one.seen.buffers for one in victims]),
            target=target,
            held_out=held_out,
            embedding=embedding,
            shape=(size, length),
            vocabulary=vocabulary,
            gap=attack.gap,
            restarts=attack.restarts,
            moments=attack.moments,
            words=words,
            told=words.repeat_interleave(attack.restarts, 0) if attack.labels == "given" else None,
        )

    def __post_init__(self) -> None:
        unit = self.gap.unit(self.target)
        self.unit = torch.where(unit > 0, unit, 1)  # an update of zeros is explained by a gradient of zeros
        self.scale = self.params[self.embedding].flatten(1).std(1)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def size(self) -> int:
        """B L D"""
        return self.shape[0] * self.shape[1] * self.params[self.embedding].shape[-1]

    @property
    def unknowns(self) -> int:
        return self.size + (self.words.shape[1] * self.shape[0] * self.shape[1] if self.told is None else 0)

    def weights(self, points: Tensor, problems: Tensor) -> Tensor:
        """(P, B, L, V) how much of each word is to be predicted at each position; each word is there once."""
        if self.told is not None:
            told = self.told[problems]
            return nn.functional.one_hot(told.clamp(min=0), self.vocabulary) * (told != IGNORED)[..., None].to(points.dtype)
        words = nn.functional.one_hot(self.words[problems // self.restarts], self.vocabulary).to(points.dtype)
        return (self._leanings(points).mT @ words).unflatten(1, self.shape)

    def _leanings(self, points: Tensor) -> Tensor:
        """(P, M, B L) each word's distribution over the positions."""
        return points[:, self.size :].unflatten(1, (self.words.shape[1], -1)).softmax(-1)

    def decide(self, points: Tensor) -> None:
        """Gives every word of each problem a position of its own, those (N, …) that they lean to together."""
        from scipy.optimize import linear_sum_assignment

        told = torch.full((len(points), self.shape[0] * self.shape[1]), IGNORED, device=self.device)
        for n, leanings in enumerate(self._leanings(points).cpu()):
            word, position = linear_sum_assignment(-leanings.nan_to_num().numpy())
            told[n, position] = self.words[n // self.restarts][word]
        self.told = told.unflatten(1, self.shape)
        self.best.clear()  # from here on another function is minimised

    def decoded(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens the model was given and labels, (P, B, L) each: the nearest rows of the embedding, [MASK] where it prevails."""
        rows = self.params[self.embedding][problems // self.restarts]
        away = torch.cdist(points[:, : self.size].unflatten(1, (-1, rows.shape[-1])), rows)
        away[..., MASK] = torch.inf  # where the masks are is a question of its own
        nearest = away.argmin(-1).unflatten(1, self.shape)
        weights = self.weights(points, problems)
        hidden = weights.sum(-1) > 0.5
        return torch.where(hidden, MASK, nearest), torch.where(hidden, weights.argmax(-1), IGNORED)

    def evaluate(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) and their gradients (P, D) at points (P, D) of these problems."""
        points = points.detach().requires_grad_()
        victims = problems // self.restarts
        params = {name: t[victims].requires_grad_() for name, t in self.params.items()}
        buffers = {name: t[victims] for name, t in self.buffers.items()}
        weights = self.weights(points, problems)
        share = weights.sum(-1, keepdim=True).clamp(max=1)
        embedded = points[:, : self.size].unflatten(1, (*self.shape, -1))
        embedded = embedded.lerp(params[self.embedding].detach()[:, None, None, MASK], share)

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], embedded: Tensor, weights: Tensor) -> Tensor:
            return batch_loss(self.model, params, buffers, embedded, weights)

        losses = vmap(loss, randomness="different")(params, buffers, embedded, weights)
        gradients = torch.autograd.grad(losses.sum(), [params[name] for name in self.target], create_graph=True)
        target = {name: t[victims] for name, t in self.target.items()}
        gaps = self.gap(dict(zip(target, gradients, strict=True)), target) / self.unit[victims]
        # Problems do not interact, so the gradient of the sum holds each one's own.
        (slope,) = torch.autograd.grad(gaps.sum(), points)
        if self.moments:
            self._record(points.detach(), gaps.detach(), problems)
        return gaps.detach(), slope

    def unexplained(self, inputs: Tensor, labels: Tensor, victim: int) -> float:
        """The cosine gap between the embedding's gradient of this batch (B, L) and the one that was observed."""
        params = {name: t[victim] for name, t in self.params.items()}
        rows = params[self.embedding] = params[self.embedding].requires_grad_()
        loss = batch_loss(self.model, params, {name: t[victim] for name, t in self.buffers.items()}, inputs, labels)
        (gradient,) = torch.autograd.grad(loss, rows)
        return float(CosineGap()({"rows": gradient[None]}, {"rows": self.held_out[victim][None]}))

    def _record(self, points: Tensor, gaps: Tensor, problems: Tensor) -> None:
        for row, (n, gap) in enumerate(zip(problems.tolist(), gaps.tolist(), strict=True)):
            if n not in self.best or gap < self.best[n][0]:
                self.best[n] = (gap, points[row].clone())
            if self.counts[n] in self.moments:
                least, point = self.best[n]
                self.seen[n].append((self.counts[n], least, filled(*self.decoded(point[None], problems[row : row + 1]))[0]))
            self.counts[n] += 1

    def trace(self, n: int) -> Trace:
        """How problem `n` came about."""
        evaluations, losses, sentences = zip(*self.seen[n], strict=True)
        return Trace(torch.tensor(evaluations), torch.tensor(losses), torch.stack(sentences), {})


# The span of a layer's gradient --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpanCheck:
    """DAGER (Petrov et al. 2024): a linear layer's gradient is a sum of (error) (input)', so its rows span no more than its inputs.

    What the first attention layer is given is one of V x L vectors, a token at a position, and the gradients of its query, key and
    value tell which of them lie in their span. For one sentence that is the sentence. For B > 1 the span also holds tokens at
    places where they were not (x at p is a combination of x at q, y at p and y at q), so the second layer decides: what it is
    given depends on the whole sentence, as attention looks both ways, and only the true ones lie in its span altogether. They are
    searched for by changing one position at a time to what lowers the distance, from random starts.

    The words behind the masks follow: once the inputs are known, the head's gradient is linear in the labels.

    Limits: the span must not be the whole space. That takes fewer than D - 1 different tokens at places for the first layer, and
    B L < D - 1 for the second (normalised inputs lie in D - 1 dimensions). The search found all sentences of 16 tokens in batches
    of 2 and 3 at D = 64 and of 4 at D = 128.
    Any noise fills the space; a sparse or quantized update does too. Several local steps mix spans of different weights.

    Threat model: an honest but curious server, or anyone who reads the wire: it knows the model, the broadcast parameters, and one
    client's gradient. Computes no gradient.

    tolerance  distance from the span, relative to the vector's length, below which it counts as in it
    rank       singular values below this share of the largest are rounding errors
    starts     random starts of one search for the sentences of a batch
    searches   at most so many searches; the next one runs only if those before it left a sentence unfound
    sweeps     times each start goes through all positions
    """

    tolerance: float = 1e-3
    rank: float = 1e-6
    starts: int = 16
    searches: int = 4
    sweeps: int = 6

    reads = "text"

    def __post_init__(self) -> None:
        for name in ("tolerance", "rank"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        for name in ("starts", "searches", "sweeps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def __call__(
        self, seen: Sequence[Observation], known: Knowledge, model: nn.Module, rng: torch.Generator, *, report: Report | None = None
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order; `report(finished, total)` is called as victims finish."""
        if not isinstance(model, Bert):
            raise ValueError(
                f"the span check needs to know where attention begins: {type(model).__name__} is no Bert, take model=bert_tiny"
            )
        chances = iter(streams(seen, int(torch.randint(2**62, (), generator=rng)), "sentences"))

        def read(one: Observation) -> Reconstruction:
            return self._one(_Layers(model, one, gradient_of(one, known)), one, known, next(chances))

        return one_by_one(seen, read, report)

    @torch.no_grad()
    def _one(self, layers: "_Layers", one: Observation, known: Knowledge, rng: torch.Generator) -> Reconstruction:
        began = time.perf_counter()
        size, (length,) = size_of(one, known), known.image_shape
        device = layers.gradient["head.weight"].device
        everything = torch.arange(known.num_classes, device=device)[:, None].expand(-1, length)
        spans = [layers.span(block, self.rank) for block in range(1 if size == 1 else 2)]
        telling = all(len(span) < span.shape[1] - 1 for span in spans)
        first = _distances(layers.embedded(everything), spans[0])  # (V, L)
        if size == 1 or not telling:
            losses, inputs = first.topk(min(size, known.num_classes), 0, largest=False)
            losses = losses.amax(1)
        else:
            choices = [column.argsort()[: max(1, int((column < self.tolerance).sum()))] for column in first.T]
            inputs, losses = self._sentences(choices, size, layers, spans[1], rng)
        certain = telling and len(inputs) == size and float(losses.max()) < self.tolerance
        inputs = torch.cat([inputs, torch.full((size - len(inputs), length), PAD, device=device)])
        made = _reconstruction(inputs, layers.labels(inputs), float(losses.max()), certain, 0.0)
        return replace(made, seconds=time.perf_counter() - began)

    def _sentences(
        self, choices: Sequence[Tensor], size: int, layers: "_Layers", span: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The at most `size` different sentences (N, L) that lie nearest to the second layer's span, and their distances (N,)."""

        def distances(ids: Tensor) -> Tensor:
            return _distances(layers.after_first(ids), span).square().mean(-1).sqrt()

        ids, losses = self._search(choices, distances, rng)
        for _ in range(self.searches - 1):
            if int((losses < self.tolerance).sum()) >= size:
                break
            more, those = self._search(choices, distances, rng)
            ids, where = torch.cat([ids, more]).unique(dim=0, return_inverse=True)
            losses = losses.new_full((len(ids),), torch.inf).scatter_reduce(0, where, torch.cat([losses, those]), "amin")
        order = losses.argsort()[:size]
        return ids[order], losses[order]

    def _search(
        self, choices: Sequence[Tensor], distances: Callable[[Tensor], Tensor], rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The different sentences (N, L) that the starts end at, and their distances (N,)."""
        picked = [ids[torch.randint(len(ids), (self.starts,), generator=rng).to(ids.device)] for ids in choices]
        found, losses = torch.stack(picked, 1), choices[0].new_full((self.starts,), torch.inf, dtype=torch.float32)
        for _ in range(self.sweeps):
            before = losses
            for place in torch.randperm(len(choices), generator=rng).tolist():
                ids = choices[place]
                trials = found[:, None].repeat(1, len(ids), 1)
                trials[:, :, place] = ids
                losses, best = distances(trials.flatten(0, 1)).unflatten(0, (self.starts, -1)).min(1)
                found[:, place] = ids[best]
            if torch.equal(before, losses):
                break
        different, where = found.unique(dim=0, return_inverse=True)
        least = losses.new_full((len(different),), torch.inf).scatter_reduce(0, where, losses, "amin")
        return different, least


def _distances(vectors: Tensor, span: Tensor) -> Tensor:
    """Relative distance (…) of vectors (…, D) from the span of the orthonormal rows (R, D)."""
    return (vectors - vectors @ span.mT @ span).norm(dim=-1) / vectors.norm(dim=-1)


@dataclass(frozen=True)
class _Layers:
    """A Bert at the parameters that were broadcast, and the gradient that was sent."""

    model: Bert
    seen: Observation
    gradient: Update

    def span(self, block: int, share: float) -> Tensor:
        """(R, D) orthonormal rows that span the inputs of a block's attention, as far as its gradient shows them."""
        parts = [self.gradient[f"blocks.{block}.attention.{layer}.weight"] for layer in ("query", "key", "value")]
        _, sizes, rows = torch.linalg.svd(torch.cat(parts).double(), full_matrices=False)
        return rows[sizes > share * sizes[0]].float()

    def embedded(self, ids: Tensor) -> Tensor:
        """(N, L, D) what the first block is given of tokens (N, L)."""
        return self._call(self.model.stem, "stem.", ids)

    def after_first(self, ids: Tensor) -> Tensor:
        """(N, L, D) what the second block is given."""
        return self._call(self.model.blocks[0], "blocks.0.", self.embedded(ids))

    def labels(self, inputs: Tensor) -> Tensor:
        """(B, L) the words behind the masks of `inputs`, IGNORED elsewhere.

        The head's gradient is (p - y)' [h, 1] / M, with predictions p (M, V) and features h that follow from the inputs: solved
        for y.
        """
        features = self._call(self.model.blocks, "blocks.", self.embedded(inputs))[inputs == MASK].double()
        labels = torch.full_like(inputs, IGNORED)
        if not len(features):
            return labels
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        head, slope = (
            torch.cat([part["head.weight"], part["head.bias"][:, None]], 1).double() for part in (self.seen.params, self.gradient)
        )
        predicted = (features @ head.mT).softmax(-1)
        truth = predicted - len(features) * (slope @ torch.linalg.pinv(features)).mT
        labels[inputs == MASK] = truth.argmax(-1)
        return labels

    def _call(self, module: nn.Module, prefix: str, x: Tensor) -> Tensor:
        own = {name.removeprefix(prefix): t for name, t in self.seen.params.items() if name.startswith(prefix)}
        return functional_call(module, own, (x,))
