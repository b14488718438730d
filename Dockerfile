# tidali on a machine with an NVIDIA GPU. Not built or run by its authors: they had neither Docker nor a GPU.
#
#   docker build -t tidali .
#   docker run --rm --gpus all -v "$PWD":/work tidali doctor
#
# torch's wheels hold the CUDA libraries; the host needs a driver (580 or newer for CUDA 13) and NVIDIA's container toolkit.
FROM python:3.12-slim

# gcc: torch.compile's Triton and tidali's resampler on the CPU compile with it when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir '/src[s3]' && rm -rf /src

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
WORKDIR /work
ENTRYPOINT ["tidali"]
CMD ["--help"]
