"""Offline by default: what Flower, Ray, MLflow and Hugging Face would send or fetch is switched off; a user's own setting wins."""

import os

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def quiet() -> None:
    """Sets the switches. They are read when those packages are imported, so this comes first."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
