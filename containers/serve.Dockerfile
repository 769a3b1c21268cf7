# `plumbline serve`: the model of a serving folder, mounted at /serving, on port 8000.
#
# BASE_IMAGE needs Python 3.11 or 3.12 with venv. By digest: --build-arg BASE_IMAGE=...@sha256:...
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY containers/install.sh containers/requirements.py containers/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    containers/install.sh libraries serve
COPY README.md LICENSE ./
COPY pipeline pipeline
COPY components components
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    containers/install.sh project

FROM ${BASE_IMAGE}
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
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen(\"http://127.0.0.1:8000/healthz\", timeout=4)"]
CMD ["plumbline", "serve", "--dir", "/serving", "--host", "0.0.0.0", "--port", "8000"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="plumbline/serve" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
