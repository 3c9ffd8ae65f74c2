"""The rows of READ_PAST: what each class reads past its children, and that it reads the mixed weight if listed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mixout_fast import apply_mixout
from mixout_fast.apply import mixed_parameters
from mixout_fast.read_past import INTERPOLATING, READ_PAST, SAM2

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VOCABULARY = {"vocab_size": 67, "max_position_embeddings": 32}
DETR = {"d_model": 32, "num_queries": 5, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
DETR |= {"decoder_layers": 1, "decoder_ffn_dim": 16, "decoder_attention_heads": 2}
LW_DETR = {"d_model": 32, "num_queries": 5, "group_detr": 2, "decoder_layers": 1, "decoder_ffn_dim": 16}
LW_DETR |= {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
MASK_FORMER = {"hidden_dim": 32, "mask_feature_size": 32, "num_queries": 5, "dim_feedforward": 16}
MASK_FORMER |= {"decoder_layers": 2, "num_attention_heads": 2}

CASES: dict[str, Callable] = {}
"""A row of READ_PAST -> a function of its class: (a small model with it, its arguments, those of a second call, …)."""


def case(*names: str) -> Callable:
    """Register a function for rows: "model.Class" of transformers, or a full name."""

    def register(build: Callable) -> Callable:
        for name in names:
            model, cls = name.rsplit(".", 1)
            CASES[name if "." in model else f"transformers.models.{model}.modeling_{model}.{cls}"] = build
        return build

    return register


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are faster so, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configured(prefix, **options):
    """A configuration of transformers, by the beginning of its class's name."""
    return getattr(transformers, f"{prefix}Config")(**options)


def tokens(*shape):
    return torch.randint(3, 60, shape or (2, 9))


def image(size):
    return torch.randn(1, 3, size, size)


def maps(*sizes):
    return [torch.randn(1, 32, size, size) for size in sizes]


@case("torchvision.models.swin_transformer.ShiftedWindowAttention")
def shifted_window_attention(cls):
    return cls(32, [4, 4], [0, 0], 2), (torch.randn(1, 8, 8, 32),)


@case("torchvision.models.video.swin_transformer.ShiftedWindowAttention3d")
def shifted_window_attention_3d(cls):
    return cls(32, [2, 4, 4], [0, 0, 0], 2), (torch.randn(1, 2, 8, 8, 32),)


@case("timm.models.beit.Attention", "timm.models.eva.EvaAttention")
def timm_attention(cls):
    options = {"scale_norm": False} if cls.__name__ == "EvaAttention" else {}
    return cls(32, num_heads=2, qkv_bias=True, **options), (torch.randn(1, 9, 32),)


@case("timm.models.swin_transformer_v2.WindowAttention")
def window_attention(cls):
    return cls(32, (4, 4), 2), (torch.randn(1, 16, 32),)


@case("wavlm.WavLMAttention")
def wavlm_attention(cls):
    return cls(32, 2), (torch.randn(1, 9, 32),)


@case(
    "detr.DetrMHAttentionMap",
    "conditional_detr.ConditionalDetrMHAttentionMap",
    "maskformer.MaskFormerDetrMHAttentionMap",
    "dab_detr.DabDetrMHAttentionMap",
)
def attention_map(cls):
    attention = cls(32, 32, 2, 0.0, True, 0.02) if "Dab" in cls.__name__ else cls(32, 2, 0.0)
    return attention, (torch.randn(1, 5, 32), torch.randn(1, 32, 3, 3))


@case("deberta.DebertaEncoder", "deberta_v2.DebertaV2Encoder", "sew_d.SEWDTransformerEncoder")
def relative_positions(cls):
    config = {"share_att_key": True, "pos_att_type": ["c2p", "p2c"], "relative_attention": True, **SIZES, **VOCABULARY}
    prefix = cls.__name__.removesuffix("Encoder").removesuffix("Transformer")
    return cls(configured(prefix, **config)), (torch.randn(1, 9, 32), torch.ones(1, 9))


@case("prophetnet.ProphetNetDecoder")
def prophetnet(cls):
    sizes = {"hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    return cls(transformers.ProphetNetConfig(**sizes, **VOCABULARY)), {"input_ids": tokens()}


@case("unlimited_ocr.UnlimitedOcrVisionEmbeddings", *(f"{model}VisionEmbeddings" for model in INTERPOLATING))
def interpolated_positions(cls):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = configured(cls.__name__.removesuffix("Embeddings"), **sizes)
    if "Unlimited" in cls.__name__:
        return cls(config), (torch.randn(1, 32, 6, 6),)
    return cls(config), {"pixel_values": image(24), "interpolate_pos_encoding": True}


@case("siglip2.Siglip2VisionEmbeddings", "cosmos3_edge.Cosmos3EdgeVisionEmbeddings")
def resized_positions(cls):
    prefix = cls.__name__.removesuffix("Embeddings")
    embeddings = cls(configured(prefix, hidden_size=32, patch_size=4, num_patches=16))
    if "Cosmos" in prefix:
        return embeddings, (torch.randn(4, 48), torch.tensor([[1, 2, 2]]))
    return embeddings, (torch.randn(1, 4, 48), torch.tensor([[2, 2]]))


@case("glm4v.Glm4vVisionEmbeddings", "glm4v_moe.Glm4vMoeVisionEmbeddings", "glm_image.GlmImageVisionEmbeddings")
def glm_positions(cls):
    config = configured(cls.__name__.removesuffix("Embeddings"), hidden_size=32, image_size=16, patch_size=4)
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    return cls(config), (torch.randn(4, 32), [4], torch.tensor([[1, 2, 2]]), rows, columns)


@case("hunyuan_vl.HunYuanVLVisionPatchEmbed", "hy_v4_vl.HYV4VLVisionPatchEmbed")
def hunyuan_positions(cls):
    config = configured(cls.__name__.removesuffix("PatchEmbed"), hidden_size=32, patch_size=4, max_image_size=16)
    return cls(config), (torch.randn(4, 48), [[1, 2, 2]])


@case(
    "detr.DetrModel",
    "table_transformer.TableTransformerModel",
    "conditional_detr.ConditionalDetrModel",
    "deformable_detr.DeformableDetrModel",
    "grounding_dino.GroundingDinoModel",
    "mm_grounding_dino.MMGroundingDinoModel",
    "dab_detr.DabDetrModel",
)
def detr(cls):
    resnet = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_indices": [2, 3, 4]}
    options = {"backbone_config": transformers.ResNetConfig(**resnet), "use_timm_backbone": False, "backbone": None}
    inputs = {"pixel_values": image(128)}
    if "Dab" in cls.__name__:
        options |= {"hidden_size": 32, "num_patterns": 2}
    elif "Dino" in cls.__name__:
        options |= {"text_config": transformers.BertConfig(**SIZES, **VOCABULARY), "max_text_len": 9}
        inputs |= {"input_ids": tokens(1, 9)}
    if cls.__name__ not in ("DetrModel", "TableTransformerModel", "ConditionalDetrModel", "DabDetrModel"):
        options |= {"disable_custom_kernels": True}
    return cls(configured(cls.__name__.removesuffix("Model"), **options, **DETR)), inputs


@case("lw_detr.LwDetrModel", "rf_detr.RfDetrModel")
def lw_detr(cls):
    prefix = cls.__name__.removesuffix("Model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    if prefix == "LwDetr":
        backbone = configured("LwDetrViT", **sizes, pretrain_image_size=64, out_indices=[1], num_windows=4)
        config = transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[1.0], **LW_DETR)
    else:
        backbone = configured("RfDetrDinov2", **sizes, out_indices=[1], num_windows=2)
        config = transformers.RfDetrConfig(backbone_config=backbone, **LW_DETR)
    return cls(config), {"pixel_values": image(64)}


@case("omdet_turbo.OmDetTurboDecoder")
def omdet_turbo(cls):
    sizes = {"encoder_hidden_dim": 32, "decoder_hidden_dim": 32, "task_encoder_hidden_dim": 16, "class_embed_dim": 16}
    sizes |= {"vision_features_channels": [32] * 3, "decoder_num_heads": 2, "decoder_num_layers": 1, "num_queries": 5}
    config = transformers.OmDetTurboConfig(learn_initial_query=True, disable_custom_kernels=True, **sizes)
    return cls(config), (maps(8, 4, 2), torch.randn(3, 1, 16), torch.randn(4, 1, 16), torch.ones(1, 4))


@case("maskformer.MaskFormerTransformerModule")
def maskformer(cls):
    return cls(8, transformers.MaskFormerConfig(decoder_config=transformers.DetrConfig(**DETR))), (
        torch.randn(1, 8, 4, 4),
    )


@case("mask2former.Mask2FormerTransformerModule")
def mask2former(cls):
    return cls(32, transformers.Mask2FormerConfig(**MASK_FORMER)), (maps(4, 8, 16), *maps(16))


@case("oneformer.OneFormerTransformerModule")
def oneformer(cls):
    config = transformers.OneFormerConfig(**MASK_FORMER, conv_dim=32, mask_dim=32, query_dec_layers=1)
    return cls(32, config), (maps(4, 8, 16), *maps(16), torch.randn(1, 32))


@case("oneformer.OneFormerTextMapper")
def oneformer_text(cls):
    text = {"width": 64, "context_length": 9, "num_layers": 1, "vocab_size": 67, "n_ctx": 2}
    config = transformers.OneFormerConfig(
        hidden_dim=64, **{f"text_encoder_{name}": value for name, value in text.items()}
    )
    return cls(config), (tokens(1, 3, 9),)


@case(
    "eomt.EomtForUniversalSegmentation",
    "eomt_dinov3.EomtDinov3ForUniversalSegmentation",
    "videomt.VideomtForUniversalSegmentation",
)
def eomt(cls):
    pytest.importorskip("scipy")
    prefix = cls.__name__.removesuffix("ForUniversalSegmentation")
    model = cls(configured(prefix, **SIZES, image_size=32, patch_size=8, num_blocks=1, num_queries=5))
    return model, {"pixel_values_videos": image(32)[None]} if prefix == "Videomt" else {"pixel_values": image(32)}


@case("deepseek_ocr2.DeepseekOcr2VisionModel")
def deepseek_ocr2(cls):
    """With the number of patches at which it changes from one table of queries to the other."""
    sam = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "window_size": 2}
    sam |= {"image_size": 52, "patch_size": 1, "output_channels": 8, "downsample_channels": [8, 32]}
    encoder = SIZES | {"num_key_value_heads": 2, "vocab_size": 67}
    config = transformers.DeepseekOcr2VisionConfig(sam_config=sam | {"global_attn_indexes": []}, encoder_config=encoder)
    return cls(config), (image(48),), (image(52),)


@case("sam.SamMaskDecoder", "sam_hq.SamHQMaskDecoder", *(f"{model}MaskDecoder" for model in SAM2))
def mask_decoder(cls):
    sizes = {"hidden_size": 32, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    prefix = cls.__name__.removesuffix("MaskDecoder")
    inputs = {
        "image_embeddings": torch.randn(1, 32, 4, 4),
        "image_positional_embeddings": torch.randn(1, 32, 4, 4),
        "sparse_prompt_embeddings": torch.randn(1, 1, 2, 32),
        "dense_prompt_embeddings": torch.randn(1, 32, 4, 4),
        "multimask_output": True,
    }
    if prefix == "SamHQ":
        sizes |= {"vit_dim": 32}
        inputs |= {"hq_token_only": False, "intermediate_embeddings": [torch.randn(1, 4, 4, 32)]}
    elif prefix != "Sam":
        inputs |= {"high_resolution_features": [torch.randn(1, 4, 16, 16), torch.randn(1, 8, 8, 8)]}
    return cls(configured(f"{prefix}MaskDecoder", **sizes)), inputs


@case("sam.SamPromptEncoder", "sam_hq.SamHQPromptEncoder", *(f"{model}PromptEncoder" for model in SAM2))
def prompt_encoder(cls):
    prefix = cls.__name__.removesuffix("PromptEncoder")
    config = configured(f"{prefix}PromptEncoder", hidden_size=32, image_size=64, patch_size=16)
    if prefix in ("Sam", "SamHQ"):
        vision = configured(f"{prefix}Vision", hidden_size=32, output_channels=32, num_pos_feats=16)
        config = configured(prefix, vision_config=vision, prompt_encoder_config=config)
    points, labels, boxes = torch.rand(1, 1, 3, 2), torch.tensor([[[0, 1, -1]]]), torch.rand(1, 1, 4)
    return cls(config), (points, labels, boxes, None)


@case("sam3.Sam3DetrDecoder", "sam3_lite_text.Sam3LiteTextDetrDecoder")
def sam3_decoder(cls):
    config = configured(cls.__name__.replace("Detr", "DETR"), **SIZES, num_queries=5)
    image, text, shapes = torch.randn(1, 16, 32), torch.randn(1, 3, 32), torch.tensor([[4, 4]])
    return cls(config), (image, text, torch.randn(1, 16, 32), None, shapes)


@case("sam3.Sam3GeometryEncoder", "sam3_lite_text.Sam3LiteTextGeometryEncoder")
def sam3_geometry(cls):
    pytest.importorskip("torchvision")
    boxes, mask, labels = torch.rand(1, 2, 4), torch.ones(1, 2).bool(), torch.ones(1, 2).long()
    return cls(configured(cls.__name__, **SIZES)), (boxes, mask, labels, maps(8), maps(8))


@case("mobilebert.MobileBertLMPredictionHead")
def mobilebert(cls):
    return cls(transformers.MobileBertConfig(**SIZES, **VOCABULARY, embedding_size=16)), (torch.randn(1, 9, 32),)


@case("neomme.NeoMMEForMaskedLM")
def neomme(cls):
    config = transformers.NeoMMEConfig(**SIZES, **VOCABULARY, embedding_rank=8, num_key_value_heads=2)
    return cls(config), {"input_ids": tokens()}


@case("perceiver.PerceiverTextPreprocessor")
def perceiver(cls):
    sizes = {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1}
    sizes |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 32}
    config = transformers.PerceiverConfig(**sizes, vocab_size=67, max_position_embeddings=9)
    return transformers.PerceiverForMaskedLM(config), {"inputs": tokens()}


@case("mamba.MambaMixer", "falcon_mamba.FalconMambaMixer", "jamba.JambaMambaMixer")
def mamba(cls):
    if "Jamba" in cls.__name__:
        config = transformers.JambaConfig(**SIZES, use_mamba_kernels=False)
        return cls(config, 0), (torch.randn(1, 9, 32),)
    model = cls.__name__.removesuffix("Mixer")
    model = getattr(transformers, f"{model}Model")(
        configured(model, hidden_size=32, num_hidden_layers=1, vocab_size=67)
    )
    return model, {"input_ids": tokens()}


@case(
    "wav2vec2.TDNNLayer",
    "wav2vec2_bert.TDNNLayer",
    "wav2vec2_conformer.TDNNLayer",
    "unispeech_sat.TDNNLayer",
    "wavlm.TDNNLayer",
    "transformers.models.data2vec.modeling_data2vec_audio.TDNNLayer",
)
def tdnn(cls):
    config = transformers.Wav2Vec2Config(tdnn_dim=[8, 8], tdnn_kernel=[3, 3], tdnn_dilation=[1, 1])
    return cls(config, 1), (torch.randn(1, 9, 8),)


@case("longcat_flash.LongcatFlashTopkRouter")
def longcat_flash(cls):
    sizes = {"hidden_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "zero_expert_num": 0}
    return cls(transformers.LongcatFlashConfig(**sizes)), (torch.randn(1, 5, 32),)


@case("gemma3n.Gemma3nTextAltUp")
def gemma3n(cls):
    altup = cls(transformers.Gemma3nTextConfig(hidden_size=32))
    altup.forward = altup.correct
    return altup, (torch.randn(4, 1, 5, 32), torch.randn(1, 5, 32))


def adapted(config, **options):
    peft = pytest.importorskip("peft")
    module = nn.Sequential(nn.Linear(32, 16, bias=False))
    return peft.get_peft_model(module, getattr(peft, config)(target_modules=["0"], r=4, **options)), (
        torch.randn(5, 32),
    )


@case("peft.tuners.lily.layer.Linear")
def lily(cls):
    return adapted("LilyConfig")


@case("peft.tuners.peanut.layer.Linear")
def peanut(cls):
    return adapted("PeanutConfig")


@case("peft.tuners.lora.variants.MontecloraLinearVariant")
def monteclora(cls):
    return adapted("LoraConfig", monteclora_config={})


@case("peft.tuners.lora.variants.VeloraLinearVariant")
def velora(cls):
    return adapted("LoraConfig", velora_config={"num_groups": 4})


def weights_read_past(name: str, children: tuple[str, ...]) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """(the weights that get a gradient at p = 1, the children's)"""
    module, cls = name.rsplit(".", 1)
    cls = getattr(pytest.importorskip(module), cls)
    model, *calls = CASES[name](cls)
    with torch.no_grad():  # factors that start at zero hide what is read before them
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    readers = [
        part for part in model.modules() if cls in map(type, (part, *getattr(part, "lora_variant", {}).values()))
    ]
    parameters = [named for part in readers for child in children for named in part._modules[child].named_parameters()]
    apply_mixout(model.train(), 1.0)
    for call in calls:
        outputs = tree_leaves(model(**call) if isinstance(call, dict) else model(*call))
        sum(t.square().sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad).backward()
    mixed = [entry.parameter for entry in mixed_parameters(model)]
    return {w for w in mixed if w.grad is not None and w.grad.any()}, {w for key, w in parameters if "bias" not in key}


def test_every_row_has_a_case():
    assert READ_PAST.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_row_lists_what_its_class_reads_past_its_children(name, monkeypatch):
    children = READ_PAST[name]
    read, _ = weights_read_past(name, children)
    assert not read
    monkeypatch.delitem(READ_PAST, name)
    read, listed = weights_read_past(name, children)
    assert read == listed
