# fastres in an image that runs the command:
#
#     docker build --tag fastres .
#     docker run --rm --volume "$PWD/runs:/home/fastres/runs" fastres train --recipe digits
#
# The user in the image has the id 1000, which has to be able to write to the folder that is mounted.
#
# GPU: add `--gpus all`, which needs NVIDIA's driver and its Container Toolkit on the host; torch's packages bring CUDA.
# Several processes: `docker run --ipc host --entrypoint torchrun fastres --nproc_per_node 2 -m fastres.train`. With
# `--data.loader dataloader` too, the processes need `--ipc host`, because they exchange batches in shared memory.

FROM python:3.13-slim

# g++ builds the C++ kernels; torch.compile and Triton need it too. git is left out: the image has no checkout.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /build
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fastres fastres
COPY kernels kernels
RUN pip install --no-cache-dir . && useradd --create-home --uid 1000 fastres

USER 1000
WORKDIR /home/fastres

ENTRYPOINT ["fastres"]
CMD ["--help"]
