# The policy server in a container: docs/serving.md has the compose file that goes with it.
#
#   docker build -t lightwam .                            # CPU
#   docker build -t lightwam --build-arg EXTRA=cuda .     # NVIDIA GPUs; run with --gpus all
#
# The image holds the package alone. A run of train.py is mounted at /policy, the API key is a file.
FROM python:3.12-slim

ARG EXTRA=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 JAX_COMPILATION_CACHE_DIR=/cache

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements*.txt ./
COPY lightwam_jax ./lightwam_jax
RUN pip install ".${EXTRA:+[$EXTRA]}" && rm -r /src/*

# Compiled programs are kept between starts where /cache is a volume.
RUN useradd --create-home --uid 1000 robot && install -d -o robot /cache
USER robot
WORKDIR /home/robot

EXPOSE 8000
# 503 while the policy compiles; the start period covers that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "lightwam_jax.inference.server", "--workdir=/policy", "--host=0.0.0.0", "--port=8000"]
CMD ["--api_key_file=/run/secrets/api_key"]
