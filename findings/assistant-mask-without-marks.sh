#!/usr/bin/env bash
# transformers 5.24.0: asked which tokens are the assistant's, a tokenizer may answer "none", in zeros.
#
# apply_chat_template(..., return_assistant_tokens_mask=True) rests on {% generation %} in the template.
# Most published templates have no such mark. The mask is then all zeros, beside a line in the log:
# training with it learns nothing. Comparing the text up to a turn with the text through it finds the
# assistant's tokens with any template.
#
# Seen (transformers 5.24.0, tokenizers 0.23.3):
#   assistant tokens: by the mask 0, by comparison 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
library = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
tokenizer.chat_template = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
chat = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "is 4"}]
encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
by_mask = sum(encoded["assistant_masks"])
before = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
through = tokenizer.apply_chat_template(chat, tokenize=False)
assert through.startswith(before)
by_comparison = len(tokenizer(through[len(before) :].rstrip("\n"))["input_ids"])
print(f"assistant tokens: by the mask {by_mask}, by comparison {by_comparison}")
assert by_mask == 0
assert by_comparison == 4
PY
