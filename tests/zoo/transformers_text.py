"""Text models of transformers: encoders, decoders, recurrent ones; most with the head that they are trained with."""

from __future__ import annotations

from typing import Any

from zoo.entry import Entry
from zoo.inputs import TEXT, Inputs, hugging, leading, tokens


def _text(name: str, model: str, call: Inputs | None = None, *, sizes: int = 2, **config: Any) -> Entry:
    """An entry of the usual sizes, with those of `config` in place of them; None takes one out."""
    return Entry(f"transformers/{name}", hugging(model, **TEXT | config), call or tokens(), sizes=sizes)


NARROW: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GROUPED: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}
BIASED: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
#: Without dropout, for which it reseeds torch by the clock.
REFORMER: dict[str, Any] = {
    "attn_layers": ["local", "local"],
    "local_attn_chunk_length": 4,
    "axial_pos_embds": False,
    "attention_head_size": 8,
    "feed_forward_size": 32,
    "is_decoder": False,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
}
#: Of those whose configuration refuses to be told the depth or the longest text.
UNTOLD: dict[str, Any] = {"num_hidden_layers": None, "max_position_embeddings": None}
UNMASKED = tokens(masked=False)

ENTRIES: list[Entry] = [
    _text("bert", "BertForSequenceClassification"),
    _text("roberta", "RobertaForMaskedLM"),
    _text("xlm_roberta", "XLMRobertaForTokenClassification"),
    _text("camembert", "CamembertForQuestionAnswering"),
    _text("distilbert", "DistilBertForSequenceClassification", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    _text("albert", "AlbertForMaskedLM", embedding_size=8, hidden_dropout_prob=0.1, classifier_dropout_prob=0.1),
    _text("electra", "ElectraForTokenClassification", embedding_size=8),
    _text("deberta", "DebertaForMaskedLM", **BIASED),
    _text("deberta_v2", "DebertaV2ForSequenceClassification", **BIASED, share_att_key=True),
    _text("mpnet", "MPNetForMaskedLM"),
    _text("modernbert", "ModernBertForMaskedLM", local_attention=4, cls_token_id=1, sep_token_id=2, mlp_dropout=0.1),
    _text("roformer", "RoFormerForMaskedLM", embedding_size=16),
    _text("ernie", "ErnieForSequenceClassification"),
    _text("megatron_bert", "MegatronBertForMaskedLM"),
    _text("mobilebert", "MobileBertForMaskedLM", embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    _text("squeezebert", "SqueezeBertForSequenceClassification", embedding_size=16, q_groups=2, output_groups=2),
    _text("fnet", "FNetForMaskedLM", UNMASKED),
    _text("nystromformer", "NystromformerForMaskedLM", UNMASKED, sizes=1, num_landmarks=3, segment_means_seq_len=9),
    _text("yoso", "YosoForMaskedLM", use_expectation=True),
    _text("big_bird", "BigBirdForMaskedLM", attention_type="original_full", sep_token_id=2),
    _text(
        "longformer",
        "LongformerForMaskedLM",
        tokens(global_attention_mask=leading),
        attention_window=[4, 4],
        sep_token_id=2,
    ),
    _text("funnel", "FunnelForMaskedLM", **UNTOLD, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1, 1]),
    _text("canine", "CanineForTokenClassification", num_hash_buckets=32, local_transformer_stride=4),
    _text("reformer", "ReformerForMaskedLM", tokens((8, 12)), **REFORMER),
    _text("ibert", "IBertForMaskedLM"),
    _text("xlm", "XLMWithLMHeadModel", emb_dim=16, n_heads=2),
    _text("xlnet", "XLNetLMHeadModel", **UNTOLD, d_model=16, n_layer=2, n_head=2, d_inner=32, use_mems_eval=False),
    _text("esm", "EsmForMaskedLM", mask_token_id=3),
    _text("xmod", "XmodForMaskedLM", languages=("a", "b"), default_language="a"),
    _text("gpt2", "GPT2LMHeadModel", **NARROW),
    _text("openai", "OpenAIGPTLMHeadModel", **NARROW),
    _text("ctrl", "CTRLLMHeadModel", **NARROW, dff=32),
    _text("gptj", "GPTJForCausalLM", **NARROW, rotary_dim=4, attn_pdrop=0.1),
    _text("codegen", "CodeGenForCausalLM", **NARROW | {"n_head": 4}, rotary_dim=4, attn_pdrop=0.1),
    _text("gpt_bigcode", "GPTBigCodeForCausalLM", **NARROW),
    _text("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4),
    _text("gpt_neox", "GPTNeoXForCausalLM", hidden_dropout=0.1),
    _text("biogpt", "BioGptForCausalLM"),
    _text("opt", "OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=8),
    _text("bloom", "BloomForCausalLM", hidden_dropout=0.1, n_layer=2, n_head=2),
    _text("mpt", "MptForCausalLM", d_model=16, n_heads=2, n_layers=2),
    _text("falcon", "FalconForCausalLM", alibi=True, hidden_dropout=0.1),
    _text("xglm", "XGLMForCausalLM", d_model=16, num_layers=2, attention_heads=2, ffn_dim=32),
    _text("llama", "LlamaForCausalLM", **GROUPED),
    _text("llama_classifier", "LlamaForSequenceClassification", **GROUPED),
    _text("mistral", "MistralForCausalLM", **GROUPED, sliding_window=4),
    _text("ministral", "MinistralForCausalLM", **GROUPED),
    _text("qwen2", "Qwen2ForCausalLM", **GROUPED, tie_word_embeddings=True),
    _text("qwen3", "Qwen3ForCausalLM", **GROUPED),
    _text("gemma", "GemmaForCausalLM", **GROUPED),
    _text("gemma2", "Gemma2ForCausalLM", **GROUPED, sliding_window=4, query_pre_attn_scalar=8),
    _text("gemma3", "Gemma3ForCausalLM", **GROUPED, sliding_window=4, query_pre_attn_scalar=8),
    _text("phi", "PhiForCausalLM", resid_pdrop=0.1, embd_pdrop=0.1),
    _text("phi3", "Phi3ForCausalLM", **GROUPED, resid_pdrop=0.1, embd_pdrop=0.1),
    _text("stablelm", "StableLmForCausalLM", num_key_value_heads=2, hidden_dropout=0.1),
    _text("olmo", "OlmoForCausalLM"),
    _text("olmo2", "Olmo2ForCausalLM"),
    _text("olmo3", "Olmo3ForCausalLM", sliding_window=4),
    _text("cohere", "CohereForCausalLM"),
    _text("cohere2", "Cohere2ForCausalLM", sliding_window=4),
    _text("starcoder2", "Starcoder2ForCausalLM", residual_dropout=0.1, embedding_dropout=0.1),
    _text("smollm3", "SmolLM3ForCausalLM", num_key_value_heads=1),
    _text("granite", "GraniteForCausalLM", num_key_value_heads=1),
    _text("glm4", "Glm4ForCausalLM", **GROUPED),
    _text("helium", "HeliumForCausalLM", **GROUPED),
    _text("nemotron", "NemotronForCausalLM", num_key_value_heads=1),
    _text("persimmon", "PersimmonForCausalLM", hidden_dropout=0.1),
    _text("exaone4", "Exaone4ForCausalLM", num_key_value_heads=1),
    _text("diffllama", "DiffLlamaForCausalLM", num_key_value_heads=2, attention_dropout=0.0),
    _text("bitnet", "BitNetForCausalLM", num_key_value_heads=1),
    _text("recurrent_gemma", "RecurrentGemmaForCausalLM", lru_width=16, attention_window_size=16, num_hidden_layers=3),
    _text("mamba", "MambaForCausalLM", state_size=4, time_step_rank=2),
    _text("falcon_mamba", "FalconMambaForCausalLM", state_size=4, time_step_rank=2),
    _text("mamba2", "Mamba2ForCausalLM", num_heads=4, head_dim=8, state_size=4, n_groups=2, chunk_size=4),
    _text("rwkv", "RwkvForCausalLM", attention_hidden_size=16),
    _text("xlstm", "xLSTMForCausalLM", num_heads=2, num_blocks=2, chunk_size=4),
]
