"""Tokenizers of the families that real checkpoints use, trained in a second on a few sentences."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the pass key for amber? The pass key is 12345.",
    "Ein Bär, ein Größenwahn, naïve café; 你好,世界。 こんにちは 🎉🎉 and the end.\n\n    indented = code(1, 2)\n",
    "Streaming heads keep the sink and the recent tokens; retrieval heads keep all of them. A word, a word, a word.",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


@cache
def _byte_level_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(special("<|bos|>", "<|im_start|>", "<|im_end|>"))
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("</think>", special=False)])
    backend.add_tokens(
        [AddedToken("<a token>", special=False, normalized=False)]
    )  # a space is no letter of the alphabet
    backend.add_tokens([AddedToken("<|fim|>", special=False, normalized=False)])  # not marked special, but looks so
    return backend.to_str()


def byte_level() -> Tokenizer:
    """GPT-2, Llama-3, Qwen."""
    return Tokenizer.from_str(_byte_level_json())


@cache
def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece in model["vocab"] if piece not in ("你", "🎉", "🎉🎉")]
    names += ["▁▁", "▁▁▁▁"]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [(left, right) for left, right in model["merges"] if {left, right, left + right} <= vocab.keys()]
    return vocab, merges


def llama(style: str = "prepend") -> Tokenizer:
    """SentencePiece with byte fallback, as Llama-2 ("prepend"), Mistral's newer files ("first") and Gemma ("none")
    write it.
    """
    vocab, merges = _pieces()
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), replace]) if style == "prepend" else replace
        )
    if style != "none":
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    backend.add_special_tokens(special("[INST]", "[/INST]"))
    template = {"single": "<s> $A", "pair": "<s> $A $B", "special_tokens": [("<s>", 1)]}
    backend.post_processor = processors.TemplateProcessing(**template)
    return backend


def metaspace() -> Tokenizer:
    """SentencePiece without byte fallback, through the Metaspace decoder, as T5 and XGLM write it."""
    vocab, merges = _pieces()
    vocab = {name: i for i, name in enumerate(name for name in vocab if not name.startswith("<0x"))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    return backend


def unigram() -> Tokenizer:
    """A model that makes the special token "</s>" of its plain spelling, unless it is kept from it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((char, -5.0) for char in "▁abcdefst</>. ")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    return backend


def save(backend: Tokenizer, directory: Path, **config: object) -> str:
    """A checkpoint's tokenizer files. Returns the directory as text."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(directory)


def save_chatml(directory: Path) -> str:
    return save(byte_level(), directory, bos_token="<|bos|>", eos_token="<|im_end|>", chat_template=CHATML)


def save_llama2(directory: Path, style: str = "prepend") -> str:
    return save(llama(style), directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA2)
