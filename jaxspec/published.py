"""Shapes of published models, so that their memory can be planned before anything is downloaded."""

from jaxspec.transformer import LMConfig, Rope

_LLAMA = {"vocab_size": 128_256, "max_positions": 131_072, "norm_eps": 1e-5}
_LLAMA_2 = {"vocab_size": 32_000, "max_positions": 4096, "norm_eps": 1e-5}
_QWEN = {"norm_eps": 1e-6, "rope": Rope(theta=1e6), "qkv_bias": True}


def _llama_rope(factor: float) -> Rope:
    return Rope(theta=500_000.0, kind="llama3", factor=factor, original_positions=8192)


PUBLISHED = {
    # One tokenizer.
    "meta-llama/Llama-2-7b-hf": LMConfig(
        width=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_width=11_008, tied=False,
        **_LLAMA_2,
    ),
    "JackFram/llama-68m": LMConfig(
        width=768, num_layers=2, num_heads=12, num_kv_heads=12, head_dim=64, mlp_width=3072, tied=False, **_LLAMA_2,
    ),
    "meta-llama/Llama-3.1-8B": LMConfig(
        width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=14_336, tied=False,
        rope=_llama_rope(8.0), **_LLAMA,
    ),
    "meta-llama/Llama-3.2-1B": LMConfig(
        width=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, mlp_width=8192, tied=True,
        rope=_llama_rope(32.0), **_LLAMA,
    ),
    # One tokenizer, vocabularies padded differently.
    "Qwen/Qwen2.5-7B": LMConfig(
        vocab_size=152_064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_width=18_944,
        max_positions=131_072, tied=False, **_QWEN,
    ),
    "Qwen/Qwen2.5-0.5B": LMConfig(
        vocab_size=151_936, width=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, mlp_width=4864,
        max_positions=32_768, tied=True, **_QWEN,
    ),
}  # fmt: skip
