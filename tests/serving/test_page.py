"""The page in a real browser: with a keyboard, for texts and questions, in light and dark."""

import json
import re
import shutil

import pytest

from bloblora.evaluation import reliability, reliability_diagram
from bloblora.runs import targets_of
from bloblora.serving import load_hosted, open_hosted
from tests.serving.conftest import SETTINGS, serving
from tests.tiny_base import queries

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
pytestmark = [
    pytest.mark.skipif(sync_playwright is None, reason="needs playwright: pip install -e '.[dev]'"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(folders, tmp_path_factory):
    """A server of an evaluated run on texts, a plain one, and one on questions; it wants a key."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(folders["desk"], folder / "desk")
    names = [str(folder / "desk"), folders["lora"], folders["quiz"]]
    hosted = load_hosted(open_hosted(names, SETTINGS), SETTINGS)
    run = hosted["desk"].run
    bins = reliability(run.predict(queries(), 3).probabilities, targets_of(run.task, queries()))
    reliability_diagram({"desk": bins}, folder / "desk" / "reliability.png")
    metrics = {"accuracy": 0.75, "ece": 0.125, "num_examples": 4, "nll": float("inf")}
    evaluations = [{"data": "queries.jsonl", "metrics": {"accuracy": 0}}, {"data": "test", "metrics": metrics}]
    (folder / "desk" / "metrics.json").write_text(json.dumps({"evaluations": evaluations}))
    with serving(hosted, keys=["the-key"]) as client:
        yield str(client.base_url)


@pytest.fixture
def page(browser, url):
    """The page, opened; nothing may be logged as an error but what the server refused."""
    context = browser.new_context(viewport={"width": 900, "height": 1400})
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "blob:", "data:")) else problems.append(request.url),
    )
    page.goto(url)
    page.get_by_role("alert").filter(has_text="no valid API key").wait_for()
    page.get_by_label("API key").fill("the-key")
    page.get_by_label("API key").press("Tab")
    page.get_by_role("img", name="Reliability diagram of desk").wait_for()
    yield page
    assert [problem for problem in problems if "status of 4" not in problem] == []
    context.close()


def rows(page, caption):
    """Cells of the rows of an answer's table."""
    table = page.get_by_role("table", name=re.compile(caption)).first
    return [row.inner_text().split("\t") for row in table.get_by_role("row").all()]


def test_a_query_by_keyboard_alone(page, url):
    page.get_by_label("API key").focus()
    for key in ("Tab", "Tab"):  # to the radio buttons, to the text
        page.keyboard.press(key)
    page.keyboard.type("where is my parcel")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Answers").wait_for()
    assert page.evaluate("document.activeElement.id") == "results-title"
    headers = {"Authorization": "Bearer the-key"}
    body = {"model": "desk", "inputs": {"text": "where is my parcel"}}
    answer = page.request.post(f"{url}/v1/predict", headers=headers, data=body).json()["answers"][0]
    found = {name.strip(): number for name, *_, number in rows(page, "Probabilities")}
    assert found == {k: f"{p:.3f} ± {answer['std'][k]:.3f}" for k, p in answer["probabilities"].items()}
    numbers = [row[-1] for row in rows(page, "Uncertainty")]
    assert numbers == [f"{answer[name]:.3f} nats" for name in ("expected_entropy", "mutual_information")]
    article = page.get_by_role("article").inner_text()
    assert f"{answer['label']} with probability {answer['confidence']:.3f} {answer['decision']}" in article
    assert f"Label set: {', '.join(answer['label_set'])}" in article
    status = page.get_by_role("status").inner_text()
    assert status == f"{answer['label']}, probability {answer['confidence']:.3f}, {answer['decision']}."
    widths = page.locator("article rect.bar").evaluate_all("bars => bars.map(bar => +bar.getAttribute('width'))")
    assert widths[:2] == pytest.approx(sorted((100 * p for p in answer["probabilities"].values()), reverse=True))


def test_a_list(page):
    page.get_by_label("a list").check()
    page.get_by_role("textbox", name="List").fill("where is my parcel\n\n<b>refund</b>\n")
    page.get_by_role("button", name="Answer").click()
    page.get_by_role("heading", name="<b>refund</b>").wait_for()
    assert page.get_by_role("article").count() == 2
    assert page.get_by_role("status").inner_text() == "2 answers."


def test_questions(page):
    page.get_by_role("combobox", name="Model").select_option("quiz")
    page.get_by_role("textbox", name="Question").fill("Which gas?")
    page.get_by_role("textbox", name="Choices").fill("iron\ncarbon dioxide\nsand")
    page.get_by_role("button", name="Answer").click()
    page.get_by_role("heading", name="Which gas?").wait_for()
    assert {row[0].strip() for row in rows(page, "Probabilities")} == {"iron", "carbon dioxide", "sand"}
    page.get_by_label("a list").check()
    assert not page.get_by_role("textbox", name="Choices").is_visible()
    page.get_by_role("textbox", name="List").fill('{"question": "What?", "choices": ["a", "b"]}\nnonsense')
    page.get_by_role("button", name="Answer").click()
    page.get_by_text("Line 2 is not JSON: nonsense").wait_for()
    page.get_by_role("textbox", name="List").fill('{"question": "What?", "choices": ["a"]}')
    page.get_by_role("button", name="Answer").click()
    page.get_by_text("inputs[0].choices: ['a']").wait_for()


def test_a_plain_lora_has_no_spread_and_no_decision(page):
    page.get_by_role("combobox", name="Model").select_option("lora")
    page.get_by_text("no metrics.json in its folder").wait_for()
    page.get_by_role("textbox", name="Query").fill("where is my parcel")
    page.get_by_role("button", name="Answer").click()
    page.get_by_role("heading", name="where is my parcel").wait_for()
    assert all("±" not in row[-1] for row in rows(page, "Probabilities"))
    assert page.locator("line.spread").count() == page.locator(".decision").count() == 0


def test_how_far_the_model_can_be_trusted(page):
    text = page.get_by_role("region", name="How far this model can be trusted").inner_text()
    assert "accuracy 0.750, expected calibration error 0.125 on 4 examples" in text
    assert "at most 0.9 of the answered are wrong" in text
    diagram = page.get_by_role("img", name="Reliability diagram of desk")
    assert diagram.evaluate("image => image.naturalWidth") > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme):
    """4.5 : 1 for text and 3 : 1 for bars and borders, as WCAG 2.2 asks (1.4.3 and 1.4.11)."""
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("textbox", name="Query").fill("where is my parcel")
    page.get_by_role("button", name="Answer").click()
    page.get_by_role("article").wait_for()
    style = "(e, name) => getComputedStyle(e)[name]"
    back = page.locator("body").evaluate(style, "backgroundColor")
    panel = page.locator("article").evaluate(style, "backgroundColor")
    for where, name, ground, least in (
        ("body", "color", back, 4.5),
        ("#error", "color", back, 4.5),
        ("article", "color", panel, 4.5),
        ("article caption >> nth=0", "color", panel, 4.5),
        ("article .decision >> nth=0", "color", panel, 4.5),
        ("article rect.bar >> nth=0", "fill", panel, 3),
        ("article rect.second", "fill", panel, 3),
        ("textarea >> nth=0", "borderTopColor", back, 3),
    ):
        assert contrast(page.locator(where).evaluate(style, name), ground) >= least, where
    button = page.get_by_role("button", name="Answer")
    assert contrast(button.evaluate(style, "color"), button.evaluate(style, "backgroundColor")) >= 4.5


def contrast(a, b):
    """(L₁ + 0.05) / (L₂ + 0.05) of two CSS colours, WCAG 2.2."""
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(value) / 255 for value in re.findall(r"\d+", color)[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
