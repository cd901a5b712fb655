# SPDX-License-Identifier: Apache-2.0
"""What the card of an exported training says: its method in words, and how the folder is loaded."""

from ternaryforge.torch.qat import QATConfig

_IN_TRANSFORMERS = {
    True: """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # plain transformers

from ternaryforge.hf import accelerate_bitnet

with accelerate_bitnet():  # the same model on compiled kernels
    model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    False: """import ternaryforge.hf  # makes the format known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
}

DENSE_LOADING = """Any program that reads dense checkpoints loads it, transformers among them:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""


def describe_method(config: QATConfig) -> str:
    """One line: quantizer, scales, inputs."""
    scales = {"tensor": "one scale a matrix", "row": "one scale a row"}.get(
        config.scale, f"one scale for {config.group_size} columns of a row"
    )
    inputs = "inputs int8, one scale a token" if config.activation_bits == 8 else "inputs not quantised"
    return f"quantisation-aware training, quantizer `{config.quantizer}`; {scales}; {inputs}"


def describe_loading(*, stock: bool) -> str:
    """Transformers, this library, llama.cpp; `FOLDER` stands for the checkpoint."""
    return f"""In transformers (`pip install 'ternaryforge[hf]'`):

```python
{_IN_TRANSFORMERS[stock]}
```

With TernaryForge alone, on the CPU:

```python
import ternaryforge as tf

model = tf.TernaryModel.from_pretrained("FOLDER")
print(model.generate("Once upon a time", max_new_tokens=40).text)
```

In llama.cpp, through a GGUF file (refused with the reason where no type of GGUF holds these widths or scales exactly):

    ternaryforge export FOLDER model.gguf --profile upstream
    llama-cli -m model.gguf"""
