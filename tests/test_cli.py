"""Options in either spelling; one command for all data sets."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

import data_prep
from data_prep import __main__ as prepare
from data_prep import acdc, phantom
from sscl_jax import cli, main, parallel


def test_hyphens_in_options_are_underscores_but_not_in_values():
    parser = cli.make_parser("x", None)
    parser.add_argument("--skip_bad", action="store_true")
    parser.add_argument("--class_names")
    parser.add_argument("path")
    args = cli.parse(parser, ["--skip-bad", "--class-names=left-ear,x", "a-b"])
    assert args.skip_bad and args.class_names == "left-ear,x" and args.path == "a-b"
    assert cli.parse(parser, ["--skip_bad", "p"]).skip_bad


@pytest.mark.parametrize("module", ["sscl_jax.compare", "data_prep.check", "data_prep.folder"])
def test_what_needs_no_jax_does_not_wait_for_it(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_data_sets_are_listed_with_what_they_are(capsys, monkeypatch):
    for argv, status in ((["sscl-prepare", "--help"], 0), (["sscl-prepare"], 2)):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            prepare.main()
        assert stop.value.code == status
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    files = {p.stem for p in Path(data_prep.__file__).parent.glob("*.py")} - {"__init__", "__main__", "common"}
    assert {line[0] for line in lines} == files
    assert all(len(line) > 3 for line in lines)


def test_an_unknown_data_set_is_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sscl-prepare", "acdcc", "--input=x"])
    with pytest.raises(SystemExit, match="no data set 'acdcc': choose one of acdc, chaos"):
        prepare.main()


def test_the_rest_goes_to_the_data_set(tmp_path, monkeypatch, capsys):
    phantom.generate(tmp_path / "scans", patients=1, val=0, test=0)
    arguments = [f"--input={tmp_path / 'scans'}", "--spacing=6"]
    monkeypatch.setattr(sys, "argv", ["sscl-prepare", "acdc", *arguments, f"--output={tmp_path / 'one'}"])
    prepare.main()
    acdc.main([*arguments, f"--output={tmp_path / 'other'}"])
    one, other = capsys.readouterr().out.split(f"{tmp_path / 'other'}: scans, ")
    assert one.split("scans, ")[1] == other and "fingerprint" in other

    monkeypatch.setattr(sys, "argv", ["sscl-prepare", "acdc", "--input=nowhere", f"--output={tmp_path / 'two'}"])
    with pytest.raises(SystemExit) as stop:
        prepare.main()
    assert stop.value.code == 1 and "error: " in capsys.readouterr().err


def test_the_configs_of_the_package_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = Path(data_prep.__file__).parents[1] / "configs" / "acdc.py"
    assert main.find_config("--config=configs/acdc.py:region") == f"--config={ours}:region"
    assert main.find_config("configs/acdc.py") == str(ours)
    for word in ("--config=configs/mine.py", "--workdir=configs/acdc.py", "--config=acdc.py"):
        assert main.find_config(word) == word
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "acdc.py").touch()  # the user's own
    assert main.find_config("--config=configs/acdc.py:region") == "--config=configs/acdc.py:region"


def test_compiled_programs_are_kept_where_the_user_keeps_caches(tmp_path, monkeypatch):
    def kept(cache_home, home=tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
        monkeypatch.setenv("HOME", str(home))
        jax.config.update("jax_compilation_cache_dir", None)
        parallel.keep_compiled()
        return jax.config.jax_compilation_cache_dir

    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        assert Path(kept(tmp_path / "own")).parent == tmp_path / "own" / "sscl_jax"
        assert Path(kept("")).parent == tmp_path / ".cache" / "sscl_jax"
        assert kept(tmp_path / "file") is None  # no folder can be made there
        assert kept("", home="nowhere") is None and not (tmp_path / "nowhere").exists()
        jax.config.update("jax_compilation_cache_dir", "chosen")
        parallel.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == "chosen"
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
        jax.config.update("jax_compilation_cache_dir", None)


def test_no_field_has_the_name_of_a_method_of_the_config():
    """Such a field, as `contrast.keys`, cannot be set on the command line: it finds the method."""
    from ml_collections import ConfigDict

    from configs import base

    def names(config):
        for name, value in config.items():
            yield name
            if isinstance(value, ConfigDict):
                yield from names(value)

    assert [name for name in names(base.get_config()) if hasattr(ConfigDict, name)] == []


def test_the_installed_command_shows_its_options():
    code = "import sys; from sscl_jax import main; sys.argv = ['sscl-train', '--help']; main.run()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "goes on with a training" in told.stdout
    for option in ("--config", "--workdir", "--[no]dry_run"):
        assert option in told.stdout
