"""What the transformer of this package lacks for other families of transformers, and the families that ask for it."""

MISSING = {
    "its layers are state spaces, linear attention or convolutions, or some of them are": (
        "mamba mamba2 falcon_mamba jamba bamba zamba zamba2 nemotron_h falcon_h1 granitemoehybrid recurrent_gemma rwkv "
        "xlstm lfm2 lfm2_moe lfm3 qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text minimax kimi_linear "
        "olmo_hybrid lara_mini bailing_hybrid qwen4_exp qwen4_exp_text inkling_text inkling2_text"
    ),
    "its positions are learned or sines added to the embeddings, and this model's are rotary": (
        "gpt2 gpt_neo gpt_bigcode gpt-sw3 openai-gpt opt biogpt xglm ctrl"
    ),
    "its positions are biases of the scores, and this model's are rotary": "bloom mpt cpmant",
    "it has an encoder": (
        "t5 bart mbart marian pegasus bigbird_pegasus blenderbot blenderbot-small mvp plbart prophetnet whisper trocr "
        "moshi musicgen musicgen_melody"
    ),
    "it reads text in both directions": (
        "bert bert-generation roberta roberta-prelayernorm electra ernie big_bird camembert data2vec-text rembert "
        "megatron-bert roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod reformer modernbert-decoder"
    ),
    "its norms have no weights": "olmo nanochat",
    "its MLP's activation is xIELU": "apertus apertus1p5_text",
    "its attention is the difference of two": "diffllama",
    "its attention has a mask that it learns": "doge",
    "it normalises inside attention and MLP": "bitnet",
    "its router samples (SparseMixer)": "phimoe",
    "it clips queries, keys and values": "dbrx",
    "its attention chooses keys by an index": (
        "deepseek_v32 deepseek_v4 glm_moe_dsa axk2 dots3_note dots3_note_text hy_v4 minimax_m3_vl_text"
    ),
    "its layers are passed more than once": "hrm_text dory inkling2_loop_text",
    "it reads bytes in patches": "blt",
    "its experts' results are normalised, and those of its other layers not": "axk1",
    "its values are scaled, and its layers with windows have other heads": "mimo_v2_flash",
    "its attention sees chunks, and its scores are scaled by position": "llama4 llama4_text ministral3",
    "its layers share keys, or read embeddings of their own": (
        "gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text gemma4_assistant "
        "gemma4_unified_assistant"
    ),
    "its attention's result passes a gate": "afmoe laguna",
    "its layers have two attentions and experts that do nothing": "longcat_flash",
    "attention's heads are experts too": "jetmoe",
    "its text layers attend to pictures": "mllama",
    "no entry says yet how its config.json and tensors are named (docs/models.md, Add a family)": (
        "aria_text beam codegen cohere2_moe cohere_compass_text emu3 ernie4_5_moe flint fuyu git got_ocr2 "
        "gpt_neox_japanese granite_swa granitemoe_swa hy_v3 kolibri1 moss_transcribe_diarize persimmon phi4_multimodal "
        "sarvam_moe zaya"
    ),
}
