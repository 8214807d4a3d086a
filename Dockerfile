# Two images from one file: `--target cpu` (the default) and `--target cuda`. docs/docker.md says how to build and run them.
#
#   BASE   any image with Python 3.11 or newer and its venv module; for `cuda` also with apt-get and Python's C headers
#   TORCH  what pip is asked for. On Linux x86-64 the plain name brings the CUDA libraries with it, which the `cuda`
#          image wants; the `cpu` image is several GB smaller with a CPU build, named by its index or by a wheel.
#   secret `pip`  an optional pip.conf, seen by pip during the build and in no layer
ARG BASE=python:3.11-slim

FROM ${BASE} AS packages
ARG TORCH=torch==2.13.0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /venv
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /venv/bin/pip install ${TORCH}
WORKDIR /source
COPY pyproject.toml ./
RUN /venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >requirements.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /venv/bin/pip install --requirement requirements.txt
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /venv/bin/pip install --no-deps .

# Runs as nobody in particular, and writes to /cache (models fetched from the Hub, compiled kernels) and /tmp only.
FROM ${BASE} AS runtime
COPY --from=packages /venv /venv
RUN mkdir --mode=0777 /cache
ENV PATH=/venv/bin:${PATH} HOME=/tmp HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton PYTHONDONTWRITEBYTECODE=1
WORKDIR /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["/venv/bin/gossamer", "serve", "--host", "0.0.0.0"]

# Triton compiles a small launcher in C when a kernel first runs, so this image carries a compiler.
FROM runtime AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_NO_CACHE_DIR=1 /venv/bin/pip install --no-deps "liger-kernel>=0.8,<0.9"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM runtime AS cpu
USER 10001:10001
