"""Regenerates `hf_folder/`: a DeepseekV3 as transformers saves it.

  python tests/golden/make_hf_folder.py

The weights are those of `hf_yarn.npz` (its generator, its seed), exact in
bfloat16; so the logits in that file are the logits of this folder.
"""

import shutil

import torch
import transformers

from tests.golden import make_hf

NAME = "yarn"


def main() -> None:
  """Writes config.json and model.safetensors."""
  changes, bias_range = make_hf.VARIANTS[NAME]
  config = make_hf.merge(make_hf.BASE, changes)
  generator = torch.Generator().manual_seed(sum(map(ord, NAME)))
  model = transformers.DeepseekV3ForCausalLM(make_hf.hf_config(config)).float()
  make_hf.randomize(model, bias_range, generator)
  bias = "e_score_correction_bias"
  for name, value in model.state_dict().items():
    if not torch.equal(value.bfloat16().float(), value):
      raise AssertionError(f"{name} is not exact in bfloat16")
  for name, value in [*model.named_parameters(), *model.named_buffers()]:
    value.data = value.data if name.endswith(bias) else value.data.bfloat16()
  folder = make_hf.HERE / "hf_folder"
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
  main()
