"""Which of a model's processes one is, as Triton names them on CPUs and on several GPUs."""

import json

from harness.vibevoice.process.instances import instance_name, instances, place_of


def args_of(number, device, count=1, gpus=()):
    group = {"count": count, "gpus": list(gpus)}
    config = json.dumps({"instance_group": [group]})
    return {"model_instance_name": f"m_0_{number}", "model_instance_device_id": str(device), "model_config": config}


def test_instances_on_a_cpu_are_counted_by_their_number():
    assert [place_of(args_of(n, 0, count=3)) for n in range(3)] == [(1, 3), (2, 3), (3, 3)]


def test_instances_of_one_number_on_several_gpus_are_told_apart():
    all_args = [args_of(n, gpu, count=2, gpus=(0, 3, 5)) for n in range(2) for gpu in (0, 3, 5)]
    assert sorted(place_of(args) for args in all_args) == [(k, 6) for k in range(1, 7)]
    assert len({instance_name(args) for args in all_args}) == 6
    assert instances(all_args[0]) == 6
