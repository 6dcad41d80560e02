"""Recipes of published corpora: those that are shipped fit the paper's configuration, and mistakes are answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dlcm_lightning.data.preprocessing.recipe import Recipe, load_recipe
from dlcm_lightning.errors import DataError

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "data" / "sources").glob("*.yaml"))


def test_the_recipes_are_those_of_the_papers_sources() -> None:
    configured = yaml.safe_load((ROOT / "configs" / "data" / "paper.yaml").read_text())["data"]["sources"]
    recipes = [load_recipe(path) for path in SHIPPED]
    assert {(recipe.name, recipe.domain) for recipe in recipes} == {(one["name"], one["domain"]) for one in configured}
    for path, recipe in zip(SHIPPED, recipes, strict=True):
        assert path.stem == recipe.name and recipe.text_field
        assert recipe.home_page.startswith("https://") and set(recipe.about) == {"licence", "home_page"}


def test_what_is_not_given_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: a\ndomain: b")
    assert load_recipe(tmp_path / "x.yaml") == Recipe("a", "b", "**/*", "text", "", "")
    assert load_recipe(tmp_path / "x.yaml").about == {}


@pytest.mark.parametrize(("text", "message"), [
    ("name: a\ndomain: b\ntextfield: c", "textfield = 'c': no key of a recipe; did you mean text_field?"),
    ("name: a\ndomain: b\nfoo: c", "foo = 'c': no key of a recipe; known are name, domain, glob"),
    ("name: a", "domain is not given; add a line `domain: ...`"),
    ("domain: a", "name is not given"),
    ("name: 5\ndomain: b", "name = 5: must be text that is not empty; quote it"),
    ("name: a\ndomain: b\nglob:", "glob = None: must be text"),
    ("name: a\ndomain: ''", "domain = '': must be text"),
    ("- a", "holds ['a'], no recipe; write `key: value` lines with name, domain"),
    ("", "holds None, no recipe"),
    ("a: [", "not readable as YAML"),
    ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
])
def test_a_mistake_is_answered_by_key_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DataError, match=r"x\.yaml: " + re.escape(message)):
        load_recipe(tmp_path / "x.yaml")


def test_a_recipe_that_is_not_there_names_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such recipe; shipped are .*nemotron-cc"):
        load_recipe(tmp_path / "nowhere.yaml")
