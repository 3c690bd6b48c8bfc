"""The families of models that folders are read of, by the `model_type` of their config.json."""

from qat.models.pretrained import bert
from qat.models.pretrained import decoders

FAMILIES = {
    'bert': bert.BERT,
    'llama': decoders.LLAMA,
    'qwen2': decoders.QWEN2,
    'qwen3': decoders.QWEN3,
    'gemma': decoders.GEMMA,
    'gpt2': decoders.GPT2,
}
