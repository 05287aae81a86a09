"""Masked pre-training on the workers of a Ray cluster: the same function, started by Ray Train.

A worker that dies takes the others with it; Ray starts them all again, and they go on from the run's last checkpoint,
which lies in the run directory as ever. With `ray.least` they may be fewer then, and more again when there is room:
the order of the clips does not hang on how many read them. Besides this file, only `ray_feed.py` knows Ray here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from worldline.core.errors import WorldlineError
from worldline.train.pretrain import PretrainConfig, pretrain


def launch(config: PretrainConfig) -> Path:
    """Pre-train on `config.ray.workers` workers and return the run directory.

    Connects to the cluster that RAY_ADDRESS names, or starts one on this machine for the time of the run.

    Raises:
        WorldlineError: Ray is not installed, or it gave up.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ModuleNotFoundError as error:
        raise WorldlineError(f"{error.name} is not installed; run: pip install 'worldline[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False)
    scaling: Any = ScalingConfig  # it has two classes of that name, and static types see the older one
    cuda = config.device == "cuda"
    run = Path(config.path).absolute()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config, "folder": os.getcwd()},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo"),
        scaling_config=scaling(
            num_workers=(config.ray.least, config.ray.workers) if config.ray.least else config.ray.workers,
            elastic_resize_monitor_interval_s=config.ray.look_every_s,
            use_gpu=cuda,
            resources_per_worker={"CPU": config.ray.cpus},
        ),
        run_config=RunConfig(
            name=f".{run.name}.ray",
            storage_path=str(run.parent),
            failure_config=FailureConfig(max_failures=config.ray.failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise WorldlineError(
            f"Ray gave up ({reason}); the last checkpoint is in {config.path}, the same command goes on from there"
        ) from error
    finally:
        if ours:
            ray.shutdown()
    return config.path


def _work(given: dict[str, object]) -> None:
    config, folder = given["config"], given["folder"]
    assert isinstance(config, PretrainConfig)
    os.chdir(str(folder))  # relative paths mean the same as where the command was given
    pretrain(config)
