"""Inverting Gradients by the `breaching` library, run by `benchmarks/searches.py breaching` in an environment of its own.

    python peer_breaching.py MODEL FOLDER ITERATIONS

Reads FOLDER/<i>.safetensors (parameters, gradient, label, image shape), writes FOLDER/found-<i>.safetensors (image, seconds).
The networks are written out here because fedsim need not be installed beside it; parameters go in by their order.
"""

import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import breaching
import torch
from safetensors.torch import load_file, save_file
from torch import nn


def lenet(shape: list[int], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels, stride in ((shape[0], 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride=stride, padding=2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * (shape[1] // 4) * (shape[2] // 4), classes))


def mcmahan_cnn(shape: list[int], classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 32, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, padding=1)),
        *(nn.Conv2d(32, 64, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, padding=1)),
        *(nn.Flatten(), nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, classes)),
    )


def main() -> None:
    name, folder, iterations = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    networks = {"lenet": lenet, "mcmahan_cnn": mcmahan_cnn}
    if name not in networks:
        sys.exit(f"the network must be one of {', '.join(networks)}, got {name!r}")
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    config = breaching.get_attack_config("invertinggradients")
    config.optim.max_iterations = iterations
    config.optim.callback = iterations + 1
    loss = nn.CrossEntropyLoss()
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        seen = load_file(path)
        params = [t for key, t in seen.items() if key.startswith("param.")]
        gradients = {key.removeprefix("gradient."): t for key, t in seen.items() if key.startswith("gradient.")}
        order = [key.removeprefix("param.") for key in seen if key.startswith("param.")]
        # safetensors sorts names: features.0, features.2, …, head; within a layer bias before weight.
        order = sorted(order, key=lambda n: (n.rsplit(".", 1)[0], n.endswith("bias")))
        params = [seen[f"param.{n}"] for n in order]
        shape = seen["shape"].tolist()
        model = networks[name](shape, len(params[-1]))
        meta = SimpleNamespace(shape=shape, classes=len(params[-1]), modality="vision", mean=[0.0] * shape[0], std=[1.0] * shape[0])
        payload = [{"parameters": params, "buffers": None, "metadata": meta}]
        shared = [
            {
                "gradients": [gradients[n] for n in order],
                "buffers": None,
                "metadata": {"num_data_points": 1, "labels": seen["label"], "local_hyperparams": None},
            }
        ]
        torch.manual_seed(0)
        attacker = breaching.attacks.prepare_attack(model, loss, config, {"device": torch.device("cpu"), "dtype": torch.float})
        began = time.perf_counter()
        found, _ = attacker.reconstruct(payload, shared, {}, dryrun=False)
        seconds = time.perf_counter() - began
        save_file(
            {"image": found["data"].detach().contiguous(), "seconds": torch.tensor(seconds)},
            folder / f"found-{path.stem}.safetensors",
        )


if __name__ == "__main__":
    main()
