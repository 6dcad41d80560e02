"""Everything that transformers is asked to do with an exported folder, in a process that cannot import this package.

    python tests/export/transformers_worker.py FOLDER TEXTS SCRATCH

TEXTS: lines of JSON that `dlcm generate FOLDER --greedy --json` wrote; the same tokens must come out here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.modules["dlcm_lightning"] = None  # type: ignore[assignment] # an import of it fails
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(sys.argv[3]) / "home"), "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

CODE = {"trust_remote_code": True}
FOLDER, TEXTS, SCRATCH = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
expected = [json.loads(line) for line in TEXTS.read_text().splitlines()]
prompts = [one["prompt"] for one in expected]
most = max(one["tokens"] for one in expected)

config = AutoConfig.from_pretrained(FOLDER, **CODE)
assert config.hidden_size == config.d_token and config.num_hidden_layers >= 1, config
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **CODE)
model = AutoModelForCausalLM.from_pretrained(FOLDER, **CODE).eval()
assert model.dtype == torch.float32 and not model.is_gradient_checkpointing


def ended(ids: list[int]) -> list[int]:
    """Up to and including EOS."""
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


def generated(batch, **options):
    out = model.generate(**batch, max_new_tokens=most, do_sample=False, **options)
    return [ended(row) for row in out[:, batch["input_ids"].shape[1]:].tolist()]


for prompt, one in zip(prompts, expected, strict=True):  # alone
    batch = tokenizer([prompt], return_tensors="pt")
    assert batch["input_ids"].shape[1] == one["prompt_tokens"]
    for use_cache in (True, False):
        assert generated(batch, use_cache=use_cache) == [one["ids"]], (prompt, use_cache)
together = tokenizer(prompts, return_tensors="pt", padding=True)
assert together["attention_mask"][:, 0].min() == 0, "padding is on the left"
for use_cache in (True, False):
    assert generated(together, use_cache=use_cache) == [one["ids"] for one in expected], use_cache
assert tokenizer.decode(expected[0]["ids"], skip_special_tokens=True) == expected[0]["text"]

beams = [model.generate(**together, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=one) for one in (1, 0)]
assert torch.equal(*beams)
drawn = model.generate(**together, max_new_tokens=4, do_sample=True, num_return_sequences=2)
assert drawn.shape[0] == 2 * len(prompts) and not (drawn[:, -4:] == tokenizer.bos_token_id).any()

# A cache goes on by any number of tokens, and a text is the same in any padding.
with torch.no_grad():
    whole = model(**together, use_cache=False).logits
    half = together["input_ids"].shape[1] - 2
    first = model(together["input_ids"][:, :half], attention_mask=together["attention_mask"][:, :half])
    name = "cache" if "cache" in first else "past_key_values"
    assert first[name].get_seq_length() == half
    rest = model(together["input_ids"][:, half:], attention_mask=together["attention_mask"], **{name: first[name]})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-4)
    kept = model(**together, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(kept, whole[:, -1:], rtol=0, atol=1e-5)
    right = AutoTokenizer.from_pretrained(FOLDER, padding_side="right", **CODE)
    right = right(prompts, return_tensors="pt", padding=True)
    other = model(**right).logits
    for row, count in enumerate(right["attention_mask"].sum(1).tolist()):
        torch.testing.assert_close(other[row, :count], whole[row, -count:], rtol=0, atol=1e-4)

labels = together["input_ids"].masked_fill(together["attention_mask"] == 0, -100)
outputs = model(**together, labels=labels)
begun = together["attention_mask"][:, :-1].bool()  # nothing is predicted where padding is
reference = F.cross_entropy(whole[:, :-1][begun], labels[:, 1:][begun])
torch.testing.assert_close(outputs.loss.detach(), reference, rtol=1e-5, atol=1e-5)
count = int(begun.sum())
torch.testing.assert_close(model(**together, labels=labels, num_items_in_batch=2 * count).loss * 2, outputs.loss)

# Documents that lie end to end in one row, as collators without padding lay them.
texts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
row = torch.tensor([[index for text in texts for index in text]])
places = torch.cat([torch.arange(len(text)) for text in texts])[None]
with torch.no_grad():
    packed = model(row, position_ids=places).logits[0].split([len(text) for text in texts])
    for text, logits in zip(texts, packed, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([text])).logits[0], rtol=0, atol=1e-4)
    shown = (together["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**together, position_ids=shown).logits, whole, rtol=0, atol=1e-4)
torch.testing.assert_close(model(row, position_ids=places, labels=row).loss.detach(), reference, rtol=1e-5, atol=1e-5)

# Under autocast, as a Trainer with bf16=True runs it: fp32 weights, products in bf16, gradients in fp32.
with torch.autocast("cpu", torch.bfloat16):
    mixed = model(**together, labels=labels)
    mixed.loss.backward()
    assert mixed.logits.dtype == torch.bfloat16 and abs(mixed.loss.item() - reference.item()) < 0.05 * reference.item()
    model.generate(**together, max_new_tokens=3, do_sample=False)
assert all(one.grad is None or one.grad.dtype == torch.float32 for one in model.parameters())
model.zero_grad()

turn = model.generate(**together, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
longer = {"input_ids": turn.sequences, "attention_mask": F.pad(together["attention_mask"], (0, 3), value=1)}
second = model.generate(**longer, max_new_tokens=3, do_sample=False, **{name: turn[name]})
assert torch.equal(second, model.generate(**longer, max_new_tokens=3, do_sample=False, use_cache=False))

weight = next(model.parameters())
outputs.loss.backward()
plain = weight.grad.clone()
model.zero_grad()
model.train()
model.gradient_checkpointing_enable()
assert model.is_gradient_checkpointing
model(**together, labels=labels).loss.backward()
torch.testing.assert_close(weight.grad, plain)
model.gradient_checkpointing_disable()
model.eval()

model.save_pretrained(SCRATCH / "again")
tokenizer.save_pretrained(SCRATCH / "again")
assert all(file.suffix != ".bin" for file in (SCRATCH / "again").iterdir())
back = AutoModelForCausalLM.from_pretrained(SCRATCH / "again", **CODE)
assert model.state_dict().keys() == back.state_dict().keys()
for key, tensor in model.state_dict().items():
    assert tensor.dtype == back.state_dict()[key].dtype and torch.equal(tensor, back.state_dict()[key]), key
again = AutoTokenizer.from_pretrained(SCRATCH / "again", **CODE)
spelled = f"{tokenizer.bos_token} a {tokenizer.eos_token}"
assert again(spelled)["input_ids"] == tokenizer(spelled)["input_ids"]
assert tokenizer.eos_token_id not in tokenizer(spelled)["input_ids"], "a text cannot end a document"

low = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, device_map={"": "cpu"}, **CODE).eval()
assert low.dtype == torch.bfloat16
for key, tensor in low.state_dict().items():
    exact = "norm" in key or "boundary" in key
    assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), key
    assert not exact or torch.equal(tensor, model.state_dict()[key]), key
with torch.no_grad():
    assert (low(**together).logits.float() - whole).abs().max() < 0.1 * whole.abs().max()
AutoModelForCausalLM.from_pretrained(FOLDER, device_map="auto", **CODE)

said = pipeline("text-generation", model=model, tokenizer=tokenizer)(
    prompts[0], max_new_tokens=expected[0]["tokens"], do_sample=False)
assert said[0]["generated_text"] == prompts[0] + expected[0]["text"], said

fresh = AutoModelForCausalLM.from_config(config, **CODE)
assert all(bool(tensor.isfinite().all()) for tensor in fresh.state_dict().values())
assert not torch.equal(fresh.get_input_embeddings().weight, model.get_input_embeddings().weight)


def refused(words: str, call) -> None:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)


for call in (lambda: type(config)(tie_word_embeddings=True),
             lambda: AutoModelForCausalLM.from_pretrained(FOLDER, tie_word_embeddings=True, **CODE)):
    refused("two matrices", call)
refused("no inputs_embeds", lambda: model(inputs_embeds=torch.zeros(1, 1, 8)))
refused("marks no token", lambda: model(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)))
refused("position_ids do not count", lambda: model(row, position_ids=places + 1))
refused("cannot be resized", lambda: model.resize_token_embeddings(10))
refused("only goes forward", lambda: model.generate(**together, max_new_tokens=3, **{name: turn[name]}))
model.train()
refused("no gradient goes through a cache", lambda: model(**together, use_cache=True))
model.eval()
refused("cannot be opened again", lambda: first[name].crop(1))
refused("give no cache with labels", lambda: model(together["input_ids"], labels=labels, **{name: first[name]}))
print(transformers.__version__)
