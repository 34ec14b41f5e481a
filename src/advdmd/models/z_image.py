"""Z-Image through diffusers' own classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advdmd.models.backbone import Backbone, Module, Pipeline, TimeEmbedding, block_outputs, chat_prompts
from advdmd.types import Cond, Json

TEXT_LENGTH = 512  # tokens of a prompt that the pipeline reads, its chat template included
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
# It counts time from noise: 1 - t.
TIME_EMBEDDING = TimeEmbedding("t_embedder", scale=-1000.0, offset=1000.0, layers=("t_embedder.mlp.0", "t_embedder.mlp.2"))


class ZImage(Backbone):
    """A ZImagePipeline as a backbone, for latents of side `side`.

    Its transformer takes lists, one latent and one caption per sample, counts time from noise (1 - t) and points from noise to
    data: all of that is converted here. Raises ValueError if the side is odd.
    """

    def __init__(self, pipe: Pipeline, side: int = 128):
        self.pipe, self.vae, self.metadata = pipe, pipe.vae, {"side": side}
        self.net: Module = pipe.transformer
        self.dtype = self.net.dtype
        self.pipeline_load_kwargs: Json = {}
        self.hidden_size, self.time_embedding = self.net.config.dim, TIME_EMBEDDING
        self.lora_targets: tuple[str, ...] = LORA_TARGETS
        self.null_prompt = ""
        self.check_latent_size(side, side)
        self.max_text_length = TEXT_LENGTH
        self.latent_shape = (self.net.config.in_channels, side, side)

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """`steps` steps and no guidance, which is scale 0 here.

        The pipeline's own grid is the student's: equal steps before a static shift.
        """
        side = self.pipe.vae_scale_factor * self.latent_shape[-1]
        return {"num_inference_steps": steps, "guidance_scale": 0.0, "height": side, "width": side}

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as a user's message."""
        return [len(ids) for ids in self.pipe.tokenizer(self._messages(prompts)).input_ids]

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoder."""
        return [self.pipe.text_encoder]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """[N, 2, L] token ids of the prompts as a user's message, and their mask; padded to the longest."""
        texts, tokenizer = self._messages(prompts), self.pipe.tokenizer
        out = tokenizer(texts, max_length=TEXT_LENGTH, padding=True, truncation=True, padding_side="right", return_tensors="pt")
        return torch.stack([out.input_ids, out.attention_mask], 1)

    def _messages(self, prompts: Sequence[str]) -> list[str]:
        return chat_prompts(self.pipe.tokenizer, prompts, enable_thinking=True)

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids and masks [N, 2, L] -> the second to last hidden states [N, L, D], zero and masked after the prompt."""
        ids = ids[..., : int(ids[:, 1].sum(1).max())]
        tokens, mask = ids[:, 0], ids[:, 1]
        hidden = self.pipe.text_encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return Cond(hidden * mask[..., None].to(hidden.dtype), mask=mask)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v = e - x0 at x [N, C, H, W], t [N]. Captions go in at their own lengths, which the transformer pads itself."""
        assert cond.mask is not None
        captions = [e[:n] for e, n in zip(cond.embeds.to(self.dtype), cond.mask.sum(1).tolist(), strict=True)]
        images = list(x.to(self.dtype).unsqueeze(2).unbind(0))
        out = net(images, 1 - t, captions, return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2).float()

    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, indices: Sequence[int]) -> list[Tensor]:
        """Image tokens [N, T, hidden_size] after the layers `indices`, which hold them before the caption's.

        Later layers are not run.
        """
        tokens = x.shape[-2] * x.shape[-1] // 4
        return [
            o[:, :tokens].float() for o in block_outputs(net, self.blocks(net), indices, lambda: self.velocity(net, x, t, cond))
        ]

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The transformer's joint layers, in order."""
        return list(net.get_submodule("layers").children())
