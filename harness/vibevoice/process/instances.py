"""The processes that serve one model concurrently; ``args`` are those that Triton gives to each."""

from __future__ import annotations

import json


def instances(args: dict) -> int:
    """Number of processes that serve a model."""
    groups = json.loads(args["model_config"])["instance_group"]
    return sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in groups)


def place_of(args: dict) -> tuple[int, int]:
    """Index of this instance of its model, from 1, and the number of instances. Triton counts separately per GPU."""
    number, group = int(args["model_instance_name"].rpartition("_")[2]), json.loads(args["model_config"])
    gpus = group["instance_group"][0].get("gpus") or [int(args["model_instance_device_id"])]
    return 1 + number * len(gpus) + gpus.index(int(args["model_instance_device_id"])), instances(args)


def instance_name(args: dict) -> str:
    """A name unique among all instances of a model; Triton reuses instance names on every GPU."""
    return f"{args['model_instance_name']}@{args['model_instance_device_id']}"
