# The worldline page: docker build -t worldline . && docker run --rm -p 8765:8765 worldline
# The container prints the address with its token, without which the page refuses. In the printed address stands the
# container's name; on the machine that runs it, 127.0.0.1 takes its place.
FROM python:3.12-slim-bookworm

# OpenCV, which draws the true PushT world, links these two.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# With CUDA: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 -t worldline:cuda .
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url "$TORCH_INDEX" torch
COPY src ./src
ARG EXTRAS=envs
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]" \
    && useradd --create-home worldline
USER worldline
WORKDIR /home/worldline
EXPOSE 8765
ENTRYPOINT ["worldline"]
CMD ["play", "host=0.0.0.0", "port=8765"]
