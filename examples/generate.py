"""transformers with kvtier: ask twice about one document; the second time its KV is read back, not computed.

    python examples/generate.py path/to/model path/to/document.txt /mnt/nvme/kvtier

The model is a directory as save_pretrained writes it, of a family that KVLayout.from_hf_config knows.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvtier
from kvtier.integrations.transformers import CachedGenerator


def main(model_path: str, document_path: str, directory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    with open(document_path, encoding="utf-8") as file:
        document = file.read()

    layout = kvtier.KVLayout.from_hf_config(model.config, dtype=model.dtype)
    config = {"host": {"capacity": "512MiB"}, "disk": {"directories": [directory], "capacity": "16GiB"}}
    with kvtier.TieredCache(config, layout, kvtier.model_id(model_path)) as cache:
        generator = CachedGenerator(model, cache)
        for question in ("What is it about?", "Who wrote it?"):
            prompt = tokenizer(f"{document}\n\n{question}\n", return_tensors="pt").input_ids
            done = generator.generate(prompt, max_new_tokens=64)
            print(tokenizer.decode(done.sequences[0, prompt.shape[1] :], skip_special_tokens=True))
            print(done.report)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
