"""Batches for the shrunk models: text where that is enough, and what else a class cannot do without."""

from typing import Any

import torch
from torch import Tensor

_ROWS, _LENGTH, _TARGETS = 3, 12, 7
_IDS = (3, 100)  # plain tokens; special ids are smaller, or near the end of the vocabulary
_IMAGE = 32


def batch(model: torch.nn.Module, *, encoder_decoder: bool, padded: bool = True, seed: int = 0) -> dict[str, Any]:
    """Rows, right-padded unless told otherwise, labels with ignored places, and what ``_EXTRA`` has for the type."""
    generator = torch.Generator().manual_seed(seed)
    input_ids, attention_mask = _ragged(_ROWS, _LENGTH if padded else -_LENGTH, generator)
    positions = torch.arange(_LENGTH)
    prompt = torch.tensor([3, 1, 0])
    labels = input_ids.masked_fill((attention_mask == 0) | (positions < prompt[:, None]), -100)
    labels[0, 6] = -100
    if encoder_decoder:
        labels, mask = _ragged(_ROWS, _TARGETS, generator)
        labels = labels.masked_fill(mask == 0, -100)
        labels[0, 3] = -100
    found = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    extra = _EXTRA.get(model.config.model_type)
    if extra is not None:
        found = extra(found, model.config, generator)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in found.items()}


def _ragged(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    padding, length = (0, 4, 1) if length > 0 else (0, 0, 0), abs(length)
    ids = torch.randint(*_IDS, (rows, length), generator=generator)
    mask = (torch.arange(length) < length - torch.tensor(padding)[:rows, None]).long()
    return ids.where(mask.bool(), 0), mask


def _pixels(config, generator, *shape: int) -> Tensor:
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = getattr(vision, "image_size", None) or _IMAGE
    size = size if isinstance(size, int) else size[0]
    return torch.randn(_ROWS, *shape, getattr(vision, "num_channels", 3), size, size, generator=generator)


def _with_pixels(found, config, generator):
    return {**found, "pixel_values": _pixels(config, generator)}


def _decoder_ids_too(found, config, generator):
    found = _only_pixels(found, config, generator)
    return {**found, "decoder_input_ids": found["labels"].roll(1, 1).clamp(min=3)}


def _labels_as_long_as_ids(found, config, generator):
    return {**found, "labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}


def _only_pixels(found, config, generator):
    return {"pixel_values": _pixels(config, generator), "labels": found["labels"]}


def _image_tokens(found, config, count: int):
    """The first ``count`` tokens of every row stand for the picture."""
    names = ("image_token_id", "image_token_index", "video_token_index")
    image_id = next(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    return {
        **found,
        "input_ids": found["input_ids"].index_fill(1, torch.arange(count), image_id),
        "labels": found["labels"].index_fill(1, torch.arange(count), -100),
    }


def _with_queries(found, config, generator):
    if not getattr(config, "is_encoder_decoder", False):
        frames = 2 if config.model_type.endswith("video") else 1
        found = _image_tokens(found, config, frames * config.num_query_tokens)
    return {**found, "pixel_values": _pixels(config, generator)}


def _with_qformer(found, config, generator):
    found = _with_queries(found, config, generator)
    ids = torch.randint(*_IDS, (_ROWS, 5), generator=generator)
    return {**found, "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _with_video(found, config, generator):
    found = _with_qformer(found, config, generator)
    return {**found, "pixel_values": _pixels(config, generator, 2)}


def _idefics(found, config, generator):
    mask = torch.ones(_ROWS, _LENGTH, 1, dtype=torch.long)
    return {**found, "pixel_values": _pixels(config, generator, 1), "image_attention_mask": mask}


def _kosmos2(found, config, generator):
    positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.long)
    positions[:, 1 : 1 + config.latent_query_num] = 1
    return {**found, "pixel_values": _pixels(config, generator), "image_embeds_position_mask": positions}


def _patches(found, config, generator):
    vision = config.vision_config
    patches = torch.randn(_ROWS, 6, 2 + vision.patch_embed_hidden_size, generator=generator)
    patches[..., :2] = torch.arange(6)[:, None].float()
    return {"flattened_patches": patches, "labels": found["labels"]}


def _boxes(found, config, generator):
    corner = torch.rand(_ROWS, _LENGTH, 2, generator=generator) / 2
    return {**found, "bbox": torch.cat([corner, corner + 0.3], -1)}


def _prefix(found, config, generator):
    return {**found, "token_type_ids": (torch.arange(_LENGTH) >= 3).long().expand(_ROWS, -1)}


def _codebooks(found, config, generator):
    ids = torch.randint(*_IDS, (_ROWS * config.num_codebooks, _LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids.view(_ROWS, _LENGTH, -1)}


def _audio_and_text(found, config, generator):
    ids = torch.randint(3, 40, (_ROWS, _LENGTH, config.num_codebooks + 1), generator=generator)
    return {"input_ids": ids, "labels": found["labels"]}


def _stream_of_audio(found, config, generator):
    frames = 2 * config.downsample_factor * _LENGTH  # the encoder halves them, the projector joins what is left
    return {
        **found,
        "input_features": torch.randn(_ROWS, config.audio_config.num_mel_bins, frames, generator=generator),
    }


_EXTRA = {
    "voxtral_realtime": _stream_of_audio,
    "kyutai_speech_to_text": _audio_and_text,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "paligemma": _prefix,
    "blip": _with_pixels,
    "blip-2": _with_queries,
    "instructblip": _with_qformer,
    "instructblipvideo": _with_video,
    "idefics": _idefics,
    "kosmos-2": _kosmos2,
    "pix2struct": _patches,
    "pp_formulanet": _decoder_ids_too,
    "fsmt": _labels_as_long_as_ids,
    "udop": _boxes,
    "vision-encoder-decoder": _only_pixels,
}
