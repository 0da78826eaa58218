"""Builds a Llama with random weights and a real tokenizer, small enough to load in seconds without a network.

What it writes is gibberish; the files are those of any Llama on disk: ``config.json``, ``model.safetensors``, a
byte-level BPE tokenizer trained on the text below, and a chat template.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

SEED = 20_26

CORPUS = """
Rows come in and rows go out, and every row that comes in goes out again with an answer beside it.
The worker claims a shard, reads its rows, asks the model about each of them and writes what the model said.
When the worker is killed, another one claims the shard, sees what was written already and goes on from there.
A database remembers which shard is ready, which one is running, and which one was committed by whom and when.
Summarise in one line: the quick brown fox jumps over the lazy dog while seven wizards box near the quarry.
Translate to French: good morning, how are you today? The weather is fine and the market opens at nine o'clock.
Is this review positive or negative? The battery lasts two days, but the screen scratched within a week.
Question: what is the capital of Norway? Answer: Oslo. Question: what is 12 times 7? Answer: 84.
Name three rivers, two mountains and one lake. Write a short poem about winter, snow and silence.
The parcel arrived on 2026-03-14 at 08:30; its number is 5567-0091, and it weighs 3.75 kilograms.
def add(a, b): return a + b  # adds two numbers, or joins two strings
{"name": "Ada", "age": 36, "tags": ["mathematics", "engines"]}
"""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('this template knows system, user and assistant messages only') }}{% endif %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SIZES: dict[str, dict[str, int]] = {
    # 1.8 million parameters.
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
    # About 110 million: where the arithmetic, rather than the overhead around it, takes the time.
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12},
}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    # As Llama's own: a prompt begins with <s>. The chat template writes it itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def build_llama(path: Path, size: str = "tiny", context: int = 1024) -> Path:
    """Write the model to the directory ``path`` (made if need be) and return it. Same seed, same files.

    ``size`` is ``"tiny"`` or ``"small"``; ``context`` the longest prompt and answer together, in tokens.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        **SIZES[size],
        vocab_size=len(tokenizer),
        num_key_value_heads=2 if size == "tiny" else 4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Far wider than a trainer would start from, so that the likeliest token leads the next one clearly and greedy
        # decoding does not hang on the last bit of a sum.
        initializer_range=0.3 if size == "tiny" else 0.08,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(SEED)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(path)
    return path


if __name__ == "__main__":
    print(build_llama(Path(sys.argv[1]), size=(*sys.argv[2:], "tiny")[0]))
