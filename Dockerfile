# A service for many videos (docs/web.md), for NVIDIA GPUs or for a CPU:
#
#     docker build --target cuda -t infinitetalk .
#     docker build --target cpu -t infinitetalk:cpu .
#
# compose.yaml runs it. What is installed, tools/container_setup.sh says.
FROM python:3.12-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . /src
EXPOSE 8000
# Healthy while a worker lives.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import json, urllib.request as web; raise SystemExit(json.load(web.urlopen('http://127.0.0.1:8000/health', timeout=5))['alive'] == 0)"]
ENTRYPOINT ["infinitetalk"]
# Other machines reach it: without a file of tokens it ends with a sentence.
CMD ["serve", "/data", "--host", "0.0.0.0", "--tokens", "/run/secrets/tokens"]

FROM base AS cpu
ARG EXTRAS=web
RUN CONTAINER=1 EXTRAS="$EXTRAS" sh /src/tools/container_setup.sh cpu
USER infinitetalk
VOLUME /data

# The last one is built where no target is named.
FROM base AS cuda
ARG EXTRAS=web
# What the NVIDIA Container Toolkit brings in from the host: the driver, for computing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN CONTAINER=1 EXTRAS="$EXTRAS" sh /src/tools/container_setup.sh cuda
USER infinitetalk
VOLUME /data
