# syntax=docker/dockerfile:1
# One image for every role: SGLang in the base image's own Python, the trainer in a second one.
# The base must be a CUDA 13 image of the SGLang version that pyproject.toml pins.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.20

FROM ${SGLANG_IMAGE} AS build
ARG TRANSFORMER_ENGINE_VERSION=2.11.0
# The project called apex on the package index is not NVIDIA's.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
# A100 and A800 are 8.0; H100, H200 and H800 are 9.0.
ARG CUDA_ARCHITECTURES="8.0 9.0"
ARG BUILD_JOBS=8
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN apt-get update \
    && apt-get install -y --no-install-recommends git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/trainer
ENV PATH=/opt/trainer/bin:${PATH}

# Dependencies first: they change less often than the package and take long to build.
WORKDIR /src
COPY pyproject.toml LICENSE ./
COPY megatron_matpo/__init__.py megatron_matpo/__init__.py
COPY requirements/launch.txt requirements/launch-nodeps.txt requirements/
RUN pip install ".[trainer]" -r requirements/launch.txt \
    && pip install --no-deps -r requirements/launch-nodeps.txt \
    && pip uninstall -y megatron_matpo
RUN pip install ninja packaging pybind11 setuptools wheel \
    && MAX_JOBS="${BUILD_JOBS}" NVTE_FRAMEWORK=pytorch TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
        pip install --no-build-isolation \
        "transformer_engine[pytorch,core_cu13]==${TRANSFORMER_ENGINE_VERSION}"
RUN git clone --filter=blob:none https://github.com/NVIDIA/apex /tmp/apex \
    && git -C /tmp/apex checkout "${APEX_COMMIT}" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${BUILD_JOBS}" \
        TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
        pip install --no-build-isolation /tmp/apex \
    && rm -rf /tmp/apex

FROM ${SGLANG_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY --from=build /opt/trainer /opt/trainer
WORKDIR /opt/megatron_matpo
COPY . .
RUN /opt/trainer/bin/pip install --no-cache-dir --no-build-isolation --no-deps -e . \
    # `rollout.python` of the recipes: a script, because a link would not find the packages of the
    # Python that it points to if that is itself a virtual environment.
    && mkdir -p .venv-rollout/bin \
    && printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v python3)" > .venv-rollout/bin/python \
    && chmod +x .venv-rollout/bin/python \
    && useradd --create-home --uid 10001 matpo \
    && mkdir -p /runs && chown matpo /runs \
    && ln -s /runs runs
ENV PATH=/opt/trainer/bin:${PATH}
USER matpo
ENTRYPOINT ["matpo"]
CMD ["--help"]
