"""Local training is what `torch.optim.SGD` does to the module itself, and evaluation is the plain loop."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models import lenet, mcmahan_cnn, mlp, mlp_2nn
from fedsim.seeding import generator
from fedsim.training import Batch, batch_loss, evaluate, local_update, loss_of, split

SHAPE, CLASSES = (3, 11, 13), 7


def batches(*sizes: int, soft: bool = False) -> list[Batch]:
    rng = generator(0, "batches")
    made = []
    for size in sizes:
        images, labels = torch.rand(size, *SHAPE, generator=rng), torch.randint(CLASSES, (size,), generator=rng)
        made.append((images, F.one_hot(labels, CLASSES).float() * 0.9 + 0.1 / CLASSES if soft else labels))
    return made


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [lenet, mlp_2nn, mcmahan_cnn], ids=lambda build: build.__name__)
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_one_step_at_rate_one_is_the_gradient(build, soft):
    model, (batch,) = build(SHAPE, CLASSES), batches(5, soft=soft)
    trained = local_update(model, *split(model), [batch], lr=1.0)
    expected = gradient_of(model, *batch)
    assert list(trained.update) == list(expected)
    # w - (w - g) in float32 is g to half a unit in the last place of w; |w| < 1 here.
    for name, gradient in expected.items():
        assert torch.allclose(trained.update[name], gradient, rtol=0, atol=2**-23)
    assert trained.loss == pytest.approx(F.cross_entropy(model(batch[0]), batch[1]).item(), abs=1e-6)


SGD = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.01},
    {"momentum": 0.5, "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", SGD, ids=str)
def test_local_steps_are_those_of_torch_s_sgd(settings):
    model, steps = mlp_2nn(SHAPE, CLASSES), batches(5, 5, 3, 2)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, **settings)
    losses = []
    for images, labels in steps:
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    params, buffers = split(model)
    trained = local_update(model, params, buffers, steps, lr=0.1, **settings)
    for name, after in reference.named_parameters():
        assert torch.allclose(params[name] - trained.update[name], after, rtol=0, atol=1e-6), name
    assert trained.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_the_proximal_term_pulls_back_to_where_training_began():
    model, steps = mlp_2nn(SHAPE, CLASSES), batches(5, 5, 3)
    reference, start = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for images, labels in steps:
        optimizer.zero_grad()
        # Li et al. 2020, equation 2
        away = sum((p - q.detach()).square().sum() for p, q in zip(reference.parameters(), start.parameters(), strict=True))
        (F.cross_entropy(reference(images), labels) + 0.7 / 2 * away).backward()
        optimizer.step()
    params, buffers = split(model)
    trained = local_update(model, params, buffers, steps, lr=0.1, proximal=0.7)
    for name, after in reference.named_parameters():
        assert torch.allclose(params[name] - trained.update[name], after, rtol=0, atol=1e-6), name
    # It is no decay: a single step starts where it is pulled to.
    one = local_update(model, params, buffers, steps[:1], lr=0.1, proximal=0.7).update
    none = local_update(model, params, buffers, steps[:1], lr=0.1).update
    assert all(torch.equal(one[name], none[name]) for name in one)


def normed() -> nn.Module:
    """A convolution with BatchNorm: 3 statistics, one of them int64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9 * 11, CLASSES))


def test_batchnorm_statistics_are_those_of_torch_s_training_mode():
    model, steps = normed().train(), batches(5, 3)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for images, labels in steps:
        optimizer.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        optimizer.step()
    params, buffers = split(model)
    before = {name: t.clone() for name, t in buffers.items()}
    trained = local_update(model, params, buffers, steps, lr=0.1)
    for name, expected in reference.named_buffers():
        assert trained.buffers[name].dtype == expected.dtype
        assert torch.allclose(trained.buffers[name], expected, atol=1e-6), name
        assert torch.equal(buffers[name], before[name]), "the broadcast statistics are the server's"
    assert int(trained.buffers["1.num_batches_tracked"]) == 2


def test_batchnorm_in_eval_mode_keeps_its_statistics():
    model = normed().eval()
    params, buffers = split(model)
    trained = local_update(model, params, buffers, batches(5, 3), lr=0.1)
    assert all(torch.equal(trained.buffers[name], buffers[name]) for name in buffers)
    assert not model.training


def test_training_neither_reads_nor_writes_the_model_s_own_weights():
    model, other = mlp_2nn(SHAPE, CLASSES), mlp_2nn(SHAPE, CLASSES, rng=generator(1, "other"))
    before = copy.deepcopy(model.state_dict())
    params, buffers = split(other)
    kept = {name: t.clone() for name, t in params.items()}
    trained = local_update(model, params, buffers, batches(5, 3), lr=0.1)
    expected = local_update(other, params, buffers, batches(5, 3), lr=0.1)
    assert all(torch.equal(trained.update[name], expected.update[name]) for name in params)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(params[name], kept[name]) for name in params)
    assert all(p.grad is None for p in model.parameters())
    assert not any(t.requires_grad for t in trained.update.values())


def test_no_batch_is_an_error():
    model = mlp_2nn(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="needs at least one batch"):
        local_update(model, *split(model), [], lr=0.1)


def test_the_loss_of_a_batch_is_differentiable_in_its_images():
    model, ((images, labels),) = lenet(SHAPE, CLASSES), batches(5)
    params, buffers = split(model)
    images.requires_grad_()
    params = {name: t.requires_grad_() for name, t in params.items()}
    gradients = torch.autograd.grad(batch_loss(model, params, buffers, images, labels), list(params.values()), create_graph=True)
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in gradients), images)
    assert second.abs().max() > 0


# Evaluation -----------------------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_plain_loop():
    model, parts = normed().train(), batches(5, 3, 2)
    params, buffers = split(model)
    buffers["1.running_mean"] += 0.3
    reference = copy.deepcopy(model).eval()
    reference.load_state_dict({**params, **buffers})
    right = loss = 0.0
    for images, labels in parts:
        for image, label in zip(images, labels, strict=True):
            logits = reference(image[None])[0]
            right += int(logits.argmax()) == int(label)
            loss -= logits.log_softmax(0)[label].item()
    accuracy, mean = evaluate(model, params, buffers, parts)
    # Batches of 5, 3 and 2 images: each image counts the same.
    assert accuracy == pytest.approx(right / 10)
    assert mean == pytest.approx(loss / 10, abs=1e-5)
    assert model.training, "the model's mode is as it was"


def test_an_evaluation_that_breaks_off_leaves_the_model_in_its_mode():
    model = lenet((3, 32, 32), 10).train()
    with pytest.raises(RuntimeError):
        evaluate(model, *split(model), [(torch.rand(2, 3, 5, 5, 5), torch.tensor([0, 1]))])
    assert model.training


def test_evaluating_on_nothing_is_an_error():
    model = mlp_2nn(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, *split(model), [])


# Models with a penalty ------------------------------------------------------------------------------------------------------------


class Penalized(nn.Module):
    """Logits, and the sum of squares of the first layer as a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(SHAPE, CLASSES, hidden=(5,))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(images), next(self.inner.parameters()).square().sum()


def test_a_model_s_penalty_is_part_of_its_loss_and_gradient():
    model, ((images, labels),) = Penalized(), batches(5)
    params, buffers = split(model)
    with_penalty = local_update(model, params, buffers, [(images, labels)], lr=1.0)
    without = local_update(model.inner, *split(model.inner), [(images, labels)], lr=1.0)
    first, *others = params
    # The gradient of |w|^2 is 2 w.
    expected = without.update[first.removeprefix("inner.")] + 2 * params[first]
    assert torch.allclose(with_penalty.update[first], expected, rtol=0, atol=1e-6)
    for name in others:
        assert torch.equal(with_penalty.update[name], without.update[name.removeprefix("inner.")])
    assert float(with_penalty.loss) == pytest.approx(float(without.loss) + float(params[first].square().sum()), abs=1e-5)


def test_a_model_s_penalty_is_no_part_of_its_test_loss():
    model, parts = Penalized(), batches(5, 3)
    assert evaluate(model, *split(model), parts) == evaluate(model.inner, *split(model.inner), parts)


def test_the_loss_of_equal_logits_is_the_logarithm_of_the_number_of_classes():
    labels = torch.tensor([0, 3, 6])
    assert float(loss_of(torch.zeros(3, CLASSES), labels)) == pytest.approx(math.log(CLASSES))
    assert float(loss_of((torch.zeros(3, CLASSES), torch.tensor(0.5)), labels)) == pytest.approx(math.log(CLASSES) + 0.5)
