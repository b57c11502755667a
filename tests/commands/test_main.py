"""The command ``jaxmoo``: which commands there are, and how they are called and end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from devices import ROOT
from jaxmoo import __version__
from jaxmoo.commands.command import command, pairs
from jaxmoo.commands.main import COMMANDS, main, run
from jaxmoo.config.training import load_config
from jaxmoo.errors import ConfigError, InterruptedRunError


def ended(function, *arguments, **options) -> int:
    """The exit code, of help too."""
    try:
        return function(*arguments, **options)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_what_it_takes_under_the_name_it_was_called_by(name, capsys):
    assert ended(main, [name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: jaxmoo {name} [-h]") and "scripts/" not in shown
    assert ended(run, name, ["--help"], prog=f"{name}.py") == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py [-h]")


def test_every_script_is_a_command():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    only = {"generate", "compare", "methods", "configs", "doctor", "launch"}
    assert set(COMMANDS) - scripts == only and scripts < set(COMMANDS)
    for name in scripts:
        assert f'run("{name}", prog="{name}.py")' in (ROOT / "scripts" / f"{name}.py").read_text()


def test_help_lists_the_commands_before_anything_large_is_imported():
    program = (
        "import sys; from jaxmoo.commands.main import main; code = main(['--help'])\n"
        "large = {'jax', 'numpy', 'transformers', 'orbax', 'omegaconf', 'matplotlib'}\n"
        "sys.exit(f'{large & set(sys.modules)} imported' if large & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, summary in COMMANDS.items():
        assert f"  {name:<8}  {summary}\n" in done.stdout


def test_help_of_no_command_waits_for_jax():
    program = (
        "import sys; from jaxmoo.commands.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "    found = {'jax', 'transformers', 'orbax', 'torch'} & set(sys.modules)\n"
        "    if found: sys.exit(f'{name} imports {found}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_command_a_misspelt_one_and_the_version(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: jaxmoo COMMAND")
    assert main(["trian", "--config", "x"]) == 2
    assert "no command 'trian'. Did you mean 'train'? There are train, launch, data" in (
        capsys.readouterr().err
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxmoo {__version__}\n"


def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch):
    # As where only what `resolve_conflicts` needs was installed.
    for name in [name for name in sys.modules if name.startswith("jaxmoo.co")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    assert main(["train", "--config", "quickstart"]) == 2
    message = capsys.readouterr().err
    assert "jaxmoo train needs the package omegaconf" in message
    assert "pip install 'jaxmoo[train]'" in message


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("no such thing"), 2, "error: no such thing\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
        (InterruptedRunError("Stopped by SIGTERM.", 15), 143, "Stopped by SIGTERM.\n"),
        (KeyboardInterrupt(), 130, "Enough.\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_command_ends_with_a_line_and_a_code(error, code, said, capsys):
    @command("Enough.")
    def fails() -> int:
        raise error

    assert fails() == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("wrong", ["en", "en=", "=eng_Latn"])
def test_what_is_no_pair_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"--codes takes KEY=NAME, .*found '{wrong}'"):
        pairs("--codes", ["pt=por_Latn", wrong])


# --- Methods and configs ---------------------------------------------------------------------


def test_methods_are_listed_with_what_they_read_and_take(capsys):
    assert main(["methods"]) == 0
    entries = dict(
        entry.strip().split("\n    ", 1) for entry in capsys.readouterr().out.split("\n\n  ")[1:]
    )
    assert "kind: Gram matrix\n    options: c=0.5, rescale='1+c'" in entries["cagrad"]
    assert "kind: Gram matrix, stochastic" in entries["pcgrad"]
    assert "kind: coordinates of the gradients\n" in entries["trimmed_mean"]
    assert "two batches per step, stateful" in entries["modo"]
    assert "options: weights (needed)" in entries["constant"]
    assert entries["bytes:SIZE"].startswith("Consecutive pieces")
    assert entries["famo"].startswith("Fast adaptive multitask optimisation.")


def test_examples_are_listed_and_found_by_name_wherever_one_is(tmp_path, monkeypatch, capsys):
    wanted = load_config(ROOT / "configs" / "llama-3-8b.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^quickstart +The quick start: fine-tune a small chat model", shown, re.M)
    assert "study/sib200 " in shown
    assert load_config("llama-3-8b") == load_config("configs/llama-3-8b.yaml") == wanted
    assert main(["train", "--config", "quikstart"]) == 2
    assert "There is no config file quikstart. Did you mean 'quickstart'?" in (
        capsys.readouterr().err
    )
    # One's own copy goes first.
    Path("configs").mkdir()
    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    Path("configs", "quickstart.yaml").write_text(text.replace("seed: 0", "seed: 7"))
    assert load_config("quickstart").seed == 7
    # What is there, and no file, is not taken for another.
    Path("lora").mkdir()
    assert load_config("lora").lora.rank is not None


def test_examples_are_copied_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "--copy", "mine"]) == 0
    for name in (
        "configs/quickstart.yaml",
        "configs/chat_templates/topic.jinja",
        "launch/slurm.sh",
    ):
        assert Path("mine", name).read_bytes() == (ROOT / name).read_bytes()
    assert os.access(Path("mine", "launch", "slurm.sh"), os.X_OK) == os.access(
        ROOT / "launch" / "slurm.sh", os.X_OK
    )
    changed = Path("mine", "configs", "lora.yaml")
    changed.write_text("mine")
    shutil.rmtree(Path("mine", "launch"))
    capsys.readouterr()
    assert main(["configs", "--copy", "mine"]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert changed.read_text() == "mine" and not Path("mine", "launch").exists()


# --- As it is installed ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_brings_the_command_and_the_examples(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("jaxmoo", "configs", "launch"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source],
        capture_output=True,
        text=True,
    )
    if built.returncode and "hatchling" in built.stderr and not os.environ.get("CI"):
        pytest.skip("hatchling, which builds it, cannot be fetched")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("jaxmoo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("configs", "launch"):
        files = [path for path in (ROOT / kind).rglob("*") if path.is_file()]
        assert {f"jaxmoo/_{kind}/{path.relative_to(ROOT / kind)}" for path in files} <= names
    assert "jaxmoo/py.typed" in names and "jaxmoo/commands/train.py" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "configs/"))]

    place = tmp_path / "venv"
    make = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", place]
    subprocess.run(make, check=True)
    python = place / "bin" / "python"
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    # The packages of the environment that runs the tests are found behind the installed wheel.
    behind = [path for path in sys.path if path.endswith("site-packages")]
    (next(place.glob("lib/*/site-packages")) / "zz.pth").write_text("\n".join(behind))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def jaxmoo(*arguments: str) -> str:
        done = subprocess.run(
            [place / "bin" / "jaxmoo", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=clean, check=True,
        )  # fmt: skip
        return done.stdout

    assert "quickstart  " in jaxmoo("configs")
    assert "source: smollm2-135m-instruct" in jaxmoo(
        "train", "--config", "quickstart", "--print-config"
    )
    jaxmoo("configs", "--copy", "copied")
    assert (tmp_path / "copied" / "configs" / "eval" / "xnli.yaml").is_file()
