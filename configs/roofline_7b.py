"""Llama 2 7B with a drafter of 68M, random weights: what is left between the programs and an accelerator of 40 GB or more."""

from decode.subjects import Roofline

experiment = Roofline(
    shapes=("meta-llama/Llama-2-7b-hf", "JackFram/llama-68m"),
    dtype="bfloat16",
)
