"""The modules to trace: one per graph of the bundle, including the code around the model that belongs in the graph.

They are thin: they call the blocks of the diffusers and transformers models, whose weights keep their names.
"""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, MotionAdapter, SparseControlNetModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers import CLIPTextModel

from .module_replacement import FrameCount, GroupNorm, normalize_over_clips, replace_modules
from .temporal_transformer import TemporalNorm, TemporalTransformer, replace_temporal_transformers
from .text_attention import SharedTextAttnProcessor
from .upsampling import Upsampler


class TextEncoder(nn.Module):
    """CLIP's text encoder.

    Inputs: input_ids [B, 77] int64; attention_mask [B, 77] int64, 0 for tokens that no token looks at, else 1;
    clip_skip [1] int64, the last layers whose result is skipped, from 0 to all but one.
    Output: prompt_embeds [B, 77, D].
    """

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model
        length = model.config.max_position_embeddings
        self.hidden = torch.finfo(torch.float32).min
        mask = torch.full((length, length), self.hidden).triu(1)
        self.register_buffer("causal_mask", mask[None, None], persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, clip_skip: torch.Tensor) -> torch.Tensor:
        mask = torch.where(attention_mask[:, None, None] == 0, self.hidden, self.causal_mask)  # [B, 1, 77, 77]
        states = self.model.embeddings(input_ids=input_ids)
        results = []
        for layer in self.model.encoder.layers:
            states = layer(states, mask)
            results.append(states)
        chosen = torch.stack(results).index_select(0, len(results) - 1 - clip_skip)  # [1, B, 77, D]
        return self.model.final_layer_norm(chosen[0])


def _prepare(model: nn.Module, temporal_norm: TemporalNorm) -> None:
    """Installs this package's attention, temporal transformers and group norms; the weights keep their names."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(SharedTextAttnProcessor())
    replace_temporal_transformers(model, temporal_norm)
    replace_modules(model, nn.GroupNorm, GroupNorm)


class SparseCtrl(nn.Module):
    """SparseCtrl: the residuals of all frames, computed from distinct frames: the keyframes and a blank one.

    SparseCtrl (Guo et al. 2023, arXiv:2311.16933) sets its latent input to zero, so its input convolution reduces to
    the bias, and all frames without a keyframe are equal until the first temporal layer. The layers before that one
    run on the U distinct frames, which are then gathered to F.

    Inputs: timestep [1]; prompt_embeds [B, T, D]; conditioning, uint8 pixels [U, H, W, 3] for scribbles or latents
    [U, 4, h, w] for rgb keyframes; conditioning_mask [U], 1 for a keyframe and 0 for the blank; frame_index [F] int64,
    each frame's index in U.
    Outputs: the residuals of the down blocks and the middle block, each [B*F, C, h, w].
    """

    def __init__(self, model: SparseControlNetModel, temporal_norm: TemporalNorm) -> None:
        super().__init__()
        _prepare(model, temporal_norm)
        self.model = model

    def forward(
        self,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        conditioning: torch.Tensor,
        conditioning_mask: torch.Tensor,
        frame_index: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        model = self.model
        batch, num_frames = prompt_embeds.shape[0], frame_index.shape[0]
        temb = model.time_embedding(model.time_proj(timestep))  # [1, T], the same for every frame

        if not model.use_simplified_condition_embedding:
            conditioning = conditioning.float().permute(0, 3, 1, 2) / 255
        if model.config.controlnet_conditioning_channel_order == "bgr":
            conditioning = conditioning.flip(1)
        if model.concat_conditioning_mask:
            mask = conditioning_mask[:, None, None, None].expand(-1, 1, *conditioning.shape[2:])
            conditioning = torch.cat([conditioning, mask], dim=1)
        sample = model.controlnet_cond_embedding(conditioning) + model.conv_in.bias[None, :, None, None]

        def to_all_frames(states: torch.Tensor) -> torch.Tensor:  # [B*U, ...] -> [B*F, ...]
            clips = states.reshape(batch, -1, *states.shape[1:])
            return clips.index_select(1, frame_index).reshape(-1, *states.shape[1:])

        first, *others = model.down_blocks
        sample = sample.expand(batch, *sample.shape).reshape(-1, *sample.shape[1:])  # [B*U, C, h, w]
        residuals = [to_all_frames(model.controlnet_down_blocks[0](sample))]
        states = []
        for layer, (resnet, motion_module) in enumerate(zip(first.resnets, first.motion_modules, strict=True)):
            sample = resnet(sample, temb)
            if hasattr(first, "attentions"):
                sample = first.attentions[layer](sample, prompt_embeds, return_dict=False)[0]
            if layer == 0:
                sample = to_all_frames(sample)
            sample = motion_module(sample, num_frames=num_frames)
            states.append(sample)
        for downsampler in first.downsamplers or ():
            sample = downsampler(sample)
            states.append(sample)
        for block in others:
            sample, block_states = block(
                hidden_states=sample, temb=temb, encoder_hidden_states=prompt_embeds, num_frames=num_frames
            )
            states += block_states
        sample = model.mid_block(sample, temb, encoder_hidden_states=prompt_embeds)
        residuals += [project(state) for project, state in zip(model.controlnet_down_blocks[1:], states, strict=True)]
        return *residuals, model.controlnet_mid_block(sample)


class UNet(nn.Module):
    """The UNet with its motion modules: the prediction of one step, for each prompt of a batch.

    The residuals are scaled here and not in SparseCtrl's graph, so that kept residuals serve every scale.

    Inputs: latents [1, 4, F, h, w]; timestep [1]; prompt_embeds [B, T, D]; conditioning_scale [1]; the residuals of
    SparseCtrl, each of shape [B*F, C, h, w] or broadcastable to it.
    Output: prediction [B, 4, F, h, w].
    """

    def __init__(self, model: UNetMotionModel, temporal_norm: TemporalNorm) -> None:
        super().__init__()
        self.frame_count = FrameCount()
        if temporal_norm == "resnet-clip":
            normalize_over_clips(model, self.frame_count)
        _prepare(model, temporal_norm)
        replace_modules(model, Upsample2D, Upsampler)
        self.model = model

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        conditioning_scale: torch.Tensor,
        *residuals: torch.Tensor,
    ) -> torch.Tensor:
        model = self.model
        batch, num_frames = prompt_embeds.shape[0], latents.shape[2]
        self.frame_count.value = num_frames
        temb = model.time_embedding(model.time_proj(timestep))  # [1, T], the same for every frame
        sample = model.conv_in(latents[0].transpose(0, 1))  # [F, C, h, w]
        sample = sample.expand(batch, *sample.shape).reshape(-1, *sample.shape[1:])  # [B*F, C, h, w]
        shared = {"temb": temb, "encoder_hidden_states": prompt_embeds, "num_frames": num_frames}

        states = [sample]
        for block in model.down_blocks:
            sample, block_states = block(hidden_states=sample, **shared)
            states += block_states
        *down_residuals, mid_residual = (residual * conditioning_scale for residual in residuals)
        states = [state + residual for state, residual in zip(states, down_residuals, strict=True)]

        if not hasattr(model.mid_block, "motion_modules"):  # AnimateDiff v1 and v3 have none in the middle block
            sample = model.mid_block(sample, temb, encoder_hidden_states=prompt_embeds)
        else:
            sample = model.mid_block(hidden_states=sample, **shared)
        sample = sample + mid_residual

        for block in model.up_blocks:
            layers = len(block.resnets)
            skipped, states = tuple(states[-layers:]), states[:-layers]
            arguments = shared if hasattr(block, "attentions") else {"temb": temb, "num_frames": num_frames}
            size = states[-1].shape[2:] if states else None  # the last block does not upsample
            sample = block(hidden_states=sample, res_hidden_states_tuple=skipped, upsample_size=size, **arguments)

        sample = model.conv_out(model.conv_act(model.conv_norm_out(sample)))
        return sample.reshape(batch, -1, *sample.shape[1:]).transpose(1, 2)


class LcmUpdate(nn.Module):
    """Guidance and the LCM update in fp32, as in diffusers' `LCMScheduler.step`.

    This is a graph of its own so that one set of UNet weights serves requests with and without guidance. Without
    guidance, `negative` and `positive` are the same prediction, and guiding leaves it unchanged.
    Source: Latent Consistency Models, Luo et al. 2023 (arXiv:2310.04378), eq. 4 and algorithm 3.

    Inputs: latents [1, 4, F, h, w]; negative and positive, two predictions shaped like latents; guidance_scale [1];
    noise shaped like latents; coefficients [6]: sqrt(alpha), sqrt(1 - alpha), c_skip, c_out at this timestep, then
    sqrt(alpha), sqrt(1 - alpha) at the next one (1 and 0 after the last).
    Outputs: next_latents shaped like latents; images, the denoised estimate frame by frame [F, 4, h, w].
    """

    def __init__(self, prediction_type: str = "epsilon", clip_range: float | None = None) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.clip_range = clip_range

    def forward(
        self,
        latents: torch.Tensor,
        negative: torch.Tensor,
        positive: torch.Tensor,
        guidance_scale: torch.Tensor,
        noise: torch.Tensor,
        coefficients: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = negative + guidance_scale * (positive - negative)
        alpha, sigma, c_skip, c_out, next_alpha, next_sigma = coefficients.unbind()
        if self.prediction_type == "epsilon":
            original = (latents - sigma * prediction) / alpha
        elif self.prediction_type == "v_prediction":
            original = alpha * latents - sigma * prediction
        else:
            original = prediction
        if self.clip_range is not None:
            original = original.clamp(-self.clip_range, self.clip_range)
        denoised = c_out * original + c_skip * latents
        return next_alpha * denoised + next_sigma * noise, denoised[0].transpose(0, 1)


class MotionModules(nn.Module):
    """Every temporal transformer on its own: states [F, C, h, w] of each block -> the same shapes."""

    def __init__(self, model: MotionAdapter, temporal_norm: TemporalNorm) -> None:
        super().__init__()
        _prepare(model, temporal_norm)
        self.model = model

    def blocks(self) -> list[tuple[str, TemporalTransformer]]:
        """Returns the temporal transformers with their names in the checkpoint."""
        return [(name, item) for name, item in self.model.named_modules() if isinstance(item, TemporalTransformer)]

    def forward(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            block(state, num_frames=state.shape[0]) for (_, block), state in zip(self.blocks(), states, strict=True)
        )


class VaeEncoder(nn.Module):
    """image [N, H, W, 3] uint8 -> the mode of the scaled posterior, [N, 4, H/8, W/8]."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        replace_modules(model, nn.GroupNorm, GroupNorm)
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pixels = image.float().permute(0, 3, 1, 2) / 255  # TensorRT only casts uint8
        moments = self.model.encoder(2 * pixels - 1)
        if self.model.quant_conv is not None:
            moments = self.model.quant_conv(moments)
        return moments.chunk(2, dim=1)[0] * self.model.config.scaling_factor


class VaeDecoder(nn.Module):
    """latents [N, 4, h, w] -> frames [N, 8h, 8w, 3] uint8."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        replace_modules(model, nn.GroupNorm, GroupNorm)
        self.model = model

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        latents = 1 / self.model.config.scaling_factor * latents
        if self.model.post_quant_conv is not None:
            latents = self.model.post_quant_conv(latents)
        return _to_frames(self.model.decoder(latents))


class TinyDecoder(nn.Module):
    """latents [N, 4, h, w] -> frames [N, 8h, 8w, 3] uint8, with the decoder of TAESD (madebyollin/taesd).

    TAESD's scaling factor is 1: it takes the loop's latents unscaled and bounds them itself.
    """

    def __init__(self, model: AutoencoderTiny) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        if self.model.config.scaling_factor != 1:
            latents = 1 / self.model.config.scaling_factor * latents
        return _to_frames(self.model.decoder(latents))


def _to_frames(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] in -1..1 -> [N, H, W, 3] uint8."""
    pixels = (images / 2 + 0.5).clamp(0, 1)
    return (pixels * 255).round().permute(0, 2, 3, 1).to(torch.uint8)  # TensorRT has uint8 outputs only
