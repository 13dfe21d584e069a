"""Rows of the model types whose every norm stores plain gamma, and of the wrappers among them.

A wrapper takes any model inside: its own norms are plain, and each model inside is decided by its
own `model_type`. `tools/survey.py` writes the lists of transformers, which hold every `model_type`
of its configs but those with a row of their own:

- EXECUTED: models built from a default config; every norm was run with its weight set to 0, 1, 2
  and random numbers, and none computes 1 + w. Parts of a model that was built (such as a vision
  tower) count as run.
- READ: not built (no class of their own, or a dependency was missing), or with a norm that cannot
  be called alone; the syntax tree of their modeling file has no class that adds 1, or an offset, to
  its weight. The same search over all modeling files finds the classes in `rules/classes.py` and
  no other norm.

Those of 5.24 are what it has beyond 5.23. ENGINES lists configs that vLLM or SGLang bring along,
of models that none of the files that add to a weight, as the same search finds them, belongs to.

WRAPPERS are those of all lists whose config has, or may have, the config of another model inside.
"""

from __future__ import annotations

from gemma_fold.rules.model import Evidence
from gemma_fold.rules.row import Family

EXECUTED = """
EvollaModel afmoe aimv2 aimv2_text_model aimv2_vision_model albert align align_text_model
align_vision_model altclip altclip_text_model altclip_vision_model apertus arcee aria aria_text
audio-spectrogram-transformer audioflamingo3 audioflamingo3_encoder axk1 axk2 bailing_hybrid bamba
bark bart beam beit bert bert-generation big_bird bigbird_pegasus biogpt bit bitnet blenderbot
blenderbot-small blip blip-2 blip_2_qformer blip_2_vision_model blip_text_model blip_vision_model
bloom blt blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher bridgetower
bridgetower_text_model bridgetower_vision_model bros camembert canary canary_decoder canine
chameleon_vqgan chinese_clip chinese_clip_text_model chinese_clip_vision_model chmv2 clap
clap_audio_model clap_text_model clip clip_text_model clip_vision_model clipseg clipseg_text_model
clipseg_vision_model clvp clvp_decoder clvp_encoder coarse_acoustics codegen cohere cohere2
cohere2_moe cohere2_vision cohere_asr cohere_compass_vision colmodernvbert colqwen2 conditional_detr
convbert convnext convnextv2 cosmos3_edge cosmos3_edge_text cosmos3_edge_vision cosmos3_omni cpmant
csm csm_depth_decoder_model ctrl cvt cwm d_fine dab-detr dac data2vec-audio data2vec-text
data2vec-vision deberta deberta-v2 decision_transformer deepseek_ocr2_encoder
deepseek_ocr2_sam_vision_model deepseek_ocr2_vision deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
deepseek_vl deepseek_vl_hybrid deformable_detr deimv2 deit depth_anything depth_pro detr dia
dia_decoder dia_encoder diffllama dinov2 dinov2_with_registers dinov3_convnext dinov3_vit distilbert
doge donut-swin dots3_note dots3_note_audio_encoder dots3_note_text dots3_note_vision_encoder dpr
dpt edgetam_video edgetam_video_mask_decoder efficientloftr efficientnet electra embedding_gemma2
embedding_gemma2_text emu3_text_model emu3_vqgan encodec encoder-decoder ernie ernie4_5 ernie4_5_moe
ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision esmc esmfold2 eurobert evolla exaone4
exaone4_5 exaone4_5_vision exaone_moe falcon falcon_h1 falcon_mamba fastspeech2_conformer
fastspeech2_conformer_hifigan fastspeech2_conformer_with_hifigan fine_acoustics flaubert flava
flava_image_codebook flava_image_model flava_multimodal_model flava_text_model flex_olmo flint
florence2 florence_vision fnet focalnet fsmt fun_asr_nano fun_asr_nano_encoder funnel fuyu
gemma3n_text gemma4 gemma4_audio gemma4_text gemma4_unified gemma4_unified_text gemma4_vision git
git_vision_model glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text
glm4v_moe_vision glm4v_text glm4v_vision glm5_next glm5_next_text glm5_next_vision glm_image
glm_image_text glm_image_vision glm_image_vqmodel glm_moe_dsa glm_ocr glm_ocr_text glm_ocr_vision
glmasr glmasr_encoder glmga glpn got_ocr2 got_ocr2_vision gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj gradium_phonon_tts granite granite4_vision_text granite_docling
granite_docling_text granite_docling_vision granite_speech granite_speech5_ctc
granite_speech5_encoder granite_speech_encoder granite_speech_plus granite_speech_plus_encoder
granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared grounding-dino groupvit
groupvit_text_model groupvit_vision_model gte helium hgnet_v2 hiera higgs_audio_v2 hrm_text hubert
hunyuan_vl_vision hy_v3 hy_v4 hyperclovax hyperclovax_vision_v2 ibert idefics idefics2
idefics2_perceiver idefics2_vision idefics3 idefics3_vision idefics_vision ijepa imagegpt inkling2
inkling2_text inkling2_vision inkling_audio inkling_mm_model inkling_text inkling_vision
instructblip instructblip_qformer instructblip_vision_model instructblipvideo
instructblipvideo_qformer instructblipvideo_vision_model internlm3 internvl internvl_vision
iquestcoder jais2 jamba janus janus_vision_model janus_vqgan jetmoe jina_embeddings_v3 kimi_k25
kimi_k25_vision kimi_linear kolibri1 kosmos-2 kosmos-2.5 kosmos_2_5_text_model
kosmos_2_5_vision_model kosmos_2_text_model kosmos_2_vision_model kyutai_speech_to_text laguna
lasr_ctc lasr_encoder layoutlm layoutlmv3 led levit lfm2 lfm2_vl lfm3 lfm3_vl lfm3_vl_vision
lightglue lighton_ocr lilt llama llama4 llama4_text llama4_vision_model llava llava_next
llava_next_video llava_onevision longcat_flash longformer longt5 luke lw_detr lw_detr_vit lxmert
m2m_100 mamba mamba2 marian markuplm mask2former maskformer maskformer-swin mbart megatron-bert
mellum metaclip_2 metaclip_2_text_model metaclip_2_vision_model mgp-str mimi mimi_decoder
mimi_encoder mimo_v2_flash minicpm3 minicpm_ocr_vision minicpmv4_6_vision minicpmv4_7_vision minimax
minimax_m2 minimax_m3_vl_vision ministral3 mistral mistral3 mistral4 mistral_large4
mistral_large4_text mixtral mlcd mlcd_vision_model mllama mllama_text_model mllama_vision_model
mm-grounding-dino mobilebert mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 modernbert
modernbert-decoder modernvbert molmo2 molmo2_adapter molmo2_text molmo2_vision moonshine moshi
moshi_depth moss_transcribe_diarize moss_transcribe_diarize_audio mpnet mpt mra mt5
muse_glimmer_assistant muse_glimmer_vision muse_spark_audio muse_spark_vision musicflamingo musicgen
musicgen_decoder musicgen_melody musicgen_melody_decoder mvp nanochat nemo_speechlm nemotron3_5_asr
nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp
nemotron3_diarization nemotron3_diarization_audio nemotron_asr_streaming
nemotron_asr_streaming_encoder nemotron_h nemotron_h_omni neomme neucodec nllb-moe nomic_bert
nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe omdet-turbo oneformer openai-gpt
openai_privacy_filter opt ovis2 ovis2_vision owlv2 owlv2_text_model owlv2_vision_model owlvit
owlvit_text_model owlvit_vision_model paddleocr_vl paddleocr_vl_text paddleocr_vl_vision
parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt patchtsmixer patchtst pe_audio
pe_audio_encoder pegasus pegasus_x perceiver persimmon phi phi3 phi4_multimodal
phi4_multimodal_audio phi4_multimodal_vision phimoe pix2struct pix2struct_text_model
pix2struct_vision_model pixio pixtral plbart pocket_tts pocket_tts_audio_tokenizer
pocket_tts_audio_tokenizer_decoder pocket_tts_audio_tokenizer_encoder poolformer pop2piano
pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 pp_formulanet pp_formulanet_text
pp_formulanet_vision pp_lcnet pp_lcnet_v3 pp_lcnet_v4 pp_ocrv5_mobile_det pp_ocrv5_mobile_rec
pp_ocrv5_server_rec pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec prompt_depth_anything
prophetnet pvt pvt_v2 qianfan_ocr qianfan_ocr_vision qwen2 qwen2_5_omni qwen2_5_omni_audio_encoder
qwen2_5_omni_bigvgan qwen2_5_omni_dit qwen2_5_omni_talker qwen2_5_omni_text qwen2_5_omni_thinker
qwen2_5_omni_token2wav qwen2_5_omni_vision_encoder qwen2_5_vl qwen2_5_vl_text qwen2_5_vl_vision
qwen2_audio qwen2_audio_encoder qwen2_moe qwen2_vl qwen2_vl_text qwen2_vl_vision qwen3
qwen3_5_moe_vision qwen3_5_vision qwen3_asr qwen3_asr_encoder qwen3_moe qwen3_omni_moe
qwen3_omni_moe_audio_encoder qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_text
qwen3_omni_moe_thinker qwen3_omni_moe_vision_encoder qwen3_vl qwen3_vl_moe qwen3_vl_moe_text
qwen3_vl_moe_vision qwen3_vl_text qwen3_vl_vision qwen4_exp_vision radio rag reformer regnet rembert
resnet rf_detr rf_detr_dinov2 roberta roberta-prelayernorm roc_bert roformer rt_detr rt_detr_resnet
rt_detr_v2 rwkv sam sam2 sam2_hiera_det_model sam2_mask_decoder sam2_video sam2_video_mask_decoder
sam2_vision_model sam3 sam3_detr_decoder sam3_detr_encoder sam3_geometry_encoder sam3_lite_text
sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder sam3_lite_text_geometry_encoder
sam3_lite_text_mask_decoder sam3_lite_text_text_model sam3_mask_decoder sam3_tracker
sam3_tracker_mask_decoder sam3_tracker_video sam3_tracker_video_mask_decoder sam3_video
sam3_vision_model sam3_vit_model sam_hq sam_hq_mask_decoder sam_hq_vision_model sam_mask_decoder
sam_vision_model sapiens2 seamless_m4t seamless_m4t_v2 seed_oss segformer seggpt semantic sew sew-d
siglip siglip2 siglip2_text_model siglip2_vision_model siglip_text_model siglip_vision_model slanet
slanext slanext_vision smollm3 smolvlm smolvlm_vision solar_open speech-encoder-decoder
speech_to_text speecht5 speecht5_hifigan splinter squeezebert stablelm starcoder2 step3p5_vision
superglue superpoint swiftformer swin swin2sr swinv2 switch_transformers t5 table-transformer tapas
textnet timesfm timesfm2_5 timesformer tipsv2 tipsv2_dpt tipsv2_text_model tipsv2_vision_model trocr
tvp udop ultrabert ultravbert umt5 unispeech unispeech-sat univnet unlimited_ocr
unlimited_ocr_sam_vision_model unlimited_ocr_text unlimited_ocr_vision unlimited_ocr_vision_encoder
upernet uvdoc uvdoc_backbone vibevoice vibevoice_acoustic_tokenizer
vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder vibevoice_asr
vibevoice_diffusion video_llama_3 video_llama_3_vision video_llava videomae vilt vipllava
vision-encoder-decoder vision-text-dual-encoder visual_bert vit vit_mae vit_msn vitdet vitpose
vitpose_backbone vits vivit vjepa2 voxtral voxtral_encoder voxtral_realtime voxtral_realtime_encoder
voxtral_realtime_text wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper xclip xclip_text_model
xclip_vision_model xcodec xcodec2 xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yolos yoso youtu
zamba zamba2 zaya zoedepth
"""

READ = """
autoformer aya_vision chameleon cohere_compass cohere_compass_text dbrx deepseek_ocr2
deepseek_ocr2_text diffusion_gemma diffusion_gemma_text dinat dots1 edgetam edgetam_mask_decoder
edgetam_prompt_encoder edgetam_video_prompt_encoder edgetam_vision_model emu3 eomt eomt_dinov3 esm
fast_vlm gemma3n gemma3n_audio gemma3n_vision gemma4_assistant gemma4_unified_assistant
gemma4_unified_audio gemma4_unified_vision granite4_vision higgs_audio_v2_tokenizer hunyuan_v1_dense
hunyuan_v1_moe hunyuan_vl hunyuan_vl_text idefics_perciever informer layoutlmv2 layoutxlm lfm2_moe
ministral nougat pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perception_lm
pp_chart2table pp_chart2table_vision pp_ocrv5_server_det pp_ocrv6_medium_det
qwen3_omni_moe_talker_text sam2_prompt_encoder sam2_video_prompt_encoder sam3_tracker_prompt_encoder
sam3_tracker_video_prompt_encoder sam_hq_prompt_encoder sam_prompt_encoder sapiens2_head
time_series_transformer timm_backbone timm_wrapper videomt vitmatte xlstm
"""

EXECUTED_5_24 = """
apertus1p5 apertus1p5_text apertus1p5_vision_tokenizer dory exaone hy_v4_vl hy_v4_vl_text
hy_v4_vl_vision inkling2_loop inkling2_loop_text lara_mini omniasr omniasr_audio omniasr_ctc
sarvam_mla sarvam_moe wavtokenizer wavtokenizer_encoder
"""

ENGINES = """
NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 aimv2_visual_tokenizer aligner alpamayo2_super
bagel bailing_moe_v2 bailing_moe_v3_vl bailingmm_moe_v2_lite chatglm colqwen3 cosmos3_edge_projector
deepseek-ocr deepseek_v41 deepseek_v41_text deepseek_v41_vision deepseek_vl_v2 deepseek_vlm
dots_moe_vit dots_ocr dots_vit dots_vlm funaudiochat funaudiochat_audio_encoder gen_aligner gen_head
gen_vision inkling_audio_model inkling_model inkling_vision_model intern_vit_6b internlm2
internvl_chat iquest_q1 iquest_q1_mtp isaac jet_nemotron jet_vlm k3_dspark kimi_k3 kimi_k3_vision
kimi_vl locateanything midashenglm midashenglm_dasheng_encoder mimo_audio_tokenizer mimovl
minicpm_sala mlp_projector moondream3 moondream3_text moondream3_vision moonvit moonvit3d
multi_modality nanbeige nemotron_h_puzzle nvila nvila_lite openvla ops_colqwen3 ovis
perception_encoder pixel_shuffle_siglip2 pointsv1.5_chat qwen3_asr_audio_encoder qwen3_asr_text
qwen3_asr_thinker qwen3_moe_vit qwen3_vl_nemotron_embed siglip_visual_tokenizer spark2_5 step3_text
step3_vision_encoder step3_vl ultravox unlimited-ocr unlimited_language vision
"""

WRAPPERS = """
NemotronH_Nano_VL_V2 apertus1p5 aria audioflamingo3 aya_vision bagel bailing_moe_v3_vl
bailingmm_moe_v2_lite bark blip-2 canary chmv2 cohere2_vision cohere_asr colmodernvbert colqwen2
conditional_detr cosmos3_omni csm d_fine dab-detr deepseek-ocr deepseek_vl deepseek_vl_hybrid
deepseek_vl_v2 deformable_detr deimv2 depth_anything depth_pro detr diffusion_gemma dots_vlm dpt
edgetam edgetam_video edgetam_vision_model embedding_gemma2 encoder-decoder esmfold2 exaone4_5
fast_vlm florence2 fun_asr_nano funaudiochat fuyu gemma4_assistant gemma4_unified_assistant glm46v
glmasr glmga got_ocr2 granite4_vision granite_speech granite_speech_plus grounding-dino
higgs_audio_v2_tokenizer hyperclovax_vision_v2 idefics2 idefics3 inkling2_loop instructblip
instructblipvideo internvl internvl_chat isaac janus jet_vlm kimi_k25 kimi_k3 kimi_vl
kyutai_speech_to_text lfm2_vl lfm3_vl lightglue lighton_ocr llava llava_next llava_next_video
llava_onevision locateanything lw_detr mask2former maskformer midashenglm mistral3 mistral_large4
mm-grounding-dino modernvbert moondream3 moshi moss_transcribe_diarize multi_modality musicflamingo
musicgen musicgen_melody nemo_speechlm nemotron3_5_asr nemotron3_5_transcribe_audio nemotron_h_omni
neucodec nougat nvila nvila_lite omdet-turbo omniasr omniasr_ctc oneformer openvla ovis ovis2
pe_audio pe_audio_encoder pe_audio_video pe_audio_video_encoder pe_video perception_lm
pointsv1.5_chat pp_chart2table pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 pp_ocrv5_mobile_det
pp_ocrv5_mobile_rec pp_ocrv5_server_det pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det
pp_ocrv6_small_rec pp_ocrv6_tiny_rec prompt_depth_anything qianfan_ocr qwen2_audio qwen3_asr
qwen3_asr_thinker rag rf_detr rt_detr rt_detr_v2 sam2 sam2_video sam2_vision_model sam3
sam3_lite_text sam3_tracker sam3_tracker_video sam3_video sam3_vision_model slanet smolvlm
speech-encoder-decoder step3_vl superglue table-transformer tipsv2_dpt tvp ultravbert ultravox
unlimited-ocr upernet uvdoc vibevoice vibevoice_asr video_llama_3 video_llava vipllava
vision-encoder-decoder vision-text-dual-encoder vitmatte vitpose voxtral voxtral_realtime xcodec
xcodec2 zoedepth
"""


def _executed(version: str, types: str) -> Family:
    ran = f"transformers {version}, every norm run with w = 0, 1, 2, random"
    return Family(
        model_types=tuple(types.split()), all_plain=True, evidence=Evidence("executed", ran)
    )


def _read(types: str, source: str) -> Family:
    return Family(
        model_types=tuple(types.split()), all_plain=True, evidence=Evidence("read", source)
    )


PLAIN = (
    _executed("5.23", EXECUTED),
    _read(READ, "transformers 5.23, syntax tree of the modeling file"),
    _executed("5.24", EXECUTED_5_24),
    _read(ENGINES, "vLLM 0.33 and SGLang 0.5.23, syntax trees of the files of their models"),
    _read("k2_horizon", "SGLang 0.5.23 models/xllm.py:546-559"),
    Family(
        model_types=("domyn_edge",),
        architectures=("DomynEdgeForCausalLM",),
        all_plain=True,
        evidence=Evidence("read", "vLLM 0.33 models/domyn_edge.py, models/qwen2.py"),
    ),
)
