"""OpenMMLab's Mask2Former weights (GenEval's detector) as transformers reads them: names, split projections, one permutation.

The table reads both ways, which is how it is tested: `restored` undoes `converted`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from advdmd.files import file_hash, write_folder
from advdmd.models.backbone import Module
from advdmd.models.pretrained import check_empty, load_tensors_only

METADATA_FILE, SOURCE = "advdmd.json", "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
SWIN, PIXEL, QUERY = "model.pixel_level_module.encoder.swin", "model.pixel_level_module.decoder", "model.transformer_module"
BLOCK, ENCODER, DECODER = f"{SWIN}.encoder.layers.{{i}}.blocks.{{j}}", f"{PIXEL}.encoder.layers.{{i}}", f"{QUERY}.decoder"
THEIR_BLOCK, THEIR_PIXEL = "backbone.stages.{i}.blocks.{j}", "panoptic_head.pixel_decoder"
THEIR_ENCODER, THEIR_DECODER = f"{THEIR_PIXEL}.encoder.layers.{{i}}", "panoptic_head.transformer_decoder.layers.{i}"
NAMES = (  # {i}, {j}: indices; *: the rest of a parameter's name
    ("backbone.patch_embed.projection.*", f"{SWIN}.embeddings.patch_embeddings.projection.*"),
    ("backbone.patch_embed.norm.*", f"{SWIN}.embeddings.norm.*"),
    (f"{THEIR_BLOCK}.norm1.*", f"{BLOCK}.layernorm_before.*"),
    (f"{THEIR_BLOCK}.norm2.*", f"{BLOCK}.layernorm_after.*"),
    (
        f"{THEIR_BLOCK}.attn.w_msa.relative_position_bias_table",
        f"{BLOCK}.attention.relative_position_bias.relative_position_bias_table",
    ),
    (f"{THEIR_BLOCK}.attn.w_msa.proj.*", f"{BLOCK}.attention.o_proj.*"),
    (f"{THEIR_BLOCK}.ffn.layers.0.0.*", f"{BLOCK}.mlp.fc1.*"),
    (f"{THEIR_BLOCK}.ffn.layers.1.*", f"{BLOCK}.mlp.fc2.*"),
    ("backbone.stages.{i}.downsample.*", f"{SWIN}.encoder.layers.{{i}}.downsample.*"),
    *((f"backbone.norm{n}.*", f"model.pixel_level_module.encoder.hidden_states_norms.stage{n + 1}.*") for n in range(4)),
    (f"{THEIR_PIXEL}.input_convs.{{i}}.conv.*", f"{PIXEL}.input_projections.{{i}}.0.*"),
    (f"{THEIR_PIXEL}.input_convs.{{i}}.gn.*", f"{PIXEL}.input_projections.{{i}}.1.*"),
    (f"{THEIR_PIXEL}.level_encoding.weight", f"{PIXEL}.level_embed"),
    (f"{THEIR_ENCODER}.self_attn.*", f"{ENCODER}.self_attn.*"),
    (f"{THEIR_ENCODER}.ffn.layers.0.0.*", f"{ENCODER}.fc1.*"),
    (f"{THEIR_ENCODER}.ffn.layers.1.*", f"{ENCODER}.fc2.*"),
    (f"{THEIR_ENCODER}.norms.0.*", f"{ENCODER}.self_attn_layer_norm.*"),
    (f"{THEIR_ENCODER}.norms.1.*", f"{ENCODER}.final_layer_norm.*"),
    (f"{THEIR_PIXEL}.lateral_convs.0.conv.*", f"{PIXEL}.adapter_1.0.*"),
    (f"{THEIR_PIXEL}.lateral_convs.0.gn.*", f"{PIXEL}.adapter_1.1.*"),
    (f"{THEIR_PIXEL}.output_convs.0.conv.*", f"{PIXEL}.layer_1.0.*"),
    (f"{THEIR_PIXEL}.output_convs.0.gn.*", f"{PIXEL}.layer_1.1.*"),
    (f"{THEIR_PIXEL}.mask_feature.*", f"{PIXEL}.mask_projection.*"),
    (f"{THEIR_DECODER}.cross_attn.attn.*", f"{DECODER}.layers.{{i}}.cross_attn.*"),
    (f"{THEIR_DECODER}.self_attn.attn.out_proj.*", f"{DECODER}.layers.{{i}}.self_attn.out_proj.*"),
    (f"{THEIR_DECODER}.ffn.layers.0.0.*", f"{DECODER}.layers.{{i}}.fc1.*"),
    (f"{THEIR_DECODER}.ffn.layers.1.*", f"{DECODER}.layers.{{i}}.fc2.*"),
    (f"{THEIR_DECODER}.norms.0.*", f"{DECODER}.layers.{{i}}.cross_attn_layer_norm.*"),
    (f"{THEIR_DECODER}.norms.1.*", f"{DECODER}.layers.{{i}}.self_attn_layer_norm.*"),
    (f"{THEIR_DECODER}.norms.2.*", f"{DECODER}.layers.{{i}}.final_layer_norm.*"),
    ("panoptic_head.transformer_decoder.post_norm.*", f"{DECODER}.layernorm.*"),
    ("panoptic_head.query_embed.*", f"{QUERY}.queries_embedder.*"),
    ("panoptic_head.query_feat.*", f"{QUERY}.queries_features.*"),
    ("panoptic_head.level_embed.*", f"{QUERY}.level_embed.*"),
    ("panoptic_head.cls_embed.*", "class_predictor.*"),
    *((f"panoptic_head.mask_embed.{2 * n}.*", f"{DECODER}.mask_predictor.mask_embedder.{n}.0.*") for n in range(3)),
)
SPLIT = (  # one projection of theirs is three of ours: query, key, value
    (f"{THEIR_BLOCK}.attn.w_msa.qkv.*", f"{BLOCK}.attention.{{qkv}}_proj.*"),
    (f"{THEIR_DECODER}.self_attn.attn.in_proj_*", f"{DECODER}.layers.{{i}}.self_attn.{{qkv}}_proj.*"),
)
OLD_NAMES = (  # 2.x -> 3.x
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"\.ffns\.0\.", ".ffn."),
)
NOT_OURS = re.compile(r"relative_position_index|loss_cls|^data_preprocessor")  # buffers and losses of their code
NOT_THEIRS = re.compile(r"^criterion\.|\.swin\.layernorm\.|relative_position_index")  # of ours, unused by the detector


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    for pattern, target in table:
        parts = re.split(r"(\{\w\}|\*)", pattern)
        rule = "".join(
            f"(?P<{p[1]}>\\d+)" if p.startswith("{") else "(?P<rest>.*)" if p == "*" else re.escape(p) for p in parts
        )
        if found := re.fullmatch(rule, name):
            groups = found.groupdict()
            for key, value in groups.items():
                target = target.replace("*" if key == "rest" else f"{{{key}}}", value)
            return target
    return None


def _patch_order(v: Tensor, theirs: bool) -> Tensor:
    """Swin's 2 x 2 patches before a downsampling, last dimension [4 c]: nn.Unfold's order to concatenation's, or back."""
    c = v.shape[-1] // 4
    order = [0, 2, 1, 3]  # its own inverse
    if theirs:
        return v.unflatten(-1, (c, 4))[..., order].transpose(-1, -2).flatten(-2)
    return v.unflatten(-1, (4, c)).transpose(-1, -2)[..., order].flatten(-2)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's state dict (2.x or 3.x names) as transformers': tensors of the same shapes [...], but for split projections.

    Raises ValueError on a name that is not the detector's.
    """
    out: dict[str, Tensor] = {}
    for name, v in state.items():
        modern = name
        for old, new in OLD_NAMES:
            modern = re.sub(old, new, modern)
        if NOT_OURS.search(modern):
            continue
        if target := _renamed(modern, SPLIT):
            out |= {target.replace("{qkv}", n): part for n, part in zip("qkv", v.chunk(3), strict=True)}
        elif target := _renamed(modern, NAMES):
            out[target] = _patch_order(v, theirs=True) if ".downsample." in modern else v
        else:
            raise ValueError(
                f"{name!r} is no parameter of OpenMMLab's Mask2Former with a Swin backbone: is this its checkpoint?"
            )
    return out


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_transformers`, with 3.x names, tensors of the same shapes [...].

    What the detector does not use is left out.
    """
    back, out = [(ours, theirs) for theirs, ours in NAMES], {}
    joined = {n: [(ours.replace("{qkv}", n), theirs) for theirs, ours in SPLIT] for n in "qkv"}
    for name, v in state.items():
        if NOT_THEIRS.search(name):
            continue
        if target := _renamed(name, joined["q"]):
            parts = [state[re.sub(r"q_proj\.(\w+)$", rf"{n}_proj.\1", name)] for n in "qkv"]
            out[target] = torch.cat(parts)
        elif not any(_renamed(name, joined[n]) for n in "kv"):
            target = _renamed(name, back)
            assert target is not None, name
            out[target] = _patch_order(v, theirs=False) if ".downsample." in name else v
    return out


def config(**changes: Module) -> Module:
    """Swin-S at window 7, 100 queries, COCO's 80 classes: the configuration of OpenMMLab's `SOURCE`, with changes."""
    from transformers import Mask2FormerConfig, SwinConfig

    make: Module = SwinConfig  # its annotations lack what it takes
    swin = make(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(**{"backbone_config": swin, "num_labels": 80, **changes})


def load_state(model: Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict, tensors of the model's shapes [...], strictly.

    Only what the detector does not use may be missing, nothing may be left over. Raises ValueError.
    """
    missing, extra = model.load_state_dict(state, strict=False)
    lacking = [k for k in missing if not NOT_THEIRS.search(k)]
    if lacking or extra:
        raise ValueError(
            f"the detector's weights do not fit: {len(lacking)} missing ({lacking[:2]}), {len(extra)} left over ({extra[:2]})"
        )


def convert(checkpoint: Path, out: Path, settings: Module = None) -> Path:
    """OpenMMLab's .pth -> a transformers folder (safetensors). A .pth is a pickle: only its tensors are read.

    settings: the configuration of another network than the benchmark's. Raises ValueError if the file is not the detector's or
    holds anything but data.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    check_empty(out)
    state = to_transformers(load_tensors_only(checkpoint))
    model = Mask2FormerForUniversalSegmentation(settings or config())
    load_state(model, state)
    note = {"source": SOURCE, "sha256": file_hash(checkpoint)}

    def write(making: Path) -> None:
        model.save_pretrained(making)
        (making / METADATA_FILE).write_text(json.dumps(note))

    write_folder(out, write)
    return out


def is_geneval_detector(folder: Path) -> bool:
    """Whether a folder holds weights that `convert` made; others are the same network, but give another benchmark."""
    note = folder / METADATA_FILE
    return note.is_file() and json.loads(note.read_text()).get("source") == SOURCE
