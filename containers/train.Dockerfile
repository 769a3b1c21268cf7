# The steps that run a model: base, sft, reward, cost, rl, evaluate, infer.
#
# BASE_IMAGE needs Python 3.11 or 3.12 with venv. By digest: --build-arg BASE_IMAGE=...@sha256:...
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY containers/install.sh containers/requirements.py containers/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    containers/install.sh libraries train
COPY README.md LICENSE ./
COPY pipeline pipeline
COPY components components
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    containers/install.sh project

FROM ${BASE_IMAGE}
# DeepSpeed compiles its kernels when they are first used. Debian removes old versions from its mirrors, so a version
# of g++ that is named here would not be there for long: BASE_IMAGE by digest is what pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin plumbline
# /tmp is all that has to be writable: caches lie below HOME. LOGNAME serves those who ask for the name of a user that
# /etc/passwd does not have.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    TMPDIR=/tmp \
    LOGNAME=plumbline \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/project/opt/venv /opt/venv
USER 10001:10001
WORKDIR /tmp
CMD ["python", "-m", "components", "--help"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="plumbline/train" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
