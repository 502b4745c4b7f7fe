"""Importing does nothing: nothing is compiled, printed or brought in that a user did not ask for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import heronry
from heronry.faults import describe

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "llama_cpp", "llguidance", "rich.progress")


def test_importing_is_light_and_silent(tmp_path):
    code = f"import sys, heronry; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert not list(tmp_path.iterdir())


def test_loading_and_a_step_bring_no_compiler_of_python():
    """A second and 70 MB, which PyTorch takes when random numbers are drawn on "meta" or functions are decorated."""
    code = (
        "import sys, torch, heronry\n"
        "with torch.inference_mode():\n"
        "    heronry.LLM().model(torch.tensor([[1]]))\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names_are_imported_on_first_use():
    code = (
        "import sys, heronry\n"
        "assert not {'torch', 'numpy', 'typer', 'rich'} & set(sys.modules)\n"
        "assert all(hasattr(heronry, name) for name in heronry.__all__)\n"
        "assert heronry.models.vision.create and heronry.convert.convert\n"
        "assert not hasattr(heronry, 'laod')\n"
        "assert not {'typer', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_serving_needs_packages_of_its_own():
    code = "import sys; sys.modules['fastapi'] = None; from heronry.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "serve", "--port", "0"], capture_output=True, text=True)
    message = "heronry: this needs the package fastapi: pip install 'heronry[serve]'\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_dir_lists_what_is_public():
    assert {name for name in dir(heronry) if not name.startswith("_")} == {*heronry.__all__, *heronry._SUBMODULES}
    assert [name for name in dir(heronry) if name.startswith("_")] == ["__version__"]


@pytest.mark.parametrize("module", ["transformers", "vision"])
def test_a_missing_package_is_named_with_what_installs_it(module):
    code = f"import sys; sys.modules['transformers'] = None; import heronry.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: this needs transformers: pip install 'heronry[transformers]'"
    )


def test_a_missing_module_names_its_package():
    error = ModuleNotFoundError("No module named 'prompt_toolkit.history'", name="prompt_toolkit.history")
    assert describe(error) == "this needs the package prompt_toolkit: pip install 'heronry[cli]'"
    error = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
    assert describe(error) == "this needs the package fastapi: pip install 'heronry[serve]'"
    error = ModuleNotFoundError("No module named 'wandb.sdk'", name="wandb.sdk")
    assert describe(error) == "this needs the package wandb: pip install 'wandb'"
