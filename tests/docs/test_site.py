"""The site's search, with the settings of mkdocs.yml, opened from a folder in a real browser."""

import shutil

import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.docs.blocks import ROOT
from tests.serving.test_page import CHROMIUM, browser, pytestmark  # noqa: F401


def test_search_works_without_a_server(browser, tmp_path):  # noqa: F811
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    for name in ("nav", "hooks", "extra_css", "exclude_docs", "not_in_nav"):
        settings.pop(name)
    settings["plugins"] = [plugin for plugin in settings["plugins"] if isinstance(plugin, str)]
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Start\n\nNothing here.\n")
    (docs / "other.md").write_text("# The other page\n\nA posterior is a marmalade of weights.\n")
    for script in settings["extra"]["polyfills"]:
        shutil.copy(ROOT / "docs" / script, docs)
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    build(load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    page = browser.new_page()
    outside = []
    page.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
    page.goto((tmp_path / "site" / "index.html").as_uri())
    page.get_by_role("textbox", name="Search").click()
    page.keyboard.type("marmalade")
    page.locator(".md-search-result__link", has_text="The other page").click()
    page.wait_for_url("**/other.html*")
    page.close()
    assert outside == []
