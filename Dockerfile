# The same set-up and build as `make run`, in an image. Sandboxes need namespaces, cgroups and nftables:
#
#   docker build -t sandgate .
#   docker run --privileged --cgroupns=private -p 8080:8080 -v sandgate:/var/lib/sandgate \
#       -v sandgate-cache:/var/cache/sandgate sandgate

FROM debian:bookworm-slim AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 ca-certificates \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# The set-up changes less often than the sources, so it has its own layer.
COPY scripts/setup scripts/
COPY requirements/ requirements/
RUN scripts/setup && rm -rf /var/lib/apt/lists/*
COPY . .
ENV PATH=/src/.venv/bin:$PATH
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps --no-index --wheel-dir /dist . \
    && python3 -m venv /opt/sandgate \
    && /opt/sandgate/bin/pip install --no-cache-dir --require-hashes --requirement requirements/run.lock \
    && /opt/sandgate/bin/pip install --no-cache-dir --no-deps --no-index /dist/*.whl

FROM debian:bookworm-slim
COPY scripts/setup /usr/local/lib/sandgate/scripts/setup
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 ca-certificates \
    && /usr/local/lib/sandgate/scripts/setup --host \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/sandgate /opt/sandgate
ENV PATH=/opt/sandgate/bin:$PATH \
    SANDGATE_HOME=/var/lib/sandgate \
    SANDGATE_CACHE=/var/cache/sandgate \
    SANDGATE_LISTEN=0.0.0.0:8080 \
    SANDGATE_ADMIN_LISTEN=127.0.0.1:9090
VOLUME ["/var/lib/sandgate", "/var/cache/sandgate"]
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["sandgate"]
CMD ["serve"]
