# llmcli with the versions of constraints.txt.
#   docker build -t llmcli .                               for a CPU
#   docker build -t llmcli:cuda --build-arg DEVICE=cuda .  for an NVIDIA GPU
#   docker run -i --rm --gpus all -v llmcli:/cache llmcli:cuda generate --lines < prompts.txt

ARG PYTHON=3.14

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
ARG EXTRAS=openai
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/llmcli
WORKDIR /source
# PyTorch, the largest part, is a layer of its own. On PyPI, it includes CUDA; its dependencies come from PyPI.
COPY constraints.txt .
RUN if [ "$DEVICE" = cpu ]; then index="--extra-index-url https://download.pytorch.org/whl/cpu"; fi \
    && /opt/llmcli/bin/pip install --constraint constraints.txt $index torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/llmcli/bin/pip install --constraint constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/llmcli /opt/llmcli
RUN useradd --create-home llmcli && install --directory --owner llmcli /cache
USER llmcli
WORKDIR /home/llmcli
ENV PATH=/opt/llmcli/bin:$PATH LLMCLI_CACHE=/cache/llmcli HF_HOME=/cache/huggingface
VOLUME /cache
ENTRYPOINT ["llmcli"]
