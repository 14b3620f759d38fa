# The harness without a GPU: front, workers, Locust, and the commands. From the top of the checkout:
#   docker build -f ops/docker/harness.Dockerfile -t speech/harness:0.1.0 .
ARG PYTHON_IMAGE=python:3.12.10-slim-bookworm
FROM ${PYTHON_IMAGE}
ARG TORCH="torch>=2.11,<=2.13"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Packages of object storage: s3fs for s3://, gcsfs for gs://, adlfs for az://.
ARG STORAGE="s3fs>=2024.6"
COPY . /src
RUN python3 -m venv /opt/harness
ENV PATH=/opt/harness/bin:$PATH HOME=/tmp XDG_STATE_HOME=/tmp/state
# Versions are bounded by pyproject.toml and the argument.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" "${TORCH}" \
    && python3 -m pip install --no-cache-dir /src "${STORAGE}"
# Compiled functions are cached beside the code, which cannot be written later.
RUN python3 -m harness.capacity.ready \
    && harness scenarios --copy /scenarios
USER 1000:1000
WORKDIR /tmp
EXPOSE 8080 8089 5557
CMD ["harness", "--help"]
