"""Whose memory an engine opens: the trainer rank on the same GPU of the same node."""

from megatron_matpo.config.plan import EnginePlace, Plan
from megatron_matpo.trainer.transports import writers_on_devices


def engine(index: int, node: int, *gpus: int) -> EnginePlace:
    return EnginePlace(index, node, f"10.0.0.{node}", 30000 + index, 30001, gpus)


def test_writers_are_the_ranks_on_the_engines_devices() -> None:
    engines = (engine(0, 0, 0, 1), engine(1, 0, 2, 3), engine(2, 1, 0, 1), engine(3, 2, 1))
    plan = Plan(("10.0.0.0", "10.0.0.1", "10.0.0.2"), 1, (4, 4, 2), 2, 3, engines)
    assert writers_on_devices(plan) == {
        "http://10.0.0.0:30000": (0, 1),
        "http://10.0.0.0:30001": (2, 3),
        "http://10.0.0.1:30002": (4, 5),
        "http://10.0.0.2:30003": (9,),
    }
