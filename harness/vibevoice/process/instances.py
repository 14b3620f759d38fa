"""The processes that serve one model side by side; ``args`` are those that Triton gives to each."""

from __future__ import annotations

import json


def instances(args: dict) -> int:
    """Processes that serve a model side by side."""
    groups = json.loads(args["model_config"])["instance_group"]
    return sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in groups)


def place_of(args: dict) -> tuple[int, int]:
    """Which of a model's instances this is, from 1, and how many there are. Triton counts anew on every GPU."""
    number, group = int(args["model_instance_name"].rpartition("_")[2]), json.loads(args["model_config"])
    gpus = group["instance_group"][0].get("gpus") or [int(args["model_instance_device_id"])]
    return 1 + number * len(gpus) + gpus.index(int(args["model_instance_device_id"])), instances(args)


def instance_name(args: dict) -> str:
    """An instance among all of its model: Triton names those of one count alike on every GPU."""
    return f"{args['model_instance_name']}@{args['model_instance_device_id']}"
