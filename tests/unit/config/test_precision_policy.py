"""The whole table of the precision policy: device x asked -> what is trained in, or which refusal.

Not proved here: that a GPU computes it; `tests/gpu/test_precision_gpu.py` does where there is one.
"""

from __future__ import annotations

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.fp8 import Fp8Config
from megatron_matpo.config.gpus import GPUS
from megatron_matpo.config.precision import (
    FP8_RECIPES,
    Platform,
    check_precision,
    decide_precision,
    token_multiple,
)
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.driver import lowest_capability

VOLTA, AMPERE, ADA, HOPPER = (7, 0), (8, 0), (8, 9), (9, 0)
BLACKWELL, RTX_BLACKWELL = (10, 0), (12, 0)
DEVICES = (AMPERE, ADA, HOPPER, BLACKWELL, RTX_BLACKWELL)


def asked(precision: str, recipe: str = "auto", *, gpus: int = 8, **fp8) -> Config:
    return Config(
        cluster=ClusterConfig(gpus_per_node=gpus),
        precision=precision,
        fp8=Fp8Config(recipe=recipe, **fp8),
    )


@pytest.mark.parametrize(
    ("word", "expected"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")]
)
def test_cpu(word, expected):
    precision = decide_precision(asked(word, gpus=0), Platform())
    assert (precision.name, precision.parameters, precision.fp8_recipe) == (expected, expected, "")
    with pytest.raises(ConfigError, match=r"the CPU platform .* has no FP8"):
        decide_precision(asked("fp8", gpus=0), Platform())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("word", ["fp32", "bf16"])
def test_a_format_asked_for_by_name_is_taken(device, word):
    precision = decide_precision(asked(word), Platform(device))
    assert (precision.name, precision.fp8_recipe) == (word, "")
    assert precision.reason == f"as precision={word} says"


AUTO = {
    AMPERE: "",
    ADA: "tensorwise",
    HOPPER: "blockwise",
    BLACKWELL: "mxfp8",
    RTX_BLACKWELL: "blockwise",
}


@pytest.mark.parametrize("device", DEVICES)
def test_auto_takes_fp8_where_the_device_has_it(device):
    precision = decide_precision(asked("auto"), Platform(device))
    assert precision.parameters == "bf16"
    assert precision.fp8_recipe == AUTO[device]
    sm = f"sm_{device[0]}{device[1]}"
    has = "has FP8; recipe" if AUTO[device] else "has no FP8"
    assert sm in precision.reason
    assert has in precision.reason


# Transformer Engine's support matrix, row by row.
SUPPORT = {
    "delayed": {ADA, HOPPER, BLACKWELL, RTX_BLACKWELL},
    "tensorwise": {ADA, HOPPER, BLACKWELL, RTX_BLACKWELL},
    "blockwise": {HOPPER, BLACKWELL, RTX_BLACKWELL},
    "mxfp8": {BLACKWELL},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", sorted(SUPPORT))
def test_every_recipe_on_every_device(device, recipe):
    config = asked("fp8", recipe)
    if device in SUPPORT[recipe]:
        precision = decide_precision(config, Platform(device))
        assert (precision.name, precision.fp8_recipe) == ("fp8", recipe)
        return
    with pytest.raises(ConfigError) as caught:
        decide_precision(config, Platform(device))
    text = str(caught.value)
    assert text.startswith(f"fp8.recipe={recipe}: this GPU (sm_{device[0]}{device[1]}) has no ")
    assert "use precision=bf16, or precision=auto" in text
    for other, devices in SUPPORT.items():
        assert (other in text.split("or fp8.recipe=")[-1].split(" | ")) == (device in devices)


def test_fp8_on_ampere_is_refused_with_the_choices():
    with pytest.raises(ConfigError) as caught:
        decide_precision(asked("fp8"), Platform(AMPERE))
    assert str(caught.value) == (
        "precision=fp8: this GPU (sm_80) has no FP8 (Transformer Engine needs compute capability "
        "8.9 or newer); use precision=bf16, or precision=auto with fp8.recipe=auto (FP8 where the "
        "device has it)"
    )


def test_one_recipe_file_serves_both_kinds_of_cluster():
    config = asked("auto", "blockwise")
    assert decide_precision(config, Platform(HOPPER)).fp8_recipe == "blockwise"
    assert decide_precision(config, Platform(AMPERE)).name == "bf16"
    with pytest.raises(ConfigError, match=r"fp8.recipe=mxfp8: .* has no mxfp8 scaling"):
        decide_precision(asked("auto", "mxfp8"), Platform(HOPPER))


def test_before_bf16():
    assert decide_precision(asked("auto"), Platform(VOLTA)).name == "fp32"
    with pytest.raises(ConfigError, match="no bf16"):
        decide_precision(asked("bf16"), Platform(VOLTA))
    with pytest.raises(ConfigError, match="no FP8"):
        decide_precision(asked("fp8"), Platform(VOLTA))


def test_an_unknown_gpu_is_no_reason_to_refuse_but_none_for_fp8_either():
    precision = decide_precision(asked("auto"), Platform())
    assert precision.name == "bf16"
    assert "cluster.gpu" in precision.reason
    assert decide_precision(asked("fp8"), Platform()).fp8_recipe == "blockwise"
    assert decide_precision(asked("fp8", "mxfp8"), Platform()).fp8_recipe == "mxfp8"


@pytest.mark.parametrize(
    ("te", "cuda", "auto", "refused"),
    [
        ((2, 11), (13, 0), "blockwise", set()),
        ((2, 11), (12, 8), "tensorwise", {"blockwise"}),
        ((2, 2), (13, 0), "tensorwise", {"blockwise"}),
        ((2, 1), (13, 0), "delayed", {"blockwise", "tensorwise"}),
        ((1, 13), (12, 1), "delayed", {"blockwise", "tensorwise"}),
        ((1, 13), (11, 8), "", {"blockwise", "tensorwise", "delayed"}),
    ],
)
def test_software_that_is_too_old_on_hopper(te, cuda, auto, refused):
    platform = Platform(HOPPER, te, cuda)
    assert decide_precision(asked("auto"), platform).fp8_recipe == auto
    for recipe in ("blockwise", "tensorwise", "delayed"):
        if recipe in refused:
            with pytest.raises(ConfigError, match=f"{recipe} scaling needs"):
                decide_precision(asked("fp8", recipe), platform)
        else:
            assert decide_precision(asked("fp8", recipe), platform).fp8_recipe == recipe


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_the_gpu_of_a_recipe_is_checked_before_anything_starts(gpu):
    config = Config(cluster=ClusterConfig(gpus_per_node=8, gpu=gpu), precision="fp8")
    problems = check_precision(config)
    if gpu.startswith("A"):
        (line,) = problems
        assert line.startswith(f"precision=fp8: {gpu} (sm_80) has no FP8")
    else:
        assert problems == []


def test_settings_that_contradict_each_other():
    (line,) = check_precision(asked("fp8", "delayed", first_last_layers_bf16=1))
    assert line.startswith("fp8.first_last_layers_bf16=1: delayed scaling cannot")
    (line,) = check_precision(asked("bf16", params=True))
    assert line.startswith("fp8.params=true: weights in FP8 need precision=fp8 or auto")
    assert check_precision(asked("fp8", "tensorwise", first_last_layers_bf16=1, params=True)) == []


@pytest.mark.parametrize(
    ("recipe", "parallel", "expected"),
    [
        ("tensorwise", ParallelConfig(tensor=4), 16),
        ("blockwise", ParallelConfig(tensor=4, sequence=True), 64),
        ("delayed", ParallelConfig(tensor=2, context=2, sequence=True), 64),
        ("mxfp8", ParallelConfig(), 32),
        ("mxfp8", ParallelConfig(tensor=8, context=4, sequence=True), 1024),
    ],
)
def test_packed_tokens_are_a_multiple_of_what_fp8_products_need(recipe, parallel, expected):
    config = Config(
        cluster=ClusterConfig(gpus_per_node=8),
        precision="fp8",
        fp8=Fp8Config(recipe=recipe),
        parallel=parallel,
    )
    precision = decide_precision(config, Platform())
    assert token_multiple(config, precision) == expected
    rows = expected // parallel.context // (parallel.tensor if parallel.sequence else 1)
    assert rows == FP8_RECIPES[recipe].token_multiple


def test_without_fp8_only_the_layout_counts():
    config = Config(parallel=ParallelConfig(tensor=4, context=2, sequence=True))
    assert token_multiple(config, decide_precision(config, Platform())) == 8


def test_what_nvidia_smi_says():
    assert lowest_capability("9.0\n8.0\n") == (8, 0)
    assert lowest_capability("[N/A]\n10.0\n") == (10, 0)
    assert lowest_capability("No devices were found\n") is None
