"""The papers' attacks, as settings of their parts. Each says who the attacker is and where it departs from its paper."""

from dataclasses import replace
from typing import Literal

from attacks.analytic import Analytic
from attacks.escalation import Escalation, Where
from attacks.gan import ClassGAN
from attacks.generative import Autoencoder, GenerativePrior, PrincipalComponents
from attacks.matching import GradientMatching
from attacks.optimizers import LBFGS, Adam, Stop
from attacks.rgap import RGAP
from attacks.spear import SPEAR
from attacks.terms import CosineGap, Gap, GaussianGap, OutOfRange, SquaredAndAbsoluteGap, SquaredGap, SquaredPixels, TotalVariation
from attacks.text import SpanCheck, TextMatching
from fedsim.checks import one_of

# Half the squared distance of two directions that float32 cannot tell apart. On ResNet-18 with sigmoids noise in the place of an
# image leaves 1e-13 to 5e-12; the smallest gap that a search on the McMahan CNN comes down to is 2e-9.
ROUNDING = 1e-11


def dlg(
    restarts: int = 1,
    evaluations: int = 4000,
    in_range: float = 0.01,
    tv: float = 0.0,
    update: Literal["joint", "round_robin"] = "joint",
    record: int = 0,
) -> GradientMatching:
    """Deep Leakage from Gradients (Zhu, Liu & Han 2019): images and soft labels that reproduce the gradient, from N(0, 1) noise.

    Threat model: sees one client's gradient and the parameters it was computed at; is told no label, and knows that pixels lie
    in [0, 1].

    Departures: a line search for each problem, where the published script has none and may diverge; a penalty for pixels outside
    [0, 1], which moves no solution and saves evaluations (`in_range=0` takes it away); restarts chosen by matching loss; a budget
    counted in gradient evaluations (the paper's 300 outer steps are up to 6,000 of them). `tv` weighs total variation, of which the
    paper has none; batches of two and more need 1e-3 of it, and then the loss does not vanish.

    Expect, on CIFAR-10 with a random LeNet (weights and biases U(-0.5, 0.5)), what `benchmarks/dlg.py` prints: see
    `benchmarks/RESULTS.md`.
    """
    return replace(_dlg("joint", restarts, evaluations, in_range, tv), update=update, record=record)


def idlg(
    restarts: int = 1,
    evaluations: int = 4000,
    in_range: float = 0.01,
    tv: float = 0.0,
    update: Literal["joint", "round_robin"] = "joint",
    record: int = 0,
) -> GradientMatching:
    """Improved DLG (Zhao, Mopuri & Bilen 2020): as `dlg`, with the label read off the gradient first.

    Threat model: as `dlg`. The label is exact at batch size 1 and a good guess for batches, see `attacks.labels`.
    Departures: as `dlg`.
    """
    return replace(_dlg("analytic", restarts, evaluations, in_range, tv), update=update, record=record)


def sapag(restarts: int = 1, evaluations: int = 4000, in_range: float = 0.01, tv: float = 0.0, record: int = 0) -> GradientMatching:
    """SAPAG (Wang et al. 2020): as `idlg`, with every tensor's difference in units of that tensor, through a Gaussian kernel.

    For networks whose last layers have gradients so large that those of the first, which alone see the image, do not show in a
    sum of squares: a deep network with sigmoids.

    Threat model: as `dlg`. Departures: as `dlg`; the kernel is as wide as the observed tensor's norm.
    """
    # Most tensors hardly depend on the image, and their share of the unit is never far off.
    return replace(_dlg("analytic", restarts, evaluations, in_range, tv), gap=GaussianGap(), tolerance=1e-6, record=record)


def _dlg(labels: Literal["joint", "analytic"], restarts: int, evaluations: int, in_range: float, tv: float) -> GradientMatching:
    return GradientMatching(
        gap=SquaredGap(),
        priors=((OutOfRange(in_range),) if in_range else ()) + ((TotalVariation(tv),) if tv else ()),
        labels=labels,
        optimizer=LBFGS(evaluations),
        restarts=restarts,
        init="normal",
        stop=Stop(threshold=1e-7),
    )


def inverting_gradients(
    restarts: int = 1, iterations: int = 24_000, rate: float = 0.1, tv: float = 1e-4, told: bool = False, record: int = 0
) -> GradientMatching:
    """Inverting Gradients (Geiping et al. 2020): cosine gap, total variation, signed Adam in the box [0, 1].

    Threat model: as `dlg`; with `told`, knows the labels as in the paper's image experiments, else reads them off the gradient.
    Departures: images and box are [0, 1] rather than normalised, so `rate` counts in pixels. `tv` weighs mean absolute
    differences; it keeps the gap from vanishing, hence the larger tolerance than the default.
    """
    return GradientMatching(
        gap=CosineGap(),
        priors=(TotalVariation(tv),),
        labels="given" if told else "analytic",
        optimizer=Adam(iterations, rate=rate, signed=True),
        restarts=restarts,
        box=True,
        tolerance=1e-4,
        record=record,
    )


def cosine_lbfgs(restarts: int = 1, evaluations: int = 2000, tv: float = 1e-3, record: int = 0) -> GradientMatching:
    """Cosine gap and total variation by L-BFGS from a grey image: no paper's attack, made for smooth networks that learn.

    Threat model: as `dlg`; the label is read off the gradient. A grey start lies nearer to photographs than N(0, 1); the cosine
    does not mind how small a trained network's gradient is.

    A search that found the image ends with a gap near 1e-5, one that was caught elsewhere at 1e-3 and above, hence the tolerance.
    """
    return GradientMatching(
        gap=CosineGap(),
        priors=(TotalVariation(tv),),
        labels="analytic",
        optimizer=LBFGS(evaluations),
        restarts=restarts,
        init="grey",
        tolerance=1e-4,
        record=record,
    )


def cosine_adam(
    restarts: int = 1,
    iterations: int = 500,
    rate: float = 0.1,
    tv: float = 0.0,
    told: bool = False,
    skip_zero: bool = False,
    record: int = 0,
    gap: Literal["cosine", "squared"] = "cosine",
) -> GradientMatching:
    """Cosine gap by plain Adam from N(0, 1): what the IP Paris study of weight initializations ran, 500 iterations at rate 0.1.

    Threat model: as `dlg`; the study tells the attacker the labels (`told`), here they are read off the gradient unless asked.
    The study also tried squared differences, another `gap`.
    Departures: the study's total variation went into the loss before it was differentiated by the weights, where it has no
    effect; `tv` acts on the images, and is 0. A search ends where float32 cannot tell its gap from none: on a ResNet with sigmoids
    that is where it begins.
    """
    return GradientMatching(
        gap=CosineGap(skip_zero) if one_of("gap", gap, ("cosine", "squared")) == "cosine" else SquaredGap(),
        priors=(TotalVariation(tv),) if tv else (),
        labels="given" if told else "analytic",
        optimizer=Adam(iterations, rate=rate, decay="none"),
        restarts=restarts,
        tolerance=1e-4,
        stop=Stop(threshold=ROUNDING),
        record=record,
    )


def gradinversion(
    restarts: int = 4,
    iterations: int = 2000,
    rate: float = 0.1,
    tv: float = 1e-4,
    squared_pixels: float = 1e-6,
    batch_norm: float = 1e-3,
    consistency: float = 1e-3,
    record: int = 0,
) -> GradientMatching:
    """GradInversion (Yin et al. 2021) for batches: squared gap, total variation, l2, BatchNorm statistics, agreement of the starts.

    Threat model: as `dlg`; labels are read off the gradient; BatchNorm statistics are those of the client's batch, which follow
    from what it sends back if it trains in training mode, else those broadcast. `batch_norm=0` for a model without.
    Departures: starts agree on their plain mean, without registration; labels of a batch are counted as in `attacks.labels`, so
    they may repeat; Adam with a cosine schedule and no added noise. Weights are ours, since gaps here are counted in units.
    """
    return GradientMatching(
        gap=SquaredGap(),
        priors=(TotalVariation(tv), SquaredPixels(squared_pixels)),
        labels="analytic",
        optimizer=Adam(iterations, rate=rate, decay="cosine"),
        restarts=restarts,
        batch_norm=batch_norm,
        consistency=consistency,
        stop=Stop(),
        tolerance=1e-3,
        record=record,
    )


def precode_naive(
    restarts: int = 1, iterations: int = 7000, rate: float = 0.01, tv: float = 1e-6, told: bool = False, record: int = 0
) -> GradientMatching:
    """The attack that PRECODE was tested with (Scheliga et al. 2022): Inverting Gradients by somebody who does not know of it.

    Threat model: as `inverting_gradients`; the paper's attacker is `told` the labels. Draws the bottleneck's noise anew at each
    evaluation, and does not know that the clients' loss holds a penalty: what it cannot steal says nothing about who knows
    (`precode_ignore`, `precode_aware`).
    """
    return replace(inverting_gradients(restarts, iterations, rate, tv, told, record), penalty=False)


def precode_ignore(
    restarts: int = 1, iterations: int = 2000, rate: float = 0.1, tv: float = 1e-3, told: bool = False, record: int = 0
) -> GradientMatching:
    """Inverting Gradients without the gradients from a bottleneck on (Scheliga et al. 2022, arXiv:2208.04767).

    Threat model: as `inverting_gradients`, and knows where the model draws. The gradients in front of the bottleneck depend on its
    noise too, through what is propagated back, so that the gap keeps a floor and a search that got there need not have `converged`.
    """
    return replace(inverting_gradients(restarts, iterations, rate, tv, told, record), matched="before_noise")


def precode_aware(
    restarts: int = 1, evaluations: int = 2000, tv: float = 1e-3, told: bool = False, record: int = 0
) -> GradientMatching:
    """Looks for the image and for what the model's bottleneck drew at the same time: the answer to PRECODE and its kin.

    Threat model: as `cosine_lbfgs`, which it is on a model that draws nothing; knows the model, and so that it draws, not what.
    With the noise among the unknowns nothing is random any more, and L-BFGS works. Departure from the joint optimisation that
    Scheliga et al. (2023, arXiv:2208.06163) made for dropout: no regulariser of the mask, and L-BFGS in place of Adam.
    """
    return replace(cosine_lbfgs(restarts, evaluations, tv, record), labels="given" if told else "analytic", noise="sought")


def fedavg(
    restarts: int = 1, evaluations: int = 2000, tv: float = 1e-3, agreement: float = 1.0, record: int = 0
) -> GradientMatching:
    """Inversion of several local steps by imitating them (Dimitrov et al. 2022): all images of a client, and their soft labels.

    Threat model: as `dlg`; knows the local steps, learning rate and batch size, for the server ordered them; not the order of the
    images, so that each epoch's are looked for anew and tied together by what does not depend on order.
    Departures: cosine gap, total variation and L-BFGS from a grey image, as `cosine_lbfgs`, where the paper takes Adam; labels are
    optimised rather than counted, for a count does not say which label was in which step.
    """
    return GradientMatching(
        gap=CosineGap(),
        priors=(TotalVariation(tv),),
        labels="joint",
        optimizer=LBFGS(evaluations),
        restarts=restarts,
        init="grey",
        imitate=True,
        agreement=agreement,
        tolerance=1e-4,
        record=record,
    )


def gan(restarts: int = 1, steps: int = 200, rate: float = 2e-3, samples: int = 4, tv: float = 1.0, told: bool = False) -> ClassGAN:
    """The class-representative GAN of Hitaj, Ateniese & Perez-Cruz (2017), the baseline of Zhu et al. (2019), as in `attacks.gan`.

    Threat model: sees the broadcast parameters, and one label for each image of the batch: read off the gradient, or known if
    `told`. Holds no image; the shared model is its discriminator. It learns what the model takes for a class, never what one
    client's image looked like.

    Departures: the attacker only listens, where the paper's participant makes its victim teach the model more; a generator is
    trained for the model of the victim's round, not along many rounds; and a total variation of weight `tv`, without which
    (`tv=0`) it draws noise that the model is sure of. What it then draws is smooth, as means of classes are: hold its likeness
    to them against that of a plain colour.
    """
    return ClassGAN(
        "given" if told else "analytic",
        samples=samples,
        optimizer=Adam(steps, rate=rate),
        priors=(TotalVariation(tv),) if tv else (),
        restarts=restarts,
    )


def gias(
    generator: str = "principal",
    latents: int = 1024,
    restarts: int = 1,
    evaluations: int = 300,
    likely: float = 0.01,
    tune: int = 0,
    rate: float = 1e-5,
    tv: float = 0.0,
    told: bool = False,
) -> GenerativePrior:
    """Gradient Inversion with a generative prior (Jeon et al. 2021): a generator's latents, then its weights for each victim.

    generator  "principal": a linear one, the principal components of public images; "autoencoder": a convolutional one
    tune       steps of the search over weights, at `rate`; 0 stops after the latents, as Li et al. (2022) do

    Threat model: as `dlg`, with the label read off the gradient, or known if `told`; and holds public images of the victims' kind,
    a test split say, of which none is a client's.

    Departures: the generator is made of 10,000 public images in seconds or minutes, where the paper's is a GAN trained for days:
    128 principal components lie nearer to unseen photographs of CIFAR-10 than an autoencoder of as many latents that was trained
    for a CPU minute. Latents are searched by L-BFGS. Weights are left alone unless asked for: a convolutional generator gains by
    it; to a linear one it is a search among pixels, which fits the noise too (`rate` 1e-5 is for the linear, 1e-3 for the other).
    """
    kinds = {"principal": PrincipalComponents, "autoencoder": Autoencoder}
    return GenerativePrior(
        generator=kinds[one_of("generator", generator, kinds)](latents),
        matching=GradientMatching(
            gap=CosineGap(),
            priors=(TotalVariation(tv),) if tv else (),
            labels="given" if told else "analytic",
            optimizer=LBFGS(evaluations),
            restarts=restarts,
            tolerance=1e-4,
        ),
        tune=Adam(tune, rate=rate) if tune else None,
        likely=likely,
    )


def dlg_text(gap: str = "cosine", restarts: int = 1, iterations: int = 600, told: bool = False) -> TextMatching:
    """Token-level DLG (Zhu, Liu & Han 2019, section 4.2): embeddings that reproduce the gradient, and the nearest token of each.

    Threat model: sees one client's gradient and the parameters it was computed at, and knows the vocabulary; with `told`, knows
    which positions are masked and the words behind the masks.

    `gap` is "cosine", or "squared" as the paper has it. Departures: Adam with a linearly falling rate in place of L-BFGS; the
    words behind the masks are read off the head first. From BERT's own N(0, 0.02^2) weights, where the head's gradient drowns the
    others, hardly a word comes back.
    """
    gaps: dict[str, Gap] = {"cosine": CosineGap(), "squared": SquaredGap()}
    return TextMatching(
        gap=gaps[one_of("gap", gap, gaps)],
        labels="given" if told else "joint",
        optimizer=Adam(iterations, rate=0.0375, decay="linear"),
        restarts=restarts,
    )


def tag(alpha: float = 0.01, restarts: int = 1, iterations: int = 600, told: bool = False) -> TextMatching:
    """TAG (Deng et al. 2021): as `dlg_text`, with absolute differences, weighted by `alpha`, beside the squared ones.

    Threat model and departures: as `dlg_text`.
    """
    return TextMatching(
        gap=SquaredAndAbsoluteGap(alpha),
        labels="given" if told else "joint",
        optimizer=Adam(iterations, rate=0.0375, decay="linear"),
        restarts=restarts,
    )


def dager(starts: int = 16, tolerance: float = 1e-3) -> SpanCheck:
    """DAGER (Petrov et al. 2024) for an encoder, exact while the batch has fewer tokens than the model is wide: see `SpanCheck`.

    Departure: sentences of a batch are put together by changing one position at a time, where the paper's encoder variant
    enumerates candidates.
    """
    return SpanCheck(tolerance=tolerance, starts=starts)


def strongest(restarts: int = 3, evaluations: int = 4000, iterations: int = 4800, draws: int = 200_000) -> Escalation:
    """The first that works of exact inversion, R-GAP and SPEAR; then DLG and the cosine by L-BFGS on a smooth network, Inverting
    Gradients on one with kinks.

    Threat model: as `dlg`; labels are read off the gradient where they are not optimised too, and what a bottleneck drew is looked
    for together with the image. What it cannot steal was not stolen
    by any of them: a stronger claim than that of one attack, and still none about attacks that are not here.

    restarts, evaluations  of the searches by L-BFGS
    iterations             of Inverting Gradients
    draws                  of SPEAR
    """
    return Escalation(
        {
            "analytic": Analytic(),
            "rgap": RGAP(),
            "spear": SPEAR(draws),
            "dlg": Where(replace(dlg(restarts, evaluations), noise="sought"), smooth=True),
            "cosine_lbfgs": Where(replace(cosine_lbfgs(restarts, evaluations), noise="sought"), smooth=True),
            "inverting_gradients": Where(inverting_gradients(iterations=iterations), smooth=False),
        }
    )
