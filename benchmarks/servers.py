"""What a malicious server catches, what its clients can see of it, and what sums of clients give away: one command for each table.

    python benchmarks/servers.py bins        images back of a batch, by bins of the imprint module (Fowl et al. 2021)
    python benchmarks/servers.py sums        the same of sums of clients
    python benchmarks/servers.py steps       the same after several local steps
    python benchmarks/servers.py certain     what the attacker knows of its catch
    python benchmarks/servers.py findings    what a client's inspection finds in honest models, and in an imprint module
    python benchmarks/servers.py check       seconds of that inspection beside a step of training
    python benchmarks/servers.py alone       entries of sparse updates that a single client of a sum sent, and bytes
    python benchmarks/servers.py protocol    seconds of a round of secure aggregation, without training

Images are of CIFAR-10 under $FEDSIM_DATA, or embedded ones with --data synthetic. One thread.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import attacks
from attacks import metrics
from defenses import TopK
from fedsim import secure_aggregation, servers
from fedsim.data import Dataset, load
from fedsim.inspection import Inspection, exposure, parallel_rows
from fedsim.models import Imprinted, lenet, mcmahan_cnn, mlp_2nn, resnet18
from fedsim.observation import Knowledge, Observation, Reconstruction
from fedsim.seeding import generator
from fedsim.training import Batch, local_update, split
from fedsim.wire import nbytes, pack

State = Mapping[str, Tensor]
KINDS, MEASUREMENTS = {"relu": "dense", "hardtanh": "sparse"}, ("brightness", "random")
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "LeNet": lenet,
    "CNN of McMahan et al.": mcmahan_cnn,
    "2NN": mlp_2nn,
    "ResNet-18": resnet18,
}


def network(data: Dataset, name: str) -> nn.Module:
    """An untrained network that normalises pixels."""
    return NETWORKS[name](data.image_shape, data.num_classes, mean=data.mean, std=data.std, rng=generator(0, "network"))


def trapped(data: Dataset, name: str, bins: int, kind: str = "relu", measurement: str = "brightness") -> Imprinted:
    """The same behind an imprint module that was fitted to the test images."""
    return servers.Imprint(bins, kind, measurement)(network(data, name), data.test, generator(0, "server"))


def batches(data: Dataset, size: int, count: int, stream: str = "victims") -> Iterator[Batch]:
    """Random training images, none twice in a batch."""
    for i in range(count):
        yield data.train.batch(torch.randperm(len(data.train.labels), generator=generator(0, stream, i))[:size])


def caught(
    data: Dataset, model: nn.Module, parts: Sequence[Batch], lr: float = 1.0, levels: int = 255
) -> tuple[Reconstruction, Tensor]:
    """What the attack reads of an update of a step for each part, and the MSE (N, B) of each image to each true one."""
    params, buffers = split(model)
    images = torch.cat([x for x, _ in parts])
    seen = Observation(params, pack(local_update(model, params, buffers, parts, lr=lr).update), len(images), buffers=buffers)
    known = Knowledge(data.image_shape, data.num_classes, batch_size=len(parts[0][0]), lr=lr, local_steps=len(parts))
    (found,) = attacks.Imprint(levels)([seen], known, model, generator(0, "attack"))
    return found, torch.stack([metrics.mse(one.expand_as(images), images) for one in found.images])


def alone(size: int, bins: int) -> float:
    """Chance that an image of a batch has its bin for itself."""
    return (1 - 1 / bins) ** (size - 1)


def by_bins(data: Dataset) -> None:
    """Share of images back with MSE < 1e-6, of 20 batches of 8 and 64 and 5 of 256, DLG's LeNet; derived (1 - 1/bins)^(B - 1)."""
    print("| bins | B = 8 | derived | B = 64 | derived | B = 256 | derived |\n| --- | --- | --- | --- | --- | --- | --- |")
    for bins in (64, 128, 256, 512, 1024):
        model, cells = trapped(data, "LeNet", bins), []
        for size, count in ((8, 20), (64, 20), (256, 5)):
            back = sum(int((caught(data, model, [batch])[1].amin(1) < 1e-6).sum()) for batch in batches(data, size, count))
            cells += [f"{back / count / size:.3f}", f"{alone(size, bins):.3f}"]
        print(f"| {bins} | {' | '.join(cells)} |", flush=True)


def by_clients(data: Dataset) -> None:
    """Images back with MSE < 1e-6 of sums of clients with 32 images each, DLG's LeNet, 1,024 bins."""
    model = trapped(data, "LeNet", 1024)
    for clients in (1, 2, 4, 8, 16):
        (batch,) = batches(data, 32 * clients, 1)  # a mean of clients is the gradient of their batches together
        back = int((caught(data, model, [batch])[1].amin(1) < 1e-6).sum())
        print(f"  {clients:2d} clients: {back}/{32 * clients}, derived {32 * clients * alone(32 * clients, 1024):.1f}", flush=True)


def by_steps(data: Dataset) -> None:
    """Images of 64 back at more than 60 dB, and the median image's PSNR, after local steps; CNN of McMahan et al., 512 bins."""
    counts = (1, 2, 4, 8, 16, 32)
    print(f"derived: {64 * alone(64, 512):.1f}\n| local steps | {' | '.join(map(str, counts))} |\n|{' --- |' * (len(counts) + 1)}")
    ((images, labels),) = batches(data, 64, 1)
    for kind, variant in KINDS.items():
        model = trapped(data, "CNN of McMahan et al.", 512, kind)
        for lr in (0.01, 0.1):
            cells = []
            for steps in counts:
                parts = list(zip(images.split(64 // steps), labels.split(64 // steps), strict=True))
                decibels = -10 * caught(data, model, parts, lr)[1].amin(0).clamp(min=1e-20).log10()
                cells.append(f"{int((decibels > 60).sum())} ({decibels.median():.0f} dB)")
            print(f"| {variant}, lr {lr} | {' | '.join(cells)} |", flush=True)


def by_belief(data: Dataset) -> None:
    """What the attacker is certain of, of 72 batches of 64: three networks, 128 and 1,024 bins, three batches each."""
    for levels, told in ((255, "by the grid of 8-bit pixels"), (0, "without it")):
        back = vouched = wrong = right = 0
        for name in ("LeNet", "CNN of McMahan et al.", "2NN"):
            for kind in KINDS:
                for measurement in MEASUREMENTS:
                    for bins in (128, 1024):
                        model = trapped(data, name, bins, kind, measurement)
                        for images, labels in batches(data, 64, 3):
                            found, far = caught(data, model, [(images, labels)], levels=levels)
                            assert found.certain is not None
                            nearest, good = far.argmin(1), far.amin(1) < 1e-6
                            back += int(good.sum())
                            vouched += int((good & found.certain).sum())
                            wrong += int((found.certain & ~good).sum())
                            right += int((found.labels == labels[nearest])[found.certain & good].sum())
        print(
            f"  {told}: {back} back with MSE < 1e-6, certain of {vouched}, of {right} with the right label, and of {wrong} others"
        )


def findings(data: Dataset) -> None:
    """Batches with a finding, of 20 batches of 2, 20 of 8 and 10 of 32; ResNet-18: 4, 4 and 2."""
    print("| model | parallel rows | dominant image | owned units, B = 2 | B = 8 | B = 32 | largest D-SNR |\n|" + " --- |" * 7)
    for name in NETWORKS:
        model = network(data, name)
        params, buffers = split(model)
        steps, counts = (8, (4, 4, 2)) if name == "ResNet-18" else (100, (20, 20, 10))
        trained = local_update(model, params, buffers, batches(data, 32, steps, "training"), lr=0.05)
        after = {key: value - trained.update[key] for key, value in params.items()}
        print(_inspected(f"{name}, at init", [(model, params, buffers)], data, counts), flush=True)
        print(
            _inspected(f"the same, after {steps} steps", [(model, after, {**buffers, **trained.buffers})], data, counts), flush=True
        )
    for kind, variant in KINDS.items():
        models = [trapped(data, "CNN of McMahan et al.", bins, kind) for bins in (32, 256, 1024)]
        what = f"imprint, {variant}, 32 to 1,024 bins"
        print(_inspected(what, [(model, *split(model)) for model in models], data, (20, 20, 10)), flush=True)


def _inspected(what: str, models: Sequence[tuple[nn.Module, State, State]], data: Dataset, counts: tuple[int, int, int]) -> str:
    """A row of the table: of each model `counts` batches of 2, 8 and 32 images are looked at."""
    limits, looked, parallel, dominant, largest = Inspection(), 0, 0, 0, 0.0
    owned = []
    for size, count in zip((2, 8, 32), counts, strict=True):
        owning = 0
        for model, params, buffers in models:
            rows = max(parallel_rows(model, params).values())
            for images, labels in batches(data, size, count):
                shown = exposure(model, params, buffers, images, labels).values()
                dominance, share = max(d for d, _ in shown), max(o for _, o in shown)
                looked += 1
                parallel += rows > limits.parallel
                dominant += dominance > limits.dominance
                owning += share > limits.owned
                largest = max(largest, dominance)
        owned.append(f"{owning}/{count * len(models)}")
    return f"| {what} | {parallel}/{looked} | {dominant}/{looked} | {' | '.join(owned)} | {largest:.2g} |"


def cost(data: Dataset) -> None:
    """Seconds of a client's inspection and of a step of training, CNN of McMahan et al., 32 images; medians of 20."""
    model = network(data, "CNN of McMahan et al.")
    params, buffers = split(model)
    (batch,) = batches(data, 32, 1)
    whole = Inspection()
    for what, made in {
        "weights alone": lambda: whole(model, params, buffers),
        "weights and gradients": lambda: whole(model, params, buffers, *batch),
        "a step": lambda: local_update(model, params, buffers, [batch], lr=0.1),
    }.items():
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            made()
            seconds.append(time.perf_counter() - began)
        print(f"  {what:22s} {sorted(seconds)[10]:.3f} s")


def sparse(data: Dataset) -> None:
    """Of the entries of a sum that anybody sent, the share that one client alone sent: 10 clients of 8 images, LeNet."""
    model = network(data, "LeNet")
    params, buffers = split(model)
    secure = secure_aggregation.Secure()
    for ratio in (0.01, 0.1, 0.5):
        sent, plain = [], 0
        for i, batch in enumerate(batches(data, 8, 10)):
            update = local_update(model, params, buffers, [batch], lr=1.0).update
            defense = TopK(ratio)
            packets, _ = defense(pack(update), defense.init(update), generator(i, "defense"))
            plain += sum(map(nbytes, packets.values()))
            seen = Observation(params, packets, 8).update
            sent.append(torch.cat([t.flatten() for t in seen.values()]) != 0)
        senders = torch.stack(sent).sum(0)
        masked = len(secure.to_bytes(secure.encode(np.zeros(senders.numel()), 0.1)))
        print(
            f"  topk {ratio}: {int((senders == 1).sum()) / int((senders > 0).sum()):.0%} of the sum's entries;"
            f" {plain / 1000:.0f} kB of all clients plain, {10 * masked / 1000:.0f} kB masked",
            flush=True,
        )


def protocol(data: Dataset) -> None:
    """Seconds of one round's cryptography, all clients' and the server's, with as many entries as LeNet has."""
    entries, secure = sum(t.numel() for t in split(network(data, "LeNet"))[0].values()), secure_aggregation.Secure()
    for clients in (10, 50):
        session, needed, chosen = secure.session(0, 1), secure.needed(clients), range(clients)
        began = time.perf_counter()
        made = [secure_aggregation.advertise(client, 1, session) for client in chosen]
        adverts = [advert for _, advert in made]
        shared = [secure_aggregation.share(secrets, adverts, needed) for secrets, _ in made]
        codes, masked, revealed = secure.encode(np.ones(entries), 1 / clients), {}, {}
        for client, (secrets, _) in enumerate(shared):
            sealed = {peer: shared[peer][1][client] for peer in chosen if peer != client}
            kept, masked[client] = secure_aggregation.mask(secrets, sealed, codes, needed)
            revealed[client] = secure_aggregation.reveal(kept, chosen, needed)
        total = secure_aggregation.unmask(session, adverts, masked, chosen, revealed, needed)
        seconds = time.perf_counter() - began
        assert np.abs(secure.decode(total, 1.0) - 1).max() < 1e-5
        print(f"  {clients} clients, {entries} entries: {seconds:.2f} s", flush=True)


TABLES: dict[str, Callable[[Dataset], None]] = {
    "bins": by_bins,
    "sums": by_clients,
    "steps": by_steps,
    "certain": by_belief,
    "findings": findings,
    "check": cost,
    "alone": sparse,
    "protocol": protocol,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--data", default="cifar10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load(arguments.data)
    print(f"{(TABLES[arguments.table].__doc__ or '').splitlines()[0]} {data.name}")
    TABLES[arguments.table](data)


if __name__ == "__main__":
    main()
