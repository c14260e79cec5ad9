"""The documentation is what the code is: the table of fields, links, commands and pictures."""

import re
from pathlib import Path

import pytest

from configs import base, describe
from sscl_jax import config_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for folder in (".", "docs", "benchmarks") for page in ROOT.glob(f"{folder}/*.md"))


def test_the_table_of_fields_is_that_of_the_config():
    assert all(said for *_, said in describe.fields()), "every field has a comment"
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == describe.page(), "run: python -m configs.describe > docs/config.md"
    assert {name for name, *_ in describe.fields()} == set(config_fields.flat_config(base.get_config()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_name_modules_configs_and_methods_that_exist(path):
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:sscl_jax|data_prep|configs)(?:\.\w+)*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for config, method in re.findall(r"(configs/\w+\.py)(?::(\w+))?", text):
        assert (ROOT / config).is_file() or config in ("configs/mine.py", "configs/NAME.py"), config  # a stand-in
        assert method in ("", "METHOD", *base.METHODS), method
    for field in re.findall(r"--config\.([a-z_.]+)=", text):
        assert field in config_fields.flat_config(base.get_config()), field


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_and_benchmarks_that_are_cited_exist(path):
    text = path.read_text(encoding="utf-8")
    for file, name in re.findall(r"((?:tests|benchmarks)/\w+\.py)(?:::(\w+))?", text):
        assert (ROOT / file).is_file(), file
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), name
