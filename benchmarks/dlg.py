"""How often DLG succeeds in its own setting: one start, and the best of three by matching loss.

Federations of 50 clients with the LeNet of the DLG paper (sigmoids, weights and biases U(-0.5, 0.5)), each client sending the
gradient of one image; each federation has its own network, clients and images. The attacker picks among its starts by matching
loss, never by the truth. Beside it: the two bars that a plain colour does not pass, and what that colour scores.

    python benchmarks/dlg.py                        5 networks x 8 images of CIFAR-10 under $FEDSIM_DATA
    python benchmarks/dlg.py --data synthetic       the same on the embedded images
"""

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from attacks.metrics import wilson
from experiments.config import compose
from experiments.scoring import STOLEN_MSE
from fedsim.quiet import quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="dataset")
    parser.add_argument("--networks", type=int, default=5, help="federations, each with its own random network")
    parser.add_argument("--images", type=int, default=8, help="victims in each")
    parser.add_argument("--attack", default="dlg", help="dlg or idlg")
    arguments = parser.parse_args()
    quiet()
    from experiments import runner

    tables, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as out:
        for seed in range(arguments.networks):
            chosen = [
                f"data={arguments.data}",
                f"attack={arguments.attack}",
                f"tap.clients={arguments.images}",
                "attack.restarts=3",
            ]
            config = compose(["setting=dlg", *chosen, f"seed={seed}"])
            runner.check_config(config)
            began = time.perf_counter()
            tables.append(runner.start(config, Path(out, str(seed)), "benchmarks/dlg.py").leaks())
            seconds += time.perf_counter() - began
    leaks = pd.concat(tables)
    print(f"\n{arguments.attack} on {arguments.data}, {len(leaks)} (image, network, start) triples, {seconds:.0f} s in all")
    for name, right in {
        f"one start, MSE < {STOLEN_MSE}": leaks["first_start_mse"] < STOLEN_MSE,
        f"best of 3, MSE < {STOLEN_MSE}": leaks["mse"] < STOLEN_MSE,
        "best of 3, PSNR > 20 dB": leaks["psnr_db"] > 20,
        "best of 3, SSIM >= 0.6": leaks["ssim"] >= 0.6,
        "label right": leaks["label_right"],
        "converged": leaks["converged"],
        f"mean colour of the image, MSE < {STOLEN_MSE}": leaks["mean_colour_mse"] < STOLEN_MSE,
    }.items():
        low, high = wilson(int(right.sum()), len(leaks))
        print(f"  {name:42s} {int(right.sum()):3d}/{len(leaks)} = {right.mean():6.1%}   95 % interval {low:.1%} to {high:.1%}")
    median = leaks[["mse", "psnr_db", "ssim", "evaluations", "starts"]].median()
    print(f"  median of best of 3: MSE {median['mse']:.2g}, {median['psnr_db']:.1f} dB, SSIM {median['ssim']:.3f}")
    print(f"  median budget: {median['evaluations']:.0f} evaluations in {median['starts']:.0f} starts")


if __name__ == "__main__":
    main()
