"""The page in a real browser: with a keyboard, for texts and questions, in light and dark, on a desktop and a phone.

The pictures in docs/images are those of a trained run:

    SCREENSHOTS_OF=runs/demo/blob python -m pytest tests/serving/test_page.py -k screenshots
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bloblora import runs
from bloblora.evaluation import reliability, reliability_diagram
from bloblora.runs import targets_of
from bloblora.runs.decide import calibrate
from bloblora.serving import load_hosted, open_hosted
from tests.generation.conftest import RECORDS
from tests.serving.conftest import SETTINGS, TEXT_SETTINGS, serving
from tests.tiny_base import queries, write_signed

ROOT = Path(__file__).parents[2]
WARNING = "At the end 93 % of the posterior was as wide as the prior."
DECISIONS = {"abstain": "too unsure: ask a person", "answer": "sure enough to answer"}
UNDER = "under 0.1\N{NO-BREAK SPACE}%"
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
    """A server of an evaluated run on texts, a plain one that ended badly, and one on questions; it wants a key."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("desk", "lora"):
        shutil.copytree(folders[name], folder / name)
    described = json.loads((folder / "lora" / "run.json").read_text())
    described["training"]["warnings"] = [WARNING]
    write_signed(folder / "lora" / "run.json", described)
    names = [str(folder / "desk"), str(folder / "lora"), folders["three"], folders["quiz"]]
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
def opened(browser):
    """Opens pages; nothing may be logged as an error but what the server refused, and nothing come from elsewhere."""
    contexts, problems = [], []

    def opened(url, width=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        own = (url.partition("/docs")[0], "blob:", "data:")
        page.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [problem for problem in problems if "status of 4" not in problem] == []


@pytest.fixture
def page(opened, url):
    """The page of the server that wants a key, which it got, with its settings unfolded."""
    page = opened(url)
    page.get_by_role("alert").filter(has_text="no valid API key").wait_for()
    page.get_by_label("API key").fill("the-key")
    page.get_by_label("API key").press("Tab")
    page.get_by_role("img", name="Reliability diagram of desk").wait_for()
    page.get_by_text("Settings").click()
    return page


def ask(page, text):
    """The article that answers a text."""
    page.get_by_role("textbox", name="Text").fill(text)
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_role("heading", name=text, exact=True).wait_for()
    return page.get_by_role("article").first


def said(article):
    """What stands under each word of an article."""
    return article.locator("dt").evaluate_all(
        "all => Object.fromEntries(all.map(dt => [dt.innerText, dt.nextSibling.innerText]))"
    )


def rows(page):
    """Cells of the rows of an answer's table."""
    return [row.inner_text().split("\t") for row in page.get_by_role("table").first.get_by_role("row").all()]


def percent(share):
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def test_a_query_by_keyboard_alone(page, url):
    page.get_by_role("textbox", name="Text").focus()
    page.keyboard.type("where is my parcel")
    for _ in range(4):  # past the examples
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Answers").wait_for()
    assert page.evaluate("document.activeElement.id") == "results-title"
    headers = {"Authorization": "Bearer the-key"}
    body = {"model": "desk", "inputs": "where is my parcel"}
    answer = page.request.post(f"{url}/v1/predict", headers=headers, data=body).json()["answers"][0]
    found = {name.strip(): number for name, number in rows(page)}
    assert found == {k: f"{percent(p)} ± {100 * answer['std'][k]:.1f}" for k, p in answer["probabilities"].items()}
    article = page.get_by_role("article")
    words = said(article)
    assert words["How sure"].startswith(percent(answer["confidence"]))
    most = 0.6931  # nats, of two labels
    assert words["What the text leaves open"].startswith(percent(min(1, answer["expected_entropy"] / most)))
    assert words["The model's own doubt"].startswith((UNDER, percent(answer["mutual_information"] / most)))
    assert f"One of these, by the rule for label sets below: {', '.join(answer['label_set'])}." in article.inner_text()
    status = page.get_by_role("status").inner_text()
    assert status == f"{answer['label']}, {percent(answer['confidence'])} sure, {DECISIONS[answer['decision']]}."
    widths = page.locator("article td, article th rect.bar").evaluate_all(
        "bars => bars.filter(bar => bar.tagName === 'rect').map(bar => +bar.getAttribute('width'))"
    )
    assert widths == pytest.approx(sorted((100 * p for p in answer["probabilities"].values()), reverse=True))


def test_examples_are_clicked(page):
    examples = page.get_by_role("group", name="Try one of these:").get_by_role("button")
    assert examples.all_inner_texts() == ["parcel", "refund", "the purple idea sleeps at nine kilograms"]
    examples.nth(2).click()
    page.get_by_role("heading", name="the purple idea").wait_for()
    assert page.get_by_role("textbox", name="Text").input_value() == "the purple idea sleeps at nine kilograms"
    page.get_by_role("combobox", name="Model").select_option("quiz")
    examples.filter(has_text="Which gas do plants take in?").click()
    page.get_by_role("heading", name="Which gas do plants take in?").wait_for()
    assert {row[0].strip() for row in rows(page)} == {"oxygen", "carbon dioxide", "helium"}


def test_a_spinner_turns_while_the_model_works(page):
    held = []
    page.route("**/v1/predict", lambda route: held.append(route))
    page.get_by_role("textbox", name="Text").fill("where is my parcel")
    send = page.get_by_role("button", name="Answer", exact=True)
    send.click()
    page.get_by_role("status").filter(has_text="Working").wait_for()
    assert page.locator(".spinner").is_visible()
    assert send.is_disabled()
    held[0].continue_()
    page.get_by_role("article").wait_for()
    assert not page.locator(".spinner").is_visible()
    assert send.is_enabled()


def test_a_calibrated_run_says_what_its_rules_say(page, url):
    """What the server decided and what the rules promise; nothing measured how many foreign texts they find."""
    headers, seen = {"Authorization": "Bearer the-key"}, set()
    for text in ("where is my parcel", "where", "the money", "pasta?", "twice", "is it late"):
        body = {"model": "desk", "inputs": text}
        answer = page.request.post(f"{url}/v1/predict", headers=headers, data=body).json()["answers"][0]
        article = ask(page, text)
        badge = DECISIONS[answer["decision"]]
        assert page.get_by_role("status").inner_text().endswith(f" sure, {badge}.")
        flag = ["out of scope"] if answer["out_of_scope"] else []
        assert article.locator(".decision").all_inner_texts() == [*flag, badge]
        assert "at most 0.9 of the answered are wrong" in article.inner_text()
        words = said(article)["Unlike anything in training"]
        assert words.startswith("Flagged by" if flag else "Not flagged by")
        assert "How many foreign texts it finds was not measured." in words
        seen.add(bool(flag))
    assert seen == {True, False}
    page.get_by_role("spinbutton", name="Weight samples").fill("5")
    article = ask(page, "where is my parcel")
    assert article.locator(".decision").all_inner_texts() == ["not checked"]
    assert "calibrated rules are for 3 weight samples, not for 5." in article.inner_text()


def test_a_run_without_a_rule_says_how_to_get_one(page):
    """It claims neither that a text is like the training's nor that it isn't, however small the model's own doubt."""
    page.get_by_role("combobox", name="Model").select_option("three")
    article = ask(page, "the purple idea sleeps at nine kilograms")
    assert article.locator(".decision").all_inner_texts() == ["not checked"]
    text, words = article.inner_text(), said(article)
    assert "bloblora calibrate FOLDER --data held_out.jsonl --samples 3" in text
    assert words["Unlike anything in training"].startswith("Not known: the model has no calibrated rule")
    assert "they can agree on a text unlike any in training" in words["The model's own doubt"]
    assert page.get_by_role("status").inner_text().endswith(" sure.")


def test_a_list(page):
    page.get_by_label("a list").check()
    page.get_by_role("textbox", name="List").fill("where is my parcel\n\n<b>refund</b>\n")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_role("heading", name="<b>refund</b>").wait_for()
    assert page.get_by_role("article").count() == 2
    assert page.get_by_role("status").inner_text() == "2 answers."


def test_a_server_that_is_gone_or_behind_a_proxy_that_refuses(browser, hosted):
    context = browser.new_context()
    page = context.new_page()
    send = page.get_by_role("button", name="Answer", exact=True)
    with serving({"desk": hosted["desk"]}) as client:
        page.goto(str(client.base_url))
        page.get_by_role("heading", name="desk").wait_for()
        page.get_by_role("textbox", name="Text").fill("where is my parcel")
        refusals = iter([{"detail": "bad gateway"}, {"error": "bad gateway"}, None])
        page.route("**/v1/predict", lambda route: route.fulfill(status=502, json=next(refusals)))
        for _ in range(3):
            send.click()
            page.get_by_role("alert").filter(has_text="The server answered with status 502.").wait_for()
        page.unroute("**/v1/predict")
    send.click()
    page.get_by_role("alert").filter(has_text="The server can't be reached").wait_for()
    context.close()


def test_a_diagram_that_comes_late_is_not_shown_for_another_model(page):
    held = []
    page.get_by_role("combobox", name="Model").select_option("three")
    page.route("**/reliability.png", lambda route: held.append(route))
    with page.expect_request("**/reliability.png"):
        page.get_by_role("combobox", name="Model").select_option("desk")
    page.get_by_role("combobox", name="Model").select_option("lora")
    page.get_by_role("complementary", name="The training ended badly").wait_for()
    with page.expect_response("**/reliability.png"):
        held[0].continue_()
    page.wait_for_timeout(300)  # in which it would appear
    assert not page.locator("#diagram").is_visible()


def test_text_from_right_to_left(page):
    """Its punctuation is at its end, the left one."""
    article = ask(page, "\u05d0\u05d9\u05e4\u05d4 \u05d4\u05d7\u05d1\u05d9\u05dc\u05d4?")
    places = """h3 => [0, h3.firstChild.length - 1].map(at => {
        const range = document.createRange();
        range.setStart(h3.firstChild, at);
        range.setEnd(h3.firstChild, at + 1);
        return range.getBoundingClientRect().x;
    })"""
    first, last = article.locator("h3").evaluate(places)
    assert last < first
    assert page.locator("#text").evaluate("text => getComputedStyle(text).unicodeBidi") == "plaintext"


def test_questions(page):
    page.get_by_role("combobox", name="Model").select_option("quiz")
    page.get_by_role("textbox", name="Question").fill("Which gas?")
    page.get_by_role("textbox", name="Choices").fill("iron\ncarbon dioxide\nsand")
    send = page.get_by_role("button", name="Answer", exact=True)
    send.click()
    page.get_by_role("heading", name="Which gas?").wait_for()
    assert {row[0].strip() for row in rows(page)} == {"iron", "carbon dioxide", "sand"}
    page.get_by_label("a list").check()
    assert not page.get_by_role("textbox", name="Choices").is_visible()
    page.get_by_role("textbox", name="List").fill('{"question": "What?", "choices": ["a", "b"]}\nnonsense')
    send.click()
    page.get_by_text("Line 2 is not JSON: nonsense").wait_for()
    assert page.evaluate("document.activeElement.id") == "send"  # not lost, though it was disabled
    page.get_by_role("textbox", name="List").fill('{"question": "What?", "choices": ["a"]}')
    send.click()
    page.get_by_text("inputs[0].choices: ['a']").wait_for()


def test_written_answers(opened, writer_folder):
    with serving(load_hosted(open_hosted([writer_folder], TEXT_SETTINGS), TEXT_SETTINGS), TEXT_SETTINGS) as client:
        page = opened(str(client.base_url))
        page.get_by_role("textbox", name="Prompt").fill(prompt := RECORDS[0]["prompt"])
        page.get_by_role("button", name="Answer", exact=True).click()
        article = page.get_by_role("article").first
        assert article.locator(".written").inner_text().strip() == "carbon dioxide"
        assert article.locator(".decision").inner_text() == DECISIONS["answer"]
        assert "The rule behind this: at most 0.7 of the answered are wrong" in article.inner_text()
        assert "with probability" in said(article)["Right"]
        table = article.get_by_role("table")
        assert f"{TEXT_SETTINGS.samples} weight samples writes by itself" in table.inner_text()
        assert "carbon dioxide" in table.inner_text()
        tints = article.locator(".written span").evaluate_all("spans => spans.map(s => s.getAttribute('style'))")
        assert len(tints) > 2
        assert article.locator("h3").inner_text().split() == prompt.split()
        assert page.get_by_text("Answer sets: at least 0.4 of the answer sets").is_visible()
        page.locator("summary").filter(has_text="Settings").click()
        page.get_by_label("Sampled answers").fill("3")
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_text("3 sampled answers: semantic entropy").wait_for()
        page.get_by_role("textbox", name="Prompt").fill("where is it " * 100)
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_role("alert").filter(has_text="must be at most 200 tokens").wait_for()


def test_a_plain_lora_has_no_doubt_and_no_weight_samples(page):
    page.get_by_role("combobox", name="Model").select_option("lora")
    page.get_by_text("How often it is right was not measured").wait_for()
    assert not page.get_by_label("Weight samples").is_visible()
    article = ask(page, "where is my parcel")
    assert all("±" not in row[-1] for row in rows(page))
    assert said(article)["The model's own doubt"].startswith("Not measured: this run has one version of the model")
    assert page.locator("line.spread").count() == 0


def test_a_training_that_ended_badly(page):
    assert not page.get_by_role("heading", name="The training ended badly").is_visible()
    page.get_by_role("combobox", name="Model").select_option("lora")
    note = page.get_by_role("complementary", name="The training ended badly")
    assert WARNING in note.inner_text()


def test_how_far_the_model_can_be_trusted(page):
    text = page.get_by_role("region", name="How far this model can be trusted").inner_text()
    assert (
        "Of 4 examples in its metrics.json it got 75.0\N{NO-BREAK SPACE}% right, and its probabilities were off by 12.5"
        in text
    )
    rules = ("Answers: at most 0.9 of the", "Label sets: at least 0.6 of", "Out of scope: at most 0.3 of inputs")
    for promise in rules:
        assert promise in text
    diagram = page.get_by_role("img", name="Reliability diagram of desk")
    assert diagram.evaluate("image => image.naturalWidth") > 100


def test_title_description_and_examples_that_were_given(opened, folders, tmp_path):
    file = tmp_path / "examples.jsonl"
    file.write_text('{"text": "it is late"}\n{"text": "the money, twice", "label": "refund"}\n')
    given = {"title": "Desk <1>", "description": "Which team answers a query.", "examples": str(file)}
    settings = replace(SETTINGS, **given)
    with serving(load_hosted(open_hosted([folders["desk"]], settings), settings), settings) as client:
        page = opened(str(client.base_url))
        page.get_by_role("button", name="the money, twice").click()
        page.get_by_role("article").wait_for()
        assert page.get_by_role("heading", level=1).inner_text() == page.title() == given["title"]
        assert page.get_by_text(given["description"]).is_visible()
        assert page.locator("#examples button").count() == 2
        assert not page.get_by_label("Model", exact=True).is_visible()  # there is one


def test_an_example_is_asked_whole(opened, folders, tmp_path):
    """Its second text too, until its text is changed."""
    pair = {"text": "it is late", "text_pair": "where is my parcel"}
    (tmp_path / "examples.jsonl").write_text(json.dumps(pair))
    settings = replace(SETTINGS, examples=str(tmp_path / "examples.jsonl"))
    hosted = load_hosted(open_hosted([folders["desk"]], settings), settings)
    (run,) = (one.run for one in hosted.values())
    run.task = replace(run.task, template="{text}")  # which takes pairs too
    with serving(hosted, settings) as client:
        page = opened(str(client.base_url))
        with page.expect_request("**/v1/predict") as asked:
            page.get_by_role("button", name="it is late / where is my parcel").click()
        assert asked.value.post_data_json["inputs"] == [pair]
        page.get_by_role("heading", name="it is late / where is my parcel").wait_for()
        with page.expect_request("**/v1/predict") as asked:
            ask(page, "it is later")
        assert asked.value.post_data_json["inputs"] == [{"text": "it is later"}]


def test_without_a_title_it_has_the_name_and_purpose_of_the_run(page):
    assert page.get_by_role("heading", level=1).inner_text() == page.title() == "desk"
    assert page.get_by_text("Sorts a text into one of 2 labels: parcel, refund.").is_visible()


def test_the_page_of_the_schema_needs_nothing_from_elsewhere(opened, url):
    page = opened(f"{url}/docs")
    page.get_by_text("/v1/predict").first.click()
    page.get_by_text("One text").first.wait_for(state="attached")
    page.get_by_role("button", name="Authorize").first.wait_for()


@pytest.mark.parametrize("width", [360, 900])
def test_nothing_is_wider_than_the_screen(opened, hosted, width):
    with serving({name: hosted[name] for name in ("desk", "quiz")}) as client:
        page = opened(str(client.base_url), width)
        page.get_by_text("Settings").click()
        ask(page, "where is my parcel " + "x" * 40)
        right = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
        assert page.evaluate(right) <= page.evaluate("document.documentElement.clientWidth") == width


@pytest.mark.parametrize(("name", "width", "scheme"), [("page", 900, "light"), ("page-phone", 360, "dark")])
def test_screenshots(opened, folders, tmp_path, name, width, scheme):
    """Those of the docs, where a run to show is named."""
    run, folder = os.environ.get("SCREENSHOTS_OF"), ROOT / "docs" / "images"
    settings = replace(SETTINGS, samples=10, title="Which team answers this query?")
    with serving(load_hosted(open_hosted([run or folders["lora"]], settings), settings), settings) as client:
        page = opened(str(client.base_url), width, color_scheme=scheme)
        page.locator("#examples button").first.click()
        page.get_by_role("article").wait_for()
        file = (folder if run else tmp_path) / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        page.screenshot(path=file, full_page=True)
    Image.open(file).quantize(64).save(file, optimize=True)
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme):
    """4.5 : 1 for text and 3 : 1 for bars and borders, as WCAG 2.2 asks (1.4.3 and 1.4.11)."""
    page.emulate_media(color_scheme=scheme)
    ask(page, "where is my parcel")
    style = "(e, name) => getComputedStyle(e)[name]"
    back = page.locator("body").evaluate(style, "backgroundColor")
    panel = page.locator("article").evaluate(style, "backgroundColor")
    for where, name, ground, least in (
        ("body", "color", back, 4.5),
        ("#error", "color", back, 4.5),
        ("article", "color", panel, 4.5),
        ("article .note >> nth=0", "color", panel, 4.5),
        ("article .decision >> nth=0", "color", panel, 4.5),
        ("article rect.bar >> nth=0", "fill", panel, 3),
        ("article rect.second", "fill", panel, 3),
        ("textarea >> nth=0", "borderTopColor", back, 3),
    ):
        assert contrast(page.locator(where).evaluate(style, name), ground) >= least, where
    button = page.get_by_role("button", name="Answer", exact=True)
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


def test_rewards(opened, base, tmp_path):
    """The responses in their order, with the best one above them; one alone has a reward too."""
    pairs = [{"prompt": "what?", "chosen": "my card", "rejected": word} for word in ("gas", "air", "the gas", "twice")]
    options = {"model": str(base), "steps": 2, "batch_size": 2, "r": 2, "validation": 0}
    runs.train(runs.RunConfig.of(data=pairs, output=str(tmp_path / "run"), **options), progress=False)
    with serving(load_hosted(open_hosted([str(tmp_path / "run")], SETTINGS), SETTINGS)) as client:
        page = opened(str(client.base_url))
        for responses in (["my card", "gas", "air"], ["twice"], ["10", "9", "gas"], ["gas", "gas"]):
            body = {"inputs": {"prompt": "what?", "responses": responses}}
            answer = client.post("/v1/predict", json=body).json()["answers"][0]
            page.get_by_role("textbox", name="Prompt").fill("what?")
            page.get_by_role("textbox", name="Choices").fill("\n".join(responses))
            page.get_by_role("button", name="Answer", exact=True).click()
            article = page.get_by_role("article").first
            rewards = zip(answer["rewards"], answer["reward_stds"], strict=True)
            names = ["0: gas", "1: gas"] if len({*responses}) < len(responses) else responses
            article.get_by_text(names[0], exact=True).last.wait_for()
            assert article.locator("tbody th").all_inner_texts() == names
            assert article.locator("tbody td").all_inner_texts() == [f"{mean:.2f} ± {std:.2f}" for mean, std in rewards]
            widths = article.locator("rect.bar").evaluate_all("bars => bars.map(bar => +bar.getAttribute('width'))")
            assert widths == pytest.approx([100 * answer["probabilities"][name] for name in names])
            assert article.locator(".verdict strong").inner_text() == answer["best"]


def test_tagged_words(opened, base, tmp_path):
    """Words with a tint, entities with their probability, and the calibrated rule's other tags."""
    data = [{"tokens": ["the", word], "tags": ["O", "B-X" if word == "card" else "O"]} for word in ("card", "gas") * 4]
    options = {"model": str(base), "steps": 30, "batch_size": 4, "r": 2, "validation": 0, "learning_rate": 0.03}
    run = runs.train(runs.RunConfig.of(data=data, output=str(tmp_path / "run"), **options), progress=False)
    others = [{"tokens": [f"{i}", *one["tokens"]], "tags": ["O", *one["tags"]]} for i, one in enumerate(data * 2)]
    calibrate(runs.open_run(run.config.output), others, options=SETTINGS, coverage=0.8)
    with serving(load_hosted(open_hosted([run.config.output], SETTINGS), SETTINGS)) as client:
        page = opened(str(client.base_url))
        asked = ["the", "card"]
        answer = client.post("/v1/predict", json={"inputs": {"tokens": asked}}).json()["answers"][0]
        assert [one["text"] for one in answer["entities"]] == ["card"]
        page.get_by_role("textbox", name="Words").fill(" ".join(asked))
        page.get_by_role("button", name="Answer", exact=True).click()
        article = page.get_by_role("article").first
        article.get_by_role("row", name="card (X)").get_by_role("cell").filter(
            has_text=percent(answer["entities"][0]["probability"])
        ).wait_for()
        words = article.locator(".written span")
        assert words.all_inner_texts()[: len(asked)] == asked
        titles = words.evaluate_all("spans => spans.map(span => span.title)")
        expected = [
            f"{tag}, probability {percent(p)}"
            for tag, p in zip(answer["tags"], answer["token_confidence"], strict=True)
        ]
        assert all(title.startswith(start) for title, start in zip(titles, expected, strict=False))
        assert page.get_by_role("status").inner_text() == "2 tags."
        assert "By the calibrated rule these may have other tags" in article.inner_text()
        page.get_by_text("Settings").click()
        page.get_by_label("a list").check()
        page.get_by_role("textbox", name="List").fill("the gas\nthe card")
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_text("No entity was found.").wait_for()
        page.get_by_role("row", name="card (X)").wait_for()
