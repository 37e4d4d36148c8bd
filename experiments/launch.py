"""One cell of a study as a job of Hydra's, so that its launchers (joblib, Ray, submitit for SLURM) run studies on clusters.

    python -m experiments.launch --multirun name=ipp-init size=full 'cell=range(960)' hydra/launcher=submitit_slurm

The cells go where `fedsim study NAME` keeps them, on a file system that all machines share; that command then finds them finished,
runs what is left, and draws the figures. `settings` are those of all cells, as there.
"""

import sys
from pathlib import Path
from typing import Any

import hydra

CONF = Path(__file__).parent / "conf"


@hydra.main(config_path=str(CONF), config_name="launch", version_base="1.3")
def main(job: Any) -> None:
    """Runs cell `job.cell` of `job.name`, or keeps it. Raises RuntimeError naming what went wrong, for the launcher to report."""
    from hydra.core.global_hydra import GlobalHydra

    from experiments import study
    from experiments.runner import check_config
    from fedsim.checks import whole

    GlobalHydra.instance().clear()  # a cell is composed for itself, and this job's configuration is read by now
    chosen = study.load(job.name)
    cells = chosen.cells(job.size, list(job.settings))
    whole(f"cell of {job.name} in its {job.size} size", job.cell, 0, len(cells) - 1)
    name, config = list(cells.items())[job.cell]
    check_config(config)
    base = Path(hydra.utils.to_absolute_path(job.out or f"runs/study-{job.name}-{job.size}"))
    study.check_own(job.name, base)
    base.mkdir(parents=True, exist_ok=True)
    _, failures = study.run({name: config}, base, f"python -m experiments.launch {' '.join(sys.argv[1:])}", 1)
    for failed, why in failures.items():  # the cell may be kept under another name
        raise RuntimeError(f"{failed}: {why}")


if __name__ == "__main__":
    main()
