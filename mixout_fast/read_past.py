"""Which modules read the weights of their nn.Linear and nn.Embedding children instead of calling them."""

SAM2 = (
    "sam2.Sam2",
    "sam2_video.Sam2Video",
    "sam3_tracker.Sam3Tracker",
    "sam3_tracker_video.Sam3TrackerVideo",
    "edgetam.EdgeTam",
    "edgetam_video.EdgeTamVideo",
)
"""transformers' copies of SAM 2: model and the beginning of its classes' names."""

INTERPOLATING = (
    "altclip.AltCLIP",
    "bridgetower.BridgeTower",
    "chinese_clip.ChineseCLIP",
    "clip.CLIP",
    "clipseg.CLIPSeg",
    "git.Git",
    "granite_docling.GraniteDocling",
    "janus.Janus",
    "kosmos2.Kosmos2",
    "metaclip_2.MetaClip2",
    "owlv2.Owlv2",
    "owlvit.OwlViT",
    "siglip.Siglip",
    "step3p7.Step3p7",
    "x_clip.XCLIP",
)
"""Vision models whose positions are read past their nn.Embedding where `interpolate_pos_encoding` resizes them."""

TRANSFORMERS_READ_PAST: dict[str, tuple[str, ...]] = {
    # Projections of attention.
    "wavlm.WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "detr.DetrMHAttentionMap": ("k_proj",),
    "conditional_detr.ConditionalDetrMHAttentionMap": ("k_proj",),
    "maskformer.MaskFormerDetrMHAttentionMap": ("k_proj",),
    "dab_detr.DabDetrMHAttentionMap": ("k_linear",),
    # Relative and interpolated positions.
    "deberta.DebertaEncoder": ("rel_embeddings",),
    "deberta_v2.DebertaV2Encoder": ("rel_embeddings",),
    "sew_d.SEWDTransformerEncoder": ("rel_embeddings",),
    "prophetnet.ProphetNetDecoder": ("ngram_embeddings",),
    **{f"{model}VisionEmbeddings": ("position_embedding",) for model in INTERPOLATING},
    "siglip2.Siglip2VisionEmbeddings": ("position_embedding",),
    "cosmos3_edge.Cosmos3EdgeVisionEmbeddings": ("position_embedding",),
    "glm4v.Glm4vVisionEmbeddings": ("position_embedding",),
    "glm4v_moe.Glm4vMoeVisionEmbeddings": ("position_embedding",),
    "glm_image.GlmImageVisionEmbeddings": ("position_embedding",),
    "unlimited_ocr.UnlimitedOcrVisionEmbeddings": ("position_embedding",),
    "hunyuan_vl.HunYuanVLVisionPatchEmbed": ("position_embedding",),
    "hy_v4_vl.HYV4VLVisionPatchEmbed": ("position_embedding",),
    # Queries and tokens that a decoder starts from.
    "detr.DetrModel": ("query_position_embeddings",),
    "table_transformer.TableTransformerModel": ("query_position_embeddings",),
    "conditional_detr.ConditionalDetrModel": ("query_position_embeddings",),
    "deformable_detr.DeformableDetrModel": ("query_position_embeddings",),
    "grounding_dino.GroundingDinoModel": ("query_position_embeddings",),
    "mm_grounding_dino.MMGroundingDinoModel": ("query_position_embeddings",),
    "dab_detr.DabDetrModel": ("query_refpoint_embeddings", "patterns"),
    "lw_detr.LwDetrModel": ("query_feat", "reference_point_embed"),
    "rf_detr.RfDetrModel": ("query_feat", "reference_point_embed"),
    "omdet_turbo.OmDetTurboDecoder": ("tgt_embed",),
    "maskformer.MaskFormerTransformerModule": ("queries_embedder",),
    "mask2former.Mask2FormerTransformerModule": ("queries_embedder", "queries_features", "level_embed"),
    "oneformer.OneFormerTransformerModule": ("queries_embedder", "level_embed"),
    "oneformer.OneFormerTextMapper": ("prompt_ctx",),
    "eomt.EomtForUniversalSegmentation": ("query",),
    "eomt_dinov3.EomtDinov3ForUniversalSegmentation": ("query",),
    "videomt.VideomtForUniversalSegmentation": ("query",),
    "deepseek_ocr2.DeepseekOcr2VisionModel": ("query_768_resolution", "query_1024_resolution"),
    "sam.SamMaskDecoder": ("iou_token", "mask_tokens"),
    "sam_hq.SamHQMaskDecoder": ("iou_token", "mask_tokens", "hq_token"),
    **{f"{model}MaskDecoder": ("iou_token", "mask_tokens", "obj_score_token") for model in SAM2},
    **{
        f"{model}PromptEncoder": ("no_mask_embed", "not_a_point_embed", "point_embed")
        for model in ("sam.Sam", "sam_hq.SamHQ", *SAM2)
    },
    "sam3.Sam3DetrDecoder": ("query_embed", "reference_points", "presence_token"),
    "sam3.Sam3GeometryEncoder": ("cls_embed",),
    "sam3_lite_text.Sam3LiteTextDetrDecoder": ("query_embed", "reference_points", "presence_token"),
    "sam3_lite_text.Sam3LiteTextGeometryEncoder": ("cls_embed",),
    # Tables and projections that a head multiplies by.
    "mobilebert.MobileBertLMPredictionHead": ("dense", "decoder"),
    "neomme.NeoMMEForMaskedLM": ("unembedding_projection",),
    "perceiver.PerceiverTextPreprocessor": ("embeddings",),
    # Products computed without the child: after a split, as a convolution, in fp32, with a clamped weight.
    "mamba.MambaMixer": ("dt_proj",),
    "falcon_mamba.FalconMambaMixer": ("dt_proj",),
    "jamba.JambaMambaMixer": ("dt_proj",),
    "wav2vec2.TDNNLayer": ("kernel",),
    "wav2vec2_bert.TDNNLayer": ("kernel",),
    "wav2vec2_conformer.TDNNLayer": ("kernel",),
    "unispeech_sat.TDNNLayer": ("kernel",),
    "wavlm.TDNNLayer": ("kernel",),
    "longcat_flash.LongcatFlashTopkRouter": ("classifier",),
    "gemma3n.Gemma3nTextAltUp": ("correction_coefs",),
}
"""The part of READ_PAST that lies in transformers.models: "model.Class" is Class of model.modeling_model."""

READ_PAST: dict[str, tuple[str, ...]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "peft.tuners.lily.layer.Linear": ("lily_B",),
    "peft.tuners.lora.variants.MontecloraLinearVariant": ("lora_A",),
    "peft.tuners.lora.variants.VeloraLinearVariant": ("lora_A",),
    "peft.tuners.peanut.layer.Linear": ("peanut_A",),
    "transformers.models.data2vec.modeling_data2vec_audio.TDNNLayer": ("kernel",),
    **{
        "transformers.models.{0}.modeling_{0}.{1}".format(*name.split(".")): children
        for name, children in TRANSFORMERS_READ_PAST.items()
    },
}
"""Class -> its nn.Linear and nn.Embedding children, or nn.ModuleLists and nn.ModuleDicts of them, whose weights are
read by other code than the child's forward: these weights are mixed where they are read. Subclasses are covered. Add
your own classes."""
