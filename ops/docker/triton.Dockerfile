# Triton with the models of this project, from the top of the checkout:
#   docker build -f ops/docker/triton.Dockerfile -t speech/triton:0.1.0 .
# Any image with tritonserver, its Python backend and Python 3.11 or 3.12 will do.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:25.04-py3
FROM ${TRITON_IMAGE}
ARG TORCH="torch>=2.11,<=2.13"
# The launchers of kernels are compiled when a server starts: gcc and Python's headers stay. Distributions keep one version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /opt/harness
# Triton's stub takes packages from the first python3 on PATH. Nothing but /tmp and mounted folders can be written.
ENV PATH=/opt/harness/bin:$PATH HOME=/tmp XDG_STATE_HOME=/tmp/state OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Versions are bounded by pyproject.toml and the argument.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir "${TORCH}" \
    && python3 -m pip install --no-cache-dir /src
RUN python3 -m harness.deploy.container --help
USER 1000:1000
WORKDIR /tmp
EXPOSE 8001 8002
ENTRYPOINT ["python3", "-m", "harness.deploy.container"]
CMD ["serve"]
