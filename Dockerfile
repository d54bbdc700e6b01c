# syntax=docker/dockerfile:1
# One image for every role: SGLang in the base image's own Python, the trainer in a second one.
# `docker build .` makes it; `--target cpu` makes the small one of the quickstart. See docs/docker.md.
#
# Bases are arguments, so that a digest can take the place of a tag (docs/docker.md says how). The
# first must be a CUDA 13 image of the SGLang version that pyproject.toml pins.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.20
ARG NODE_IMAGE=node:22.12.0-bookworm-slim
ARG PYTHON_IMAGE=python:3.11.7-slim-bookworm

# The web search server of recipes/web_search.yaml, from its lock file.
FROM ${NODE_IMAGE} AS search
WORKDIR /serper
COPY tools/serper/package.json tools/serper/package-lock.json ./
RUN npm ci --omit=dev --ignore-scripts --no-audit --no-fund

# The trainer's environment; compilers and sources stay in this stage.
FROM ${SGLANG_IMAGE} AS build
# megatron-core 0.16.1 asks for at least 2.9 and less than 2.12.
ARG TRANSFORMER_ENGINE_VERSION=2.11.0
# The newest that this Transformer Engine takes; with 2.8.3.post1 it falls back to cuDNN.
ARG FLASH_ATTN_VERSION=2.8.3
# The project called apex on the package index is not NVIDIA's.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
# A100 and A800 are 8.0; H100, H200 and H800 are 9.0.
ARG CUDA_ARCHITECTURES="8.0 9.0"
ARG FLASH_ATTN_ARCHITECTURES="80;90"
ARG BUILD_JOBS=8
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Versions of the distribution are those of the base image, which a digest pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/trainer
ENV PATH=/opt/trainer/bin:${PATH}

# Dependencies first: they change less often than the package and take long to build.
WORKDIR /src
COPY pyproject.toml LICENSE ./
COPY requirements requirements
COPY megatron_matpo/__init__.py megatron_matpo/__init__.py
# What pyproject.toml does not pin, the constraints do.
RUN pip install --constraint requirements/trainer-cpu.txt ".[trainer]" -r requirements/launch.txt \
    && pip install --no-deps -r requirements/launch-nodeps.txt \
    && pip uninstall -y megatron_matpo \
    && pip install --requirement requirements/image-build.txt
RUN MAX_JOBS="${BUILD_JOBS}" NVTE_FRAMEWORK=pytorch TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install --no-build-isolation \
    "transformer_engine[pytorch,core_cu13]==${TRANSFORMER_ENGINE_VERSION}"
RUN MAX_JOBS="${BUILD_JOBS}" FLASH_ATTENTION_FORCE_BUILD=TRUE \
    FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_ARCHITECTURES}" \
    pip install --no-build-isolation "flash-attn==${FLASH_ATTN_VERSION}"
RUN git clone --filter=blob:none https://github.com/NVIDIA/apex /tmp/apex \
    && git -C /tmp/apex checkout "${APEX_COMMIT}" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${BUILD_JOBS}" \
        TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
        pip install --no-build-isolation /tmp/apex \
    && rm -rf /tmp/apex

# The quickstart on CPUs: both environments as `make setup` makes them.
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=... (PyTorch's index of CPU wheels)
FROM ${PYTHON_IMAGE} AS cpu
ARG PIP_EXTRA_INDEX_URL=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY --from=search /usr/local/bin/node /usr/local/bin/node
WORKDIR /opt/megatron_matpo
COPY . .
COPY --from=search /serper/node_modules tools/serper/node_modules
RUN PIP_NO_CACHE_DIR=1 tools/setup.sh \
    && useradd --create-home --uid 10001 matpo \
    && install -d -m 1777 /runs /home/matpo && ln -s /runs runs
ENV PATH=/opt/megatron_matpo/.venv/bin:${PATH} HOME=/home/matpo
USER 10001
RUN matpo doctor --preflight recipes/quickstart.yaml
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s --retries=3 \
    CMD ["python", "-m", "megatron_matpo.doctor.health", "/runs"]
ENTRYPOINT ["matpo"]
CMD ["--help"]

FROM ${SGLANG_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY --from=build /opt/trainer /opt/trainer
COPY --from=search /usr/local/bin/node /usr/local/bin/node
WORKDIR /opt/megatron_matpo
COPY . .
COPY --from=search /serper/node_modules tools/serper/node_modules
RUN /opt/trainer/bin/pip install --no-cache-dir --no-build-isolation --no-deps -e . \
    # SGLang's router (`rollout.router: sglang`), which not every image of SGLang has.
    && python3 -m pip install --no-cache-dir --no-deps --break-system-packages \
        --requirement requirements/rollout-router.txt \
    # `rollout.python` of the recipes: a script, because a link would not find the packages of the
    # Python that it points to if that is itself a virtual environment.
    && mkdir -p .venv-rollout/bin \
    && printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v python3)" > .venv-rollout/bin/python \
    && chmod +x .venv-rollout/bin/python \
    && useradd --create-home --uid 10001 matpo \
    # Pyxis and `--user` run it as somebody else, who also needs a home and a place for runs.
    && install -d -m 1777 /runs /home/matpo \
    && ln -s /runs runs
# Enroot shows a container InfiniBand only if it asks (its hook 99-mellanox.sh), as it does for GPUs.
ENV PATH=/opt/trainer/bin:${PATH} HOME=/home/matpo MELLANOX_VISIBLE_DEVICES=all
USER 10001
# Everything that needs no GPU: versions, imports, Node.
RUN matpo doctor --build
# Unhealthy: a run in /runs has a failed process, or has written nothing for half an hour.
HEALTHCHECK --interval=60s --timeout=30s --start-period=600s --retries=3 \
    CMD ["python", "-m", "megatron_matpo.doctor.health", "/runs"]
ENTRYPOINT ["matpo"]
CMD ["--help"]
