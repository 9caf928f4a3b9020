"""What run.json says of the software."""

import diffusers
import numpy
import peft
import tokenizers
import transformers

from fedgen_edge.runs.provenance import library_versions


def test_the_libraries_say_the_same_versions_of_themselves() -> None:
    installed = library_versions("language")
    assert installed["transformers"] == transformers.__version__
    assert installed["peft"] == peft.__version__
    assert installed["tokenizers"] == tokenizers.__version__
    assert installed["numpy"] == numpy.__version__
    assert {"accelerate", "safetensors"} < set(installed)


def test_diffusers_is_named_where_images_are_learnt_and_not_for_text() -> None:
    assert "diffusers" not in library_versions("language")
    assert library_versions("diffusion")["diffusers"] == diffusers.__version__
