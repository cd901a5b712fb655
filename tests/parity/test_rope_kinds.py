# SPDX-License-Identifier: Apache-2.0
"""The frequencies of every kind of rotation against the functions of transformers."""

from typing import Any

import numpy as np
import pytest
from hf_models import make_config
from test_transformers_families import ROTATIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ternaryforge.families.fields import Fields
from ternaryforge.families.rope import Rotation, read_rotation

HEAD_DIMS = (6, 22, 64, 128)
CONTEXT = 4096


def read(fields: dict[str, Any], head_dim: int) -> Rotation:
    defaults = {"rope_theta": 10000.0, "max_position_embeddings": CONTEXT}
    return read_rotation(Fields(fields, "config.json", defaults), head_dim)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("theta", [1000.0, 500000.0, 1000042])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_frequencies(kind: str, theta: float, head_dim: int) -> None:
    parameters = ROTATIONS[kind] | {"rope_theta": theta}
    if "original_max_position_embeddings" in parameters:
        parameters["original_max_position_embeddings"] = 1024
    config = make_config("llama", head_dim=head_dim, max_position_embeddings=CONTEXT, rope_parameters=parameters)
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    found = read({"rope_parameters": parameters}, head_dim)
    np.testing.assert_allclose(found.frequencies, expected.numpy(), rtol=4e-7)
    assert found.scale == pytest.approx(scale, rel=1e-12)


def test_where_the_fields_stand() -> None:
    """Older files have `type`, the base beside the object, and the original context beside it or nowhere."""
    linear = {"type": "linear", "factor": 2.0}
    expected = read({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 22)
    assert read({"rope_scaling": linear, "rope_theta": 5e5, "rope_parameters": None}, 22) == expected
    assert read({"rope_scaling": linear | {"rope_theta": 5e5}, "rope_theta": 1.0}, 22) == expected
    assert read({"rope_scaling": linear, "rope_theta": 5e4}, 22) != expected
    yarn = {"type": "yarn", "factor": 4.0}
    inside, beside = yarn | {"original_max_position_embeddings": 99}, {"original_max_position_embeddings": 99}
    assert read({"rope_scaling": inside}, 22) == read({"rope_scaling": yarn} | beside, 22)
    other = yarn | {"original_max_position_embeddings": 2000}
    assert read({"rope_scaling": other} | beside, 22) == read({"rope_scaling": inside}, 22)
    whole = yarn | {"original_max_position_embeddings": CONTEXT}
    assert read({"rope_scaling": yarn}, 22) == read({"rope_scaling": whole}, 22) != read({"rope_scaling": inside}, 22)
    assert read({"rope_scaling": {}, "rope_parameters": {"rope_type": "default"}}, 22) == read({}, 22)
