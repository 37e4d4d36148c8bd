"""Text: sentences and their masks, a BERT that can be differentiated twice, and what its gradients tell of what it read."""

import csv
import io
import math
import random
from dataclasses import replace

import pytest
import torch
from test_cli import fedsim
from torch import Tensor
from torch.func import functional_call, grad, vmap
from worlds import config, federate

import attacks
from attacks import Adam, BagOfTokens, CosineGap, SpanCheck, SquaredAndAbsoluteGap, SquaredGap, TextMatching, metrics
from attacks.evidence import gradient_of
from attacks.text import _Problems, _Victim, embedding_of, hidden_words, input_tokens, iteration_table
from experiments import scoring
from experiments.card import obstacles
from experiments.config import compose
from experiments.runner import attack_of, check_config
from fedsim.data import Sentences, Vocabulary, grammar, load
from fedsim.data.text import CLS, DEMO, MASK, PAD, SEP, SPECIAL, UNK, filled, is_word
from fedsim.federation import Evaluation
from fedsim.models import Normal, bert_tiny
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction
from fedsim.run import RunFolder
from fedsim.seeding import generator
from fedsim.setup import setup_of
from fedsim.training import IGNORED, evaluate, local_update, loss_of, split
from fedsim.wire import pack

torch.set_num_threads(1)

LENGTH, WORDS = 16, 400
KNOWN = Knowledge((LENGTH,), WORDS)


@pytest.fixture(scope="module")
def corpus():
    return load("text", train_size=211, test_size=53)


def victims(corpus, sizes, width=64):
    """Observations of batches of these sizes, each of another random network, and the batches."""
    seen, batches, start = [], [], 0
    for i, size in enumerate(sizes):
        model = bert_tiny((LENGTH,), WORDS, width=width, rng=generator(i, "init"))
        params, _ = split(model)
        batches.append(corpus.train.batch(torch.arange(start, start + size)))
        start += size
        seen.append(Observation(params, pack(local_update(model, params, {}, batches[-1:], lr=1).update), size, 1, i))
    return model, seen, batches


def noised(one: Observation, deviation: float) -> Observation:
    rng = generator(0, "noise")
    return replace(one, packets=pack({n: t + deviation * torch.randn(t.shape, generator=rng) for n, t in one.update.items()}))


# Data ----------------------------------------------------------------------------------------------------------------------------


def test_the_grammar_says_395_words_each_of_which_has_one_place():
    words = grammar.words()
    assert len(words) == len(set(words)) == 395
    rng = random.Random(3)
    said = {word for _ in range(4000) for word in grammar.sentence(rng.choice(list(grammar.TOPICS)), rng).split()}
    assert said == set(words)


def test_sentences_are_a_function_of_seed_and_split(corpus):
    again, other = load("text", train_size=211, test_size=53), load("text", train_size=211, test_size=53, seed=1)
    assert torch.equal(corpus.train.inputs, again.train.inputs)
    assert torch.equal(corpus.train.targets, again.train.targets)
    assert not torch.equal(corpus.train.inputs, other.train.inputs)
    whole = {tuple(ids) for ids in filled(*corpus.train.batch(torch.arange(211))).tolist()}
    assert len(whole) == 211
    assert not whole & {tuple(ids) for ids in filled(*corpus.test.batch(torch.arange(53))).tolist()}
    assert corpus.image_shape == (16,)
    assert corpus.num_classes == 400
    assert len(set(corpus.train.labels.tolist())) == len(corpus.classes) == 8


def test_fifteen_percent_of_the_words_of_each_sentence_are_masked_and_stand_in_the_labels(corpus):
    inputs, labels = corpus.train.batch(torch.arange(211))
    sentences = filled(inputs, labels)
    assert not (sentences == UNK).any()
    assert torch.equal(inputs == MASK, labels != IGNORED)
    for words, hidden in zip(is_word(sentences).sum(1).tolist(), (labels != IGNORED).sum(1).tolist(), strict=True):
        assert 8 <= words <= 14
        assert hidden == max(1, round(0.15 * words))
    assert (sentences[:, 0] == CLS).all()
    assert ((sentences == SEP).sum(1) == 1).all()
    assert is_word(sentences)[labels != IGNORED].all()


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    setup = setup_of(
        compose(["data=text", "data.train_size=60", "data.test_size=10", "model=bert_tiny", "federation.batch_size=3"])
    )
    inputs, labels = setup.truth(2, 1)
    index = setup.protocol.batches(setup.shards[1], setup.seed, 2, 1)[0]
    assert inputs.shape == labels.shape == (3, 16)
    assert torch.equal(inputs, setup.dataset.train.inputs[index])
    assert torch.equal(labels, setup.truth(2, 1)[1])


def test_a_sentence_that_differs_in_what_is_not_kept_of_it_is_in_one_split(tmp_path):
    path, animals = tmp_path / "own.txt", ("cat", "dog", "owl", "fox", "hen", "cow", "ant", "bee", "elk", "emu")
    long = " ".join(["the", *["very"] * 13])
    lines = [line for name in animals for line in (f"The {name} ate .", f"the {name} ate .", f"THE {name} ate .")]
    path.write_text("\n".join([*lines, f"{long} big", f"{long} small"]))
    made = load("text", path)
    assert len(made.train) + len(made.test) == 11
    train, test = (
        {tuple(ids) for ids in filled(*part.batch(torch.arange(len(part)))).tolist()} for part in (made.train, made.test)
    )
    assert not train & test


def test_encoding_is_undone_by_decoding():
    vocabulary = Vocabulary((*SPECIAL, *grammar.words()))
    ids = vocabulary.encode(DEMO)
    assert [vocabulary.decode(row) for row in ids] == list(DEMO)
    # 19 words do not fit between [CLS] and [SEP] of 7; a word that is not known has no text of its own.
    short = vocabulary.encode(["The nurse, so " + "again " * 14 + "!", "xylophone"], 7)
    assert vocabulary.decode(short[0]) == "the nurse , so again"
    assert short[1].tolist() == [CLS, UNK, SEP, PAD, PAD, PAD, PAD]


def test_a_file_of_ones_own_is_a_corpus(tmp_path):
    path = tmp_path / "diary.txt"
    lines = [f"Day {i}: the owl came, and it was late." for i in range(20)]
    path.write_text("\n\n".join([*lines, lines[0]]))
    made = load("text", path)
    assert (len(made.train), len(made.test)) == (18, 2)  # a tenth of 20 different lines
    assert made.classes == ("diary",)
    # day : the owl came , and it was late . are in all; the 18 numbers are the other words.
    assert made.num_classes == len(SPECIAL) + 11 + 18
    assert made.vocabulary.tokens[len(SPECIAL)] == ","
    sentences = filled(*made.train.batch(torch.arange(18)))
    assert {made.vocabulary.decode(ids) for ids in sentences} <= {
        line.lower().replace(":", " :").replace(",", " ,").replace(".", " .") for line in lines
    }
    assert (filled(*made.test.batch(torch.arange(2))) == UNK).sum() == 2  # numbers that training does not know
    assert len(load("text", path, train_size=5, test_size=3).test) == 3
    with pytest.raises(ValueError, match=r"20 different sentences.*data\.train_size=19 and data\.test_size=3"):
        load("text", path, train_size=19, test_size=3)
    with pytest.raises(ValueError, match="no text file at"):
        check_config(compose(["data=text", f"data.root={tmp_path / 'none.txt'}", "model=bert_tiny", "attack=dager"]))


def test_sentences_are_checked_where_they_enter():
    ids = torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets must be int64 \(3, 5\)"):
        Sentences(ids, ids[:2], ids[:, 0])
    with pytest.raises(ValueError, match=r"labels must be int64 \(3,\)"):
        Sentences(ids, ids, ids[:2, 0])
    with pytest.raises(ValueError, match=r"begins with \[PAD\]"):
        Vocabulary(("owl",))


# Model and training --------------------------------------------------------------------------------------------------------------


def tiny(seed=0, **changes):
    return bert_tiny((7,), 23, **({"width": 12, "heads": 3, "hidden": 10, "rng": generator(seed)} | changes))


def test_embeddings_may_be_given_in_place_of_tokens():
    model = tiny()
    ids = torch.randint(23, (3, 7), generator=generator(0, "ids"))
    assert model(ids).shape == (3, 7, 23)
    assert torch.equal(model(ids), model(model.stem.tokens(ids)))


def test_every_position_attends_to_every_other():
    model = tiny()
    embedded = torch.randn(1, 7, 12, generator=generator(0), requires_grad=True)
    for position in range(7):
        (slope,) = torch.autograd.grad(model(embedded)[0, position].sum(), embedded)
        assert (slope[0].abs().amax(1) > 0).all()


def test_the_attention_is_pytorch_s():
    attention = tiny().blocks[0].attention
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in (attention.query, attention.key, attention.value)]))
        theirs.out_proj.weight.copy_(attention.out.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.bias.zero_()
    x = torch.randn(2, 7, 12, generator=generator(0))
    torch.testing.assert_close(attention(x), theirs(x, x, x)[0])


def test_gradients_of_several_berts_are_one_program():
    nets = [tiny(i) for i in range(2)]
    rng = generator(0)
    ids, labels = torch.randint(23, (2, 3, 7), generator=rng), torch.randint(23, (2, 3, 7), generator=rng)
    labels[:, :, 2:5] = IGNORED

    def loss(params, x, y):
        return loss_of(functional_call(nets[0], params, (x,)), y)

    stacked = {key: torch.stack([split(net)[0][key] for net in nets]) for key in split(nets[0])[0]}
    together = vmap(grad(loss))(stacked, ids, labels)
    for i, net in enumerate(nets):
        alone = torch.autograd.grad(loss_of(net(ids[i]), labels[i]), list(net.parameters()))
        for (key, _), expected in zip(net.named_parameters(), alone, strict=True):
            torch.testing.assert_close(together[key][i], expected, rtol=1e-3, atol=1e-5)


def test_a_bert_is_differentiable_twice():
    model = tiny(width=6, heads=2, hidden=5).double()
    weight = model.blocks[0].attention.query.weight
    embedded = torch.randn(1, 7, 6, generator=generator(0), dtype=torch.float64, requires_grad=True)
    labels = torch.full((1, 7), IGNORED)
    labels[0, 3] = 11

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(loss_of(model(x), labels), weight, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (embedded,))


def test_normal_weights_have_their_deviation_and_biases_are_zero():
    model = bert_tiny((16,), 400, init=Normal(0.125))
    for layer in (model.stem.tokens, model.head, model.blocks[1].feed[0]):
        # The deviation of an estimate from 16,384 draws or more is below 0.6 % of it.
        assert float(layer.weight.detach().std()) == pytest.approx(0.125, rel=0.02)
    assert not model.head.bias.any()
    assert (model.stem.norm.weight == 1).all()
    with pytest.raises(ValueError, match="std must be a number > 0, got 0"):
        Normal(0)


def test_a_language_model_says_that_it_takes_no_images_and_the_others_that_they_take_no_text():
    with pytest.raises(ValueError, match=r"sequences of shape \(L,\), got \(3, 32, 32\): choose data=text"):
        check_config(compose(["model=bert_tiny"]))
    with pytest.raises(ValueError, match=r"got \(16,\); text takes model=bert_tiny"):
        check_config(compose(["data=text", "attack=dager"]))
    with pytest.raises(ValueError, match="multiple of heads=4, got 63"):
        bert_tiny((16,), 400, width=63)


def test_the_loss_is_the_mean_over_masked_tokens():
    logits = torch.randn(2, 5, 11, generator=generator(0))
    labels = torch.full((2, 5), IGNORED)
    labels[0, 1], labels[0, 4], labels[1, 2] = 3, 7, 3
    places = ([0, 0, 1], [1, 4, 2], [3, 7, 3])
    expected = -logits.log_softmax(-1)[places].mean()
    torch.testing.assert_close(loss_of(logits, labels), expected)
    weights = torch.zeros(2, 5, 11)
    weights[places] = 0.25  # weights count by their share of the sum
    torch.testing.assert_close(loss_of(logits, weights), expected)
    assert float(loss_of(torch.zeros(2, 5, 11), labels)) == pytest.approx(math.log(11))


def test_accuracy_counts_masked_tokens_only():
    class Says(torch.nn.Module):
        def forward(self, ids):
            return torch.nn.functional.one_hot(ids, 9).float()

    labels = torch.tensor([[IGNORED, 2, 3], [5, IGNORED, IGNORED]])
    accuracy, loss = evaluate(Says(), {}, {}, [(torch.tensor([[1, 2, 4], [5, 6, 7]]), labels)])
    assert accuracy == 2 / 3
    # Logits are 1 for the said word and 0 for the other eight.
    assert loss == pytest.approx(math.log(math.e + 8) - 2 / 3)


def test_a_federation_learns_more_than_how_often_words_occur():
    fedsgd = {"_target_": "fedsim.protocols.FedSGD", "clients": 3, "per_round": 3, "batch_size": 16}
    adam = {"_target_": "flwr.serverapp.strategy.FedAdam", "eta": 0.005, "tau": 1e-5}
    data = {"name": "text", "train_size": 1500, "test_size": 300}
    model = {"_target_": "fedsim.models.bert_tiny"}
    made = config(data=data, model=model, federation=fedsgd, strategy=adam)
    left = federate(made, rounds=45, choose=lambda *_: [], evaluation=Evaluation(every=45))
    first, last = left.reports[0], left.reports[-1]
    hidden = setup_of(made).dataset.test.targets
    counts = torch.bincount(hidden[hidden != IGNORED])
    assert first.accuracy < 0.02  # one of 400
    assert last.accuracy > 1.3 * float(counts.max() / counts.sum())
    assert last.loss < first.loss - 1.5


# What one gradient tells ---------------------------------------------------------------------------------------------------------


def test_the_tokens_of_any_batch_stand_in_the_embedding_s_gradient(corpus):
    model, seen, batches = victims(corpus, [1] * 20 + [2, 3, 5, 11])
    embedding = embedding_of(model, WORDS)
    assert embedding == "stem.tokens.weight"
    for one, (inputs, labels) in zip(seen, batches, strict=True):
        assert torch.equal(input_tokens(one.update, embedding), inputs.unique())
        assert torch.equal(hidden_words(one.update, KNOWN, embedding, len(inputs)), labels[labels != IGNORED].sort().values)
    found = BagOfTokens()(seen, KNOWN, model, generator(0))
    for one, (inputs, labels) in zip(found, batches, strict=True):
        named, true = one.images[one.images != PAD], filled(inputs, labels).unique()
        assert torch.equal(named, true[true != PAD])
        assert one.converged
        assert one.images.shape == inputs.shape


def test_weight_decay_adds_no_word(corpus):
    model, seen, batches = victims(corpus, [2])
    (inputs, labels), embedding = batches[0], embedding_of(model, WORDS)
    update = local_update(model, seen[0].params, {}, batches, lr=0.1, weight_decay=1e-2).update
    one, known = replace(seen[0], packets=pack(update)), replace(KNOWN, lr=0.1, weight_decay=1e-2)
    assert torch.equal(input_tokens(gradient_of(one, known), embedding, decayed=True), inputs.unique())
    (found,) = BagOfTokens()([one], known, model, generator(0))
    true = filled(inputs, labels).unique()
    assert found.converged
    assert torch.equal(found.images[found.images != PAD], true[true != PAD])


def test_a_noised_embedding_names_everything_and_is_said_not_to_have_converged(corpus):
    model, seen, _ = victims(corpus, [2])
    (one,) = BagOfTokens()([noised(seen[0], 1e-3)], KNOWN, model, generator(0))
    assert not one.converged
    assert one.images.shape == (2, LENGTH)


def test_a_model_without_an_embedding_has_no_words():
    with pytest.raises(ValueError, match="Linear has no embedding of 400 tokens"):
        BagOfTokens()([], KNOWN, torch.nn.Linear(2, 3), generator(0))


# Matching ------------------------------------------------------------------------------------------------------------------------


def test_the_true_embeddings_explain_the_update(corpus):
    model, seen, batches = victims(corpus, [3])
    attack = TextMatching(gap=SquaredGap(), labels="given")
    (inputs, labels), params = batches[0], seen[0].params
    victim = _Victim(0, seen[0], seen[0].update, labels, generator(0))
    group = _Problems.of([victim], (3, LENGTH), WORDS, model, "stem.tokens.weight", attack)
    truth = params["stem.tokens.weight"][inputs].reshape(1, -1)
    first = torch.zeros(1, dtype=torch.int64)
    loss, slope = group.evaluate(truth, first)
    assert float(loss) < 1e-10
    assert float(slope.abs().max()) < 1e-5
    found, said = group.decoded(truth, first)
    assert torch.equal(found[0], inputs)
    assert torch.equal(said[0], labels)
    # The same point twice as far away explains less.
    assert float(group.evaluate(truth + 0.01, first)[0]) < float(group.evaluate(truth + 0.02, first)[0])


def test_words_are_settled_where_they_lean_to(corpus):
    model, seen, batches = victims(corpus, [1])
    (_, labels) = batches[0]
    words = labels[labels != IGNORED]
    victim = _Victim(0, seen[0], seen[0].update, words, generator(0))
    group = _Problems.of([victim], (1, LENGTH), WORDS, model, "stem.tokens.weight", TextMatching())
    point = torch.zeros(1, group.unknowns)
    leanings = point[:, group.size :].view(1, len(words), LENGTH)
    for word, place in enumerate((labels[0] != IGNORED).nonzero().squeeze(1)):
        leanings[0, word, place] = 3.0
    weights = group.weights(point, torch.zeros(1, dtype=torch.int64))
    assert float(weights.sum()) == pytest.approx(len(words))  # each word is there once
    group.decide(point)
    assert torch.equal(group.told[0], labels)


def test_told_labels_and_cosine_give_the_sentence_away(corpus):
    model, seen, batches = victims(corpus, [1, 1, 1])
    known = replace(KNOWN, labels=[labels for _, labels in batches])
    attack = replace(attacks.dlg_text(iterations=300, told=True), moments=(0, 100, 299))
    found = attack(seen, known, model, generator(0, "told"))
    right = [metrics.token_accuracy(filled(o.images, o.labels), filled(*b)).item() for o, b in zip(found, batches, strict=True)]
    assert sum(right) / 3 >= 0.8
    # A wrong [PAD] is no wrong word, but a token that does not reproduce the update.
    assert [one.converged for one in found] == [torch.equal(o.images, b[0]) for o, b in zip(found, batches, strict=True)]
    trace = found[0].trace
    assert trace.evaluations.tolist() == [0, 100, 299]
    assert (trace.losses.diff() < 0).all()
    assert trace.images.shape == (3, 1, LENGTH)
    lines = iteration_table(trace, corpus.vocabulary, filled(*batches[0])[0]).splitlines()
    assert len(lines) == 2 + 3 + 1
    assert corpus.vocabulary.decode(filled(*batches[0])[0]) in lines[-1]
    assert lines[2].startswith("| 0 |")


def test_a_search_has_converged_if_its_words_reproduce_what_was_not_matched(corpus):
    model, seen, batches = victims(corpus, [1])
    inputs, labels = batches[0]
    victim = _Victim(0, seen[0], seen[0].update, labels, generator(0))
    group = _Problems.of([victim], (1, LENGTH), WORDS, model, "stem.tokens.weight", TextMatching(labels="given"))
    assert group.unexplained(inputs, labels, 0) < 1e-5
    words = is_word(inputs[0]).nonzero().squeeze(1).tolist()
    for place in (place for place in words if inputs[0, place] != MASK):
        wrong = inputs.clone()
        wrong[0, place] = (wrong[0, place] + 1) % WORDS
        assert group.unexplained(wrong, labels, 0) > 5 * TextMatching().tolerance


def test_absolute_differences_weigh_less_towards_the_last_tensor():
    zero = {"first": torch.zeros(1, 3), "last": torch.zeros(1, 2)}
    ones = {"first": torch.ones(1, 3), "last": torch.ones(1, 2)}
    # Squares 3 + 2, absolute differences 3 and 2, weighed 0.1 and 0.1 / 2.
    gap = SquaredAndAbsoluteGap(0.1)
    assert float(gap(zero, ones)) == pytest.approx(5 + 0.3 + 0.1)
    assert float(gap.unit(ones)) == pytest.approx(5.4)
    assert float(gap(ones, ones)) == 0


def test_adam_s_rate_falls_linearly_to_zero():
    optimizer = Adam(5, rate=1.0, signed=True, decay="linear")
    state = optimizer.start(torch.zeros(1, 1))
    moves = []
    for _ in range(5):
        before = state.trial.clone()
        optimizer.step(state, torch.ones(1), torch.ones(1, 1))
        moves.append(float(before - state.trial))
    # Constant signs leave both moments at 1: each move is the rate itself.
    assert moves == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], rel=1e-4)


# The span ------------------------------------------------------------------------------------------------------------------------


def test_one_sentence_is_read_exactly(corpus):
    model, seen, batches = victims(corpus, [1] * 20)
    for one, (inputs, labels) in zip(attacks.dager()(seen, KNOWN, model, generator(0)), batches, strict=True):
        assert one.converged
        assert torch.equal(one.images, inputs)
        assert torch.equal(one.labels, labels)


@pytest.mark.parametrize(("size", "width"), [(2, 64), (3, 64)])
def test_the_sentences_of_a_batch_are_read_exactly_up_to_their_order(corpus, size, width):
    model, seen, batches = victims(corpus, [size, size], width)
    for one, (inputs, labels) in zip(attacks.dager()(seen, KNOWN, model, generator(0)), batches, strict=True):
        assert one.converged
        assert sorted(zip(one.images.tolist(), one.labels.tolist(), strict=True)) == sorted(
            zip(inputs.tolist(), labels.tolist(), strict=True)
        )


def test_a_batch_of_more_tokens_than_dimensions_is_not_read(corpus):
    # 4 x 16 = 64 tokens span the 63 dimensions of normalised inputs of width 64.
    model, seen, _ = victims(corpus, [4])
    (one,) = SpanCheck(searches=1, sweeps=1)(seen, KNOWN, model, generator(0))
    assert one.images.shape == (4, LENGTH)
    assert not one.converged


def test_noise_hides_the_span(corpus):
    model, seen, _ = victims(corpus, [1])
    (one,) = attacks.dager()([noised(seen[0], 1e-3)], KNOWN, model, generator(0))
    assert not one.converged


# What all keep -------------------------------------------------------------------------------------------------------------------

ATTACKS = [
    BagOfTokens(),
    attacks.dlg_text(restarts=2, iterations=4),
    attacks.dlg_text(gap="squared", restarts=2, iterations=4),
    attacks.tag(restarts=2, iterations=4),
    attacks.dager(starts=3),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_every_attack_on_text_keeps_the_contract(attack, corpus):
    assert isinstance(attack, Attack)
    assert attack.reads == "text"
    model, seen, _ = victims(corpus, [1, 2, 1])
    before = [{n: t.clone() for n, t in one.params.items()} | {f"u/{n}": t.clone() for n, t in one.update.items()} for one in seen]
    state = torch.get_rng_state()
    calls = []
    found = attack(seen, KNOWN, model, generator(0, "contract"), report=lambda *call: calls.append(call))
    assert torch.equal(torch.get_rng_state(), state)
    assert calls[-1] == (3, 3)
    again = attack(seen[::-1], KNOWN, model, generator(0, "contract"))[::-1]
    for one, same, victim, saved in zip(found, again, seen, before, strict=True):
        assert one.images.shape == one.labels.shape == (victim.num_examples, LENGTH)
        assert one.images.dtype == one.labels.dtype == torch.int64
        assert one.starts.shape[1:] == one.images.shape
        assert one.losses.shape == (len(one.starts),)
        assert one.seconds > 0
        assert torch.equal(one.images, same.images)  # whoever else is attacked, in whatever order
        assert torch.equal(one.images == MASK, one.labels != IGNORED)
        assert int(one.images.min()) >= 0
        assert int(one.images.max()) < WORDS
        after = victim.params | {f"u/{n}": t for n, t in victim.update.items()}
        assert all(torch.equal(t, after[name]) for name, t in saved.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextMatching(restarts=0), "restarts must be >= 1, got 0"),
        (lambda: TextMatching(labels="told"), 'labels must be "joint" or "given", got \'told\''),
        (lambda: TextMatching(chunk=0), "chunk must be >= 1 or None, got 0"),
        (lambda: TextMatching(tolerance=0), "tolerance must be > 0"),
        (lambda: SpanCheck(rank=1), r"rank must lie in \(0, 1\), got 1"),
        (lambda: SpanCheck(starts=0), "starts must be >= 1, got 0"),
        (lambda: SquaredAndAbsoluteGap(-1), "alpha must be >= 0, got -1"),
        (lambda: attacks.dlg_text(gap="cosin"), "unknown gap 'cosin': did you mean 'cosine'"),
    ],
)
def test_settings_are_checked_where_they_enter(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_an_attack_is_not_told_it_asks_for(corpus):
    model, seen, _ = victims(corpus, [1])
    with pytest.raises(ValueError, match=r"known\.labels"):
        attacks.tag(told=True)(seen, KNOWN, model, generator(0))
    with pytest.raises(ValueError, match=r"known\.lr"):
        attacks.tag()(seen, replace(KNOWN, local_steps=3), model, generator(0))
    with pytest.raises(ValueError, match="Linear is no Bert"):
        attacks.dager()(seen, KNOWN, torch.nn.Linear(2, 3), generator(0))
    assert CosineGap().scale_free


# Scores --------------------------------------------------------------------------------------------------------------------------


def test_token_accuracy_counts_words_in_their_places():
    true = torch.tensor([[CLS, 10, 11, 12, SEP, PAD], [CLS, 10, 11, 12, 13, SEP]])
    guess = torch.tensor([[CLS, 10, 12, 11, SEP, PAD], [PAD, 10, 11, 12, 14, PAD]])
    assert metrics.token_accuracy(guess, true).tolist() == pytest.approx([1 / 3, 3 / 4])
    # Wherever they stand, 10, 11 and 12 were named and 13 was not.
    assert metrics.tokens_found(guess, true).tolist() == pytest.approx([1, 3 / 4])
    with pytest.raises(ValueError, match=r"\(N, L\)"):
        metrics.token_accuracy(guess[:1], true)


def test_sentences_are_matched_before_they_are_scored():
    true = torch.tensor([[CLS, 10, 11, SEP], [CLS, 12, 13, SEP], [CLS, 14, 15, SEP]])
    found, places = metrics.match_sentences(true[[2, 0]], true)
    assert dict(zip(found.tolist(), places.tolist(), strict=True)) == {0: 2, 1: 0}


def test_rouge_is_what_its_definition_says():
    scores = metrics.rouge("the cat sat on mat", "the cat on the mat")
    # Words in common: the, cat, on, mat of 5 and 5. Pairs: (the, cat) of 4 and 4. Longest in order: the cat on mat.
    assert scores == pytest.approx({"rouge1": 4 / 5, "rouge2": 1 / 4, "rougeL": 4 / 5})
    assert metrics.rouge("", "the cat") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


TEXT = ["data=text", "data.train_size=40", "data.test_size=10", "model=bert_tiny", "federation.clients=3", "federation.per_round=3"]


def test_a_copy_in_another_order_is_a_theft_of_every_sentence():
    setup = setup_of(compose([*TEXT, "federation.batch_size=3"]))
    inputs, labels = setup.truth(1, 2)
    params, _ = split(setup.model())
    update = local_update(setup.model(), params, {}, [(inputs, labels)], lr=1).update
    seen, order = Observation(params, pack(update), 3, 1, 2), torch.tensor([2, 0, 1])

    def rows_of(inputs, labels, converged=True):
        made = Reconstruction(inputs, labels, 0.5, converged, inputs[None], torch.tensor([0.5]), 7, 0.1)
        return scoring.leaks(setup, "copy", [seen], [made])

    rows = rows_of(inputs[order], labels[order])
    assert [row["verdict"] for row in rows] == ["stolen"] * 3
    for row in rows:
        assert row["token_accuracy"] == row["rouge1"] == row["rougeL"] == row["tokens_found"] == 1
        assert row["exact"]
        assert row["label_right"]
        assert row["truth"] == row["recovered"]
        assert row["update_error"] == 0
        assert row["typical_token_accuracy"] < 0.5
    assert {row["reconstruction"]: row["image"] for row in rows} == {0: 2, 1: 0, 2: 1}
    # Sentences whose masks were not filled lack 1 or 2 words of 8 to 14, and are not exact.
    blank = rows_of(inputs, torch.full_like(labels, IGNORED))
    assert not any(row["exact"] or row["label_right"] for row in blank)
    assert all("[MASK]" in row["recovered"] for row in blank)
    nothing = torch.full_like(inputs, UNK)
    for converged, verdict in ((True, "not stolen"), (False, "not converged")):
        assert {row["verdict"] for row in rows_of(nothing, torch.full_like(labels, IGNORED), converged)} == {verdict}


# Runs ----------------------------------------------------------------------------------------------------------------------------


def test_a_run_on_text_is_read_attacked_again_and_drawn(tmp_path, capsys):
    small = [*TEXT, "rounds=2", "device=cpu", "engine.workers=1", "tap.every=2", "tap.rounds=[]", "tap.clients=2", "attack=dager"]
    assert fedsim("run", *small, f"out={tmp_path}", "name=text") == 0
    folder = RunFolder.open(tmp_path / "text")
    leaks = folder.leaks()
    assert list(leaks["verdict"]) == ["stolen", "stolen"]
    assert list(leaks["truth"]) == list(leaks["recovered"])
    assert fedsim("attack", tmp_path / "text", "attack=tag", "attack.iterations=3", "attack.restarts=1") == 0
    assert fedsim("attack", tmp_path / "text", "attack=bag_of_tokens") == 0
    assert set(folder.leaks()["attack"]) == {"dager", "tag_restarts=1_iterations=3", "bag_of_tokens"}
    bag = folder.leaks().query("attack == 'bag_of_tokens'")
    assert (bag["tokens_found"] == 1).all()
    assert "words in place" in capsys.readouterr().out
    table = (tmp_path / "text" / "figures" / "stolen_dager.md").read_text()
    for sentence in leaks["truth"]:
        assert table.count(f"| {sentence} | {sentence} | 100% |") == 1
    assert {"leak_dager.png", "leak_tag_restarts=1_iterations=3.png", "partition.png", "accuracy.png"} <= {
        path.name for path in (tmp_path / "text" / "figures").iterdir()
    }
    assert fedsim("table", tmp_path / "text", "--format", "csv") == 0
    rows = {row["attack"] or row["defense"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert list(rows) == ["dager", "tag_restarts=1_iterations=3", "bag_of_tokens", "the usual words"]
    assert [rows["dager"][key] for key in ("victims", "stolen", "exact")] == ["2", "2", "2"]
    assert float(rows["dager"]["token_accuracy"]) == 1
    assert float(rows["bag_of_tokens"]["tokens_found"]) == 1
    assert float(rows["the usual words"]["token_accuracy"]) < 0.5
    assert fedsim("attack", tmp_path / "text", "attack=dlg") == 2
    assert "attack=dlg reconstructs images, but data=text is text" in capsys.readouterr().err


def test_attacks_and_data_must_be_of_one_kind():
    with pytest.raises(ValueError, match="attack=tag reconstructs text, but data=synthetic is images: take attack=dlg"):
        check_config(compose(["attack=tag"]))
    with pytest.raises(ValueError, match="attack=dlg reconstructs images, but data=text is text: take attack=tag"):
        check_config(compose(["data=text", "model=bert_tiny"]))
    check_config(compose(["setting=text"]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["attack=dager"], []),
        (["attack=dager", "federation.batch_size=2"], []),
        (["attack=dager", "federation.batch_size=3"], []),  # 48 tokens are three quarters of 64
        (["attack=dager", "federation.batch_size=3", "model.width=56"], ["weak"]),
        (["attack=dager", "federation.batch_size=5", "model.width=128"], ["weak"]),
        (["attack=dager", "federation.batch_size=4"], ["hopeless"]),
        (["attack=dager", "federation.batch_size=4", "model.width=128"], []),
        (["attack=tag", "federation.batch_size=2"], ["weak"]),
        (["attack=bag_of_tokens", "federation.batch_size=9"], []),
    ],
    ids=" ".join,
)
def test_the_card_says_when_the_span_is_full(overrides, expected):
    made = compose([*TEXT, *overrides])
    assert [grade for grade, _ in obstacles(setup_of(made), attack_of(made))] == expected


def test_several_local_steps_leave_the_words_of_all_their_sentences(corpus):
    model = bert_tiny((LENGTH,), WORDS, rng=generator(0, "init"))
    params, _ = split(model)
    batches = [corpus.train.batch(torch.arange(start, start + 5)) for start in (0, 5, 10)]
    update = local_update(model, params, {}, batches, lr=0.05).update
    seen = Observation(params, pack(update), 15)
    known = replace(KNOWN, batch_size=5, local_steps=3, lr=0.05)
    (one,) = BagOfTokens()([seen], known, model, generator(0))
    true = torch.cat([filled(*batch) for batch in batches])
    assert (metrics.tokens_found(one.images, true) == 1).all()


@pytest.mark.parametrize("attack", [attacks.dlg_text(iterations=2), SpanCheck(), BagOfTokens()], ids=lambda one: type(one).__name__)
def test_of_several_local_steps_every_sentence_is_answered_for(attack, corpus):
    model = bert_tiny((LENGTH,), WORDS, rng=generator(0, "init"))
    params, _ = split(model)
    batches = [corpus.train.batch(torch.arange(start, start + 2)) for start in (0, 2, 4)]
    seen = Observation(params, pack(local_update(model, params, {}, batches, lr=0.05).update), 6)
    (one,) = attack([seen], replace(KNOWN, batch_size=2, local_steps=3, lr=0.05), model, generator(0))
    assert len(one.images) == 6
