"""The model's parts with random or released weights.

Every parameter is filled by a generator seeded with its own full name, so that a stage which builds one part alone
gets the same numbers as one that builds the whole model with the same seed.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from harness.errors import InputError
from harness.vibevoice.kernels.cuda_graphs import BATCHES
from harness.vibevoice.stages import networks
from harness.vibevoice.stages.configuration import config_of

COMPILED_HIDDEN_SIZE = 256  # the largest model whose networks are compiled
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


def dtype_on(device: torch.device, dtype: str) -> torch.dtype:
    """The dtype of a stage; ``auto`` is float32 on a CPU and bfloat16 elsewhere. Raises InputError."""
    if dtype == AUTO:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: use {AUTO}, {', '.join(DTYPES)}")
    return DTYPES[dtype]


class Weights:
    """Builds the model's parts one by one, from a checkpoint folder or at random by seed.

    ``checkpoint`` is a folder in the layout of ``vibevoice/VibeVoice-1.5B-hf``: config.json and safetensors. ``plain``
    disables compiled networks and CUDA graphs: see ``compiled`` and ``graphs.Graphs`` (on a GPU, ragged.py and
    fused_rows.py are always used). ``graph_batch``: the largest batch that becomes a graph on a GPU. ``dtype`` is a
    name of ``DTYPES``, or ``auto``: see ``dtype_on``. Random numbers are drawn in float32 on ``drawn_on`` (default: the
    device itself): generators of different devices give different numbers. Device ``meta`` builds shapes without
    contents.
    """

    def __init__(
        self,
        preset: str = "tiny",
        seed: int = 0,
        checkpoint: str = "",
        device: str = "cpu",
        plain: bool = False,
        dtype: str = AUTO,
        drawn_on: str | None = None,
        graph_batch: int | None = None,
    ):
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.config = config_of(preset, checkpoint)
        self.seed, self.plain = seed, plain
        self.device, self.drawn_on = torch.device(device), torch.device(drawn_on or device)
        self.dtype = dtype_on(self.device, dtype)
        no_graphs = self.device.type != "cuda" or plain
        self.graph_batch = 0 if no_graphs else BATCHES[-1] if graph_batch is None else graph_batch

    def compiled(self, network: str, plain):
        """The compiled version of a network ("towers.CompiledTower"); None where it is not used or cannot be compiled.

        It is used on a CPU, for models that fit in its cache. A larger model waits for memory or for torch's large
        products, which are as fast, and its weights would be in memory twice.
        """
        text = self.config.text_config
        small = text.hidden_size <= COMPILED_HIDDEN_SIZE
        whole = text.hidden_size // text.num_attention_heads % 8 == 0  # heads that fill whole vectors
        taken = self.device.type == "cpu" and self.dtype == torch.float32 and not self.plain
        if not (taken and small and whole):
            return None
        module, _, name = network.partition(".")
        try:
            return getattr(import_module(f"harness.vibevoice.compiled.{module}"), name)(plain)
        except Exception as error:  # numba or its LLVM does not support this machine or its packages
            print(f"{network} is not compiled, and slower, because compilation failed: {error!r}", flush=True)
            return None

    def backbone(self) -> nn.Module:
        return self._ready(lambda: networks.Qwen2(self.config.text_config), "model.language_model.")

    def head_rows(self, token_ids: list[int]) -> torch.Tensor:
        """Rows of the output matrix for the few legal tokens: float [tokens, hidden]."""
        tied = self.config.text_config.tie_word_embeddings
        name = "model.language_model.embed_tokens.weight" if tied else "lm_head.weight"
        shape = (self.config.text_config.vocab_size, self.config.text_config.hidden_size)
        return self._values(name, shape)[token_ids].to(self.dtype)

    def acoustic_connector(self) -> nn.Module:
        sizes = self.config.audio_config.hidden_size, self.config.text_config.hidden_size
        return self._ready(lambda: networks.Connector(*sizes), "model.multi_modal_projector.")

    def semantic_connector(self) -> nn.Module:
        sizes = self.config.semantic_model_config.hidden_size, self.config.text_config.hidden_size
        return self._ready(lambda: networks.Connector(*sizes), "model.semantic_connector.")

    def diffusion_head(self) -> nn.Module:
        config = self.config.diffusion_head_config
        return self._ready(lambda: networks.DiffusionHead(config), "model.diffusion_head.")

    def acoustic_decoder(self) -> nn.Module:
        config = self.config.audio_config.decoder_config
        return self._ready(lambda: networks.Decoder(config), "model.audio_tower.decoder.")

    def acoustic_encoder(self) -> nn.Module:
        config = self.config.audio_config.encoder_config
        return self._ready(lambda: networks.Encoder(config), "model.audio_tower.encoder.")

    def semantic_encoder(self) -> nn.Module:
        config = self.config.semantic_model_config
        return self._ready(lambda: networks.Encoder(config), "model.semantic_tokenizer_encoder.")

    def latent_scale_and_bias(self) -> tuple[float, float]:
        """Factors that map the encoder's latents to the diffusion head's: (z + bias) * scale."""
        if not self.checkpoint:
            return RANDOM_LATENT_SCALE, RANDOM_LATENT_BIAS
        return tuple(float(self._tensor(f"model.latent_{name}_factor")) for name in ("scaling", "bias"))

    def parameters(self) -> dict[str, int]:
        """Number of parameters per stage: of the LLM, the diffusion head, the vocoder, the voice encoder."""
        shapes = copy(self)
        shapes.device, shapes.checkpoint = torch.device("meta"), None
        parts = {
            "llm": (shapes.backbone(), shapes.acoustic_connector(), shapes.semantic_connector()),
            "diffusion": (shapes.diffusion_head(),),
            "vocoder": (shapes.acoustic_decoder(), shapes.semantic_encoder()),
            "voice": (shapes.acoustic_encoder(),),
        }
        count = lambda module: sum(each.numel() for each in module.parameters())  # noqa: E731
        return {stage: sum(map(count, modules)) for stage, modules in parts.items()}

    def _ready(self, build, prefix: str) -> nn.Module:
        """The module with its parameters in this dtype; its buffers keep theirs.

        Rounding the frequencies of a position or a timestep to bfloat16 would turn the angles by radians.
        """
        with torch.device(self.device), _default_dtype(self.dtype):
            module = build()
        for name, parameter in module.named_parameters():
            values = self._values(prefix + name, parameter.shape)
            if values.shape != parameter.shape:
                raise InputError(
                    f"{self.checkpoint} has other sizes than its config.json: {prefix}{name} is {tuple(values.shape)}, "
                    f"not {tuple(parameter.shape)}"
                )
            parameter.data = values.to(self.dtype)  # one by one: a large model is never in memory twice
        return module.eval().requires_grad_(False)

    def _values(self, name: str, shape) -> torch.Tensor:
        """A parameter by its full name, on this device: from the checkpoint, or random in float32."""
        if self.checkpoint:
            return self._tensor(name)
        if self.device.type == "meta":
            return torch.empty(shape, device=self.device)
        return _random_tensor(name, shape, self.seed, self.drawn_on).to(self.device)

    def _tensor(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        index = self.checkpoint / "model.safetensors.index.json"
        try:
            file = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
            with safe_open(self.checkpoint / file, framework="pt", device=str(self.device)) as tensors:
                return tensors.get_tensor(name)
        except Exception as error:
            raise InputError(f"checkpoint {self.checkpoint} holds no readable tensor {name}: {error!r}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


RANDOM_LATENT_SCALE = 0.2
RANDOM_LATENT_BIAS = -0.05


def randomise_(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill a module's parameters in place by seed and full name; see ``_random_tensor`` for the sizes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_random_tensor(prefix + name, parameter.shape, seed, parameter.device))


def _random_tensor(name: str, shape, seed: int, device) -> torch.Tensor:
    """Matrices of unit gain (fan-in), norms near one, biases near zero.

    The diffusion head's modulation and the layer scales stay small, as networks of these kinds are initialised.
    With all gains at one the frame loop is chaotic, and float32 noise of 1e-6 grows to 1 within 100 frames.
    """
    if name.endswith("latent_scaling_factor"):
        return torch.tensor(RANDOM_LATENT_SCALE, device=device)
    if name.endswith("latent_bias_factor"):
        return torch.tensor(RANDOM_LATENT_BIAS, device=device)
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()) + seed)
    noise = torch.randn(*shape, generator=generator, device=device)
    if len(shape) > 1:
        modulation = "diffusion_head" in name and name.endswith((".linear.weight", ".linear_1.weight"))
        return noise * (0.1 if modulation else 1.0) / math.sqrt(math.prod(shape[1:]))
    centre = 0.0 if name.endswith("bias") else 0.1 if "gamma" in name else 1.0
    return centre + 0.02 * noise
