"""Measured language models by their published dimensions (their config.json)."""

from edgeforge.estimate.decoder import Decoder

LLAMA_8B = Decoder(32, 4096, 14336, 32, 8, 128, 128256)
QWEN3_4B = Decoder(36, 2560, 9728, 32, 8, 128, 151936)
QWEN3_8B = Decoder(36, 4096, 12288, 32, 8, 128, 151936)
QWEN3_1_7B = Decoder(28, 2048, 6144, 16, 8, 128, 151936)

#: model -> dimensions, architecture (the unit of leave-one-out: fine-tuned copies of one model count as that model).
DECODERS = {
    "llama_v3_2_1b_instruct": (Decoder(16, 2048, 8192, 32, 8, 64, 128256), "llama-1b"),
    "llama_v3_8b_instruct": (LLAMA_8B, "llama-8b"),
    "llama_v3_1_8b_instruct": (LLAMA_8B, "llama-8b"),
    "llama_v3_1_sea_lion_3_5_8b_r": (LLAMA_8B, "llama-8b"),
    "llama_v3_elyza_jp_8b": (LLAMA_8B, "llama-8b"),
    "llama_v3_taide_8b_chat": (LLAMA_8B, "llama-8b"),
    "falcon_v3_7b_instruct": (Decoder(28, 3072, 23040, 12, 4, 256, 131072), "falcon-7b"),
    "qwen3_0_6b": (Decoder(28, 1024, 3072, 16, 8, 128, 151936), "qwen3-0.6b"),
    "qwen3_1_7b": (QWEN3_1_7B, "qwen3-1.7b"),
    "intern3_5_vl_2b": (QWEN3_1_7B, "qwen3-1.7b"),
    "intern3_5_vl_4b": (QWEN3_4B, "qwen3-4b"),
    "qwen3_vl_4b_instruct": (QWEN3_4B, "qwen3-4b"),
    "qwen3_8b": (QWEN3_8B, "qwen3-8b"),
    "qwen3_vl_8b_instruct": (QWEN3_8B, "qwen3-8b"),
    "qwen2_5_vl_7b_instruct": (Decoder(28, 3584, 18944, 28, 4, 128, 152064), "qwen2.5-7b"),
    "smollm2_1_7b_it": (Decoder(24, 2048, 8192, 32, 32, 64, 49152), "smollm2"),
}
