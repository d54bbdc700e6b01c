"""The precision policy: which number formats a run trains in, and why. Torch-free.

One function, `decide_precision`, is asked by validation (before anything starts), by `matpo plan`
and by every trainer rank; only what each knows of the platform differs. What a platform does not
have is refused if it was asked for by name and replaced, with the reason, if `auto` asked.

Source of the device requirements: Transformer Engine's support matrix
(nvidia.github.io/TransformerEngine/support_matrix.html): FP8 per tensor needs compute capability
8.9, block scaling 9.0, MXFP8 10.0 and not 12.0. CUDA: 12.1, on Blackwell 12.8 (its README); block
scaling 12.9 (`transformer_engine/pytorch/quantization.py:check_fp8_block_scaling_support`).
Versions of Transformer Engine: what Megatron-Core 0.16.1 asks for (`fp8_utils.py:177-235`).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_matpo.config.gpus import GPUS, Capability
from megatron_matpo.config.root import Config
from megatron_matpo.errors import ConfigError

Version = tuple[int, int]
PRECISIONS = ("auto", "fp32", "bf16", "fp8")


@dataclass(frozen=True)
class Platform:
    """What is known of the place where a run trains; None means unknown, and forbids nothing."""

    capability: Capability | None = None
    te_version: Version | None = None
    """Of Transformer Engine."""
    cuda_version: Version | None = None


@dataclass(frozen=True)
class Fp8Recipe:
    """What a scaling recipe needs."""

    name: str
    capability: Capability
    below: Capability
    """First compute capability that does not have it any more."""
    te_version: Version
    cuda_version: Version
    format: str
    """Transformer Engine's format: `hybrid` has e5m2 gradients, `e4m3` is e4m3 everywhere."""
    token_multiple: int
    """Rows that a matrix product takes must be a multiple (`fp8_utils.py:get_fp8_align_size`)."""


_NEVER = (99, 0)
# In the order in which `auto` prefers them: the finest scaling first.
FP8_RECIPES: dict[str, Fp8Recipe] = {
    recipe.name: recipe
    for recipe in (
        Fp8Recipe("mxfp8", (10, 0), (12, 0), (2, 1), (12, 8), "e4m3", 32),
        Fp8Recipe("blockwise", (9, 0), _NEVER, (2, 3), (12, 9), "e4m3", 16),
        Fp8Recipe("tensorwise", (8, 9), _NEVER, (2, 2), (12, 1), "hybrid", 16),
        Fp8Recipe("delayed", (8, 9), _NEVER, (1, 0), (12, 1), "hybrid", 16),
    )
}


@dataclass(frozen=True)
class Precision:
    """What a run trains in."""

    parameters: str
    """`fp32` or `bf16`: the parameters of the model, and what is not a matrix product."""
    fp8_recipe: str
    """Scaling of the FP8 matrix products; empty for none."""
    reason: str
    """One line for the log."""

    @property
    def name(self) -> str:
        """As `precision` spells it."""
        return "fp8" if self.fp8_recipe else self.parameters


def decide_precision(config: Config, platform: Platform) -> Precision:
    """The policy.

    Raises:
        ConfigError: `precision` asks for what the platform does not have; the choices are named.
    """
    asked = config.precision
    if config.cluster.device == "cpu":
        return _on_cpu(asked)
    if asked == "fp32":
        return Precision("fp32", "", "as precision=fp32 says")
    lacks_bf16 = platform.capability is not None and platform.capability < (8, 0)
    if asked == "bf16" and lacks_bf16:
        raise ConfigError(
            f"precision=bf16: {_device(config, platform)} has no bf16 (it needs compute capability "
            "8.0); use precision=fp32"
        )
    if asked == "bf16":
        return Precision("bf16", "", "as precision=bf16 says")
    if lacks_bf16 and asked == "auto":
        return Precision("fp32", "", f"{_device(config, platform)} has neither FP8 nor bf16")
    return _fp8_or_instead(config, platform)


def _on_cpu(asked: str) -> Precision:
    if asked == "fp8":
        raise ConfigError(
            "precision=fp8: the CPU platform (cluster.gpus_per_node=0) has no FP8; use auto, fp32 "
            "or bf16"
        )
    word = "bf16" if asked == "bf16" else "fp32"
    reason = "the CPU platform" if asked == "auto" else f"as precision={word} says"
    return Precision(word, "", reason)


def _fp8_or_instead(config: Config, platform: Platform) -> Precision:
    """FP8, or bf16 if `auto` may take it instead."""
    is_auto = config.precision == "auto"
    if is_auto and platform.capability is None:
        return Precision("bf16", "", "the GPU is not known; name it with cluster.gpu")
    named = config.fp8.recipe
    recipe = best_recipe(platform) if named == "auto" else named
    problem = _recipe_problem(config, recipe, platform)
    device = _device(config, platform)
    if not problem:
        how = f"fp8.recipe={recipe}" if named == recipe else f"recipe {recipe} of fp8.recipe=auto"
        return Precision("bf16", recipe, f"{device} has FP8; {how}")
    has_fp8 = platform.capability is None or platform.capability >= (8, 9)
    if is_auto and (named == "auto" or not has_fp8):
        return Precision("bf16", "", problem)
    setting = "precision=fp8" if named == "auto" else f"fp8.recipe={named}"
    raise ConfigError(f"{setting}: {problem}; {_choices(platform)}")


def best_recipe(platform: Platform) -> str:
    """What `fp8.recipe=auto` takes; `tensorwise`, whose needs are the least, if nothing fits."""
    for name, recipe in FP8_RECIPES.items():
        known = platform.capability or (9, 0)
        if recipe.capability <= known < recipe.below and not _version_problem(recipe, platform):
            return name
    return "tensorwise"


def _recipe_problem(config: Config, name: str, platform: Platform) -> str:
    """Why the platform cannot do the recipe; empty if it can."""
    recipe = FP8_RECIPES[name]
    capability = platform.capability
    device = _device(config, platform)
    if capability is not None and capability < (8, 9):
        return f"{device} has no FP8 (Transformer Engine needs compute capability 8.9 or newer)"
    if capability is not None and not recipe.capability <= capability < recipe.below:
        needs = f"compute capability {_dotted(recipe.capability)} or newer"
        if recipe.below != _NEVER:
            needs += f", below {_dotted(recipe.below)}"
        return f"{device} has no {name} scaling (Transformer Engine needs {needs})"
    return _version_problem(recipe, platform)


def _version_problem(recipe: Fp8Recipe, platform: Platform) -> str:
    for what, have, need in (
        ("Transformer Engine", platform.te_version, recipe.te_version),
        ("CUDA", platform.cuda_version, recipe.cuda_version),
    ):
        if have is not None and have < need:
            return f"{recipe.name} scaling needs {what} {_dotted(need)}, this is {_dotted(have)}"
    return ""


def _choices(platform: Platform) -> str:
    """What can be used instead."""
    works = [
        recipe.name
        for recipe in FP8_RECIPES.values()
        if platform.capability is not None
        and recipe.capability <= platform.capability < recipe.below
        and not _version_problem(recipe, platform)
    ]
    bf16 = "precision=bf16, or precision=auto with fp8.recipe=auto (FP8 where the device has it)"
    return f"use {bf16}" + (f", or fp8.recipe={' | '.join(works)}" if works else "")


def _device(config: Config, platform: Platform) -> str:
    if platform.capability is None:
        return "the GPU"
    sm = f"sm_{platform.capability[0]}{platform.capability[1]}"
    return f"{config.cluster.gpu} ({sm})" if config.cluster.gpu in GPUS else f"this GPU ({sm})"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def named_platform(config: Config) -> Platform:
    """What `cluster.gpu` says; for everybody who has not asked the driver."""
    gpu = GPUS.get(config.cluster.gpu)
    return Platform(gpu.capability if gpu else None)


def token_multiple(config: Config, precision: Precision) -> int:
    """What the number of tokens of a packed micro-batch must be a multiple of.

    Every context-parallel rank gets an equal part, sequence parallelism splits that over the
    tensor-parallel ranks, and what is left on one rank are the rows of FP8 matrix products.
    """
    rows = FP8_RECIPES[precision.fp8_recipe].token_multiple if precision.fp8_recipe else 1
    parallel = config.parallel
    return rows * parallel.context * (parallel.tensor if parallel.sequence else 1)


def check_precision(config: Config) -> list[str]:
    """Violations of `precision` and `fp8` that the configuration alone shows."""
    if config.precision not in PRECISIONS or config.fp8.recipe not in ("auto", *FP8_RECIPES):
        return []  # reported as what they are: words that are no choices
    problems: list[str] = []
    try:
        precision = decide_precision(config, named_platform(config))
    except ConfigError as error:
        return [str(error)]
    layers = config.fp8.first_last_layers_bf16
    if precision.fp8_recipe == "delayed" and layers:
        problems.append(
            f"fp8.first_last_layers_bf16={layers}: delayed scaling cannot leave layers in bf16; "
            "use 0 or another fp8.recipe"
        )
    if config.fp8.params and config.precision in ("fp32", "bf16"):
        problems.append(
            f"fp8.params=true: weights in FP8 need precision=fp8 or auto, not {config.precision}"
        )
    return problems
