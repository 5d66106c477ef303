"""The explorer in a real browser, in JupyterLab and as voila's page: draw, click, look.

Headless Chromium driven by Playwright. No error in the console or the kernel, nothing cut or on
top of another thing, no broken picture, at the widths of a desk and of a phone, light and dark.
Screenshots go to the folder that DFSBIR_ARTIFACTS names, else to pytest's temporary one.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
MODULES = ("playwright", "anywidget", "voila", "jupyterlab")
MISSING = [name for name in MODULES if importlib.util.find_spec(name) is None]
if not CHROMIUM:
    MISSING.append("a Chromium browser")
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the browser tests need {', '.join(MISSING)}"
)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 200  # seconds for anything: a loaded machine is slow, and waiting costs nothing else
DARK_PIXELS = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let n = 0;
  for (let i = 0; i < data.length; i += 4) if (data[i] < 128 && data[i + 3] > 128) n++;
  return n;
}"""
COLOURED_PIXEL = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b, opacity] = data.slice(i, i + 4);
    if (opacity < 150 || Math.max(r, g, b) - Math.min(r, g, b) < 60) continue;
    const x = (i / 4) % canvas.width, y = Math.floor(i / 4 / canvas.width);
    return [x / canvas.width, y / canvas.height];
  }
}"""
FAULTS = """() => {
  const found = [], box = e => e.getBoundingClientRect();
  const seen = e => e.offsetParent && box(e).width > 1;
  for (const image of document.querySelectorAll('.dfs-page img'))
    if (seen(image) && image.complete && !image.naturalWidth) found.push('broken picture');
  const kinds = ['pad', 'map', 'found', 'figure-place', 'note', 'status', 'about', 'facts',
    'tools'];
  const parts = [...document.querySelectorAll(kinds.map(k => `.dfs-page .dfs-${k}`).join() +
    ', .dfs-page .widget-button, .dfs-page .widget-dropdown, .dfs-page .widget-slider' +
    ', .dfs-page .lm-TabBar-tab')].filter(seen);
  for (const e of parts) {
    if (box(e).right > innerWidth + 1 || box(e).left < -1) found.push('cut: ' + e.className);
    if (e.matches('.lm-TabBar-tab')) {
      const label = e.querySelector('.lm-TabBar-tabLabel');
      if (label.scrollWidth > label.clientWidth + 1) found.push('unreadable tab: ' + e.innerText);
    }
  }
  for (const a of parts) for (const b of parts) {
    if (a === b || a.contains(b) || b.contains(a)) continue;
    const p = box(a), q = box(b);
    const across = p.left < q.right - 1 && q.left < p.right - 1;
    if (across && p.top < q.bottom - 1 && q.top < p.bottom - 1)
      found.push('overlap: ' + a.className + ' / ' + b.className);
  }
  return found;
}"""
CONTRAST = """() => {
  const rgb = text => text.match(/[0-9.]+/g).map(Number);
  const figure = [...document.querySelectorAll('.dfs-figure')].find(e => e.offsetParent);
  let e = figure, back = [0, 0, 0, 0];
  while (e && !(back.length === 3 || back[3])) {
    back = rgb(getComputedStyle(e).backgroundColor);
    e = e.parentElement;
  }
  if (!e && !(back.length === 3 || back[3])) back = [255, 255, 255];
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * R + .7152 * G + .0722 * B;
  };
  const values = [light(rgb(getComputedStyle(figure).color)), light(back)].sort((x, y) => y - x);
  return [(values[0] + .05) / (values[1] + .05), light(back)];
}"""


@pytest.fixture(scope="module")
def desk(home, tmp_path_factory):
    "A folder with the page, and the environment of a server that knows nothing but two runs."
    top = tmp_path_factory.mktemp("desk")
    shutil.copy(ROOT / "nbs" / "explorer.ipynb", top)
    settings = top / "home" / ".jupyter" / "lab" / "user-settings" / "@jupyterlab"
    settings = settings / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    theme = {"theme": "JupyterLab Dark"}
    (settings / "themes.jupyterlab-settings").write_text(json.dumps(theme))
    own = ("PYTEST_", "COV_", "JUPYTER", "DFSBIR_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    env |= {
        "HOME": str(top / "home"),
        "JUPYTER_CONFIG_DIR": str(top / "home" / ".jupyter"),
        "JUPYTER_PLATFORM_DIRS": "0",
        "PYTHONPATH": str(ROOT),
        "DFSBIR_RUNS": str(home),
        "OMP_NUM_THREADS": "1",
    }
    return top, env


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    "Where screenshots are kept."
    folder = Path(os.environ.get("DFSBIR_ARTIFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def serve(desk, words):
    "Starts a server of the desk on a free port of loopback; gives (process, port, log file)."
    top, env = desk
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = top / f"{words[0]}.log"
    line = [sys.executable, "-m", *[word.format(port=port) for word in words]]
    with log.open("w") as output:
        process = subprocess.Popen(line, cwd=top, env=env, stdout=output, stderr=output)
    for _ in range(PATIENCE * 4):
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port, log
        except OSError:
            time.sleep(0.25)
    process.kill()
    raise AssertionError(f"{words[0]} did not start:\n{log.read_text()[-3000:]}")


def stop(process):
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture(scope="module")
def voila(desk):
    words = ["voila", "explorer.ipynb", "--no-browser", "--port={port}"]
    words.append("--VoilaConfiguration.allow_theme_override=YES")
    process, port, log = serve(desk, words)
    yield port, log
    stop(process)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


def open_page(browser):
    """A new page, and the list in which its errors and warnings of versions are collected.

    Style sheets and formulas that voila's own template takes from elsewhere come empty: with and
    without a network the page is the same."""
    page, errors = browser.new_page(viewport={"width": 1440, "height": 1000}), []

    def elsewhere(route):
        if re.search(r"font-?awesome|mathjax", route.request.url, re.IGNORECASE):
            route.fulfill(status=200, body="")
        else:
            route.abort()

    def console(message):
        about_versions = "satisf" in message.text and versions_fit_together()
        if message.type == "error" or (message.type == "warning" and about_versions):
            errors.append(f"{message.text[:300]} {message.location.get('url', '')}")

    page.route(re.compile(r"^https?://(?!127\.0\.0\.1|localhost)"), elsewhere)
    page.set_default_timeout(PATIENCE * 1000)
    page.on("console", console)
    page.on("pageerror", lambda error: errors.append(f"uncaught: {error}"[:300]))
    return page, errors


def versions_fit_together():
    "Whether these versions of voila and the widgets were built for one another."
    fit = {"voila": "0.5.8", "ipywidgets": "8.1.5", "jupyterlab_widgets": "3.0.13"}
    return all(version(name) == number for name, number in fit.items())


def stroke(page, points):
    "Draws with the mouse; points are shares of the pad's side."
    pad = page.locator(".dfs-pad")
    pad.evaluate("e => e.scrollIntoView({block: 'center'})")  # away from JupyterLab's toolbar
    page.wait_for_timeout(200)
    box = pad.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def status(page, words):
    "Waits until the line above the photos says so, and they belong to all that is on the pad."
    page.wait_for_function(
        """words => {
          const [line, pad, found] = ['.dfs-status', '.dfs-pad', '.dfs-found']
            .map(kind => document.querySelector(kind));
          const points = found ? found.dataset.points : '0';
          return line && pad && line.innerText.includes(words) && points === pad.dataset.points;
        }""",
        arg=words,
    )
    return page.locator(".dfs-status").inner_text()


def found_photos(page):
    return page.locator(".dfs-found img").evaluate_all("all => all.map(image => image.src)")


def ink(page):
    return page.locator(".dfs-pad").evaluate(DARK_PIXELS)


def figure(page, other_than=""):
    "Waits for the front tab's figure, and gives its SVG text."
    page.wait_for_function(
        """old => [...document.querySelectorAll('.dfs-figure-place')].some(place =>
          place.offsetParent && !place.closest('.dfs-busy') && place.shadowRoot.querySelector('svg')
          && place.dataset.svg !== old)""",
        arg=other_than,
    )
    return page.locator(".dfs-figure-place:visible").evaluate("e => e.dataset.svg")


def show_tab(page, title):
    title = re.compile(f"^{title}$")
    page.locator(".widget-tab .lm-TabBar-tab:visible", has_text=title).first.click()


def no_faults(page):
    "Nothing is cut, broken or on top of another thing."
    faults = page.evaluate(FAULTS)
    assert not faults, faults


def draw_and_find(page, shots, name):
    page.locator(".dfs-run select").select_option("one")  # its sketches are strokes
    page.locator(".dfs-put").wait_for()
    status(page, "draw something")
    assert found_photos(page) == [] and ink(page) == 0
    no_faults(page)
    stroke(page, [(0.2, 0.25), (0.27, 0.8), (0.6, 0.8), (0.67, 0.25), (0.2, 0.25)])
    assert "best 12 of" in status(page, "1 stroke;")
    first, dark = found_photos(page), ink(page)
    assert len(set(first)) == 12 and dark > 500
    stroke(page, [(0.66, 0.35), (0.85, 0.4), (0.82, 0.6), (0.62, 0.62)])
    status(page, "2 strokes;")
    assert len(found_photos(page)) == 12 and ink(page) > dark
    no_faults(page)
    page.screenshot(path=shots / f"{name}-draw.png")
    page.keyboard.press("Control+z")  # the pad has the focus since it was drawn on
    status(page, "1 stroke;")
    assert found_photos(page) == first and ink(page) == dark
    stroke(page, [(0.1, 0.1), (0.3, 0.1)])
    status(page, "2 strokes;")
    page.locator(".dfs-undo").click()
    status(page, "1 stroke;")
    page.locator(".dfs-pad").press("Delete")
    status(page, "draw something")
    assert found_photos(page) == [] and ink(page) == 0
    page.locator(".dfs-put").click()
    status(page, "strokes; best 12")
    estimated = int(page.locator(".dfs-pad").get_attribute("data-points"))
    stroke(page, [(0.1, 0.9), (0.9, 0.95)])  # an estimated drawing, changed by hand
    page.wait_for_function(
        "n => +document.querySelector('.dfs-pad').dataset.points > n", arg=estimated
    )
    status(page, "strokes; best 12")
    page.locator(".dfs-clear").click()
    status(page, "draw something")
    page.locator(".dfs-pad").press("n")  # the estimator's next drawing
    status(page, "strokes; best 12")
    page.locator(".dfs-clear").click()
    status(page, "draw something")


def look_at_samples(page, shots, name):
    show_tab(page, "Samples")
    before = figure(page)
    page.locator(".noUi-handle:visible").first.focus()
    page.keyboard.press("ArrowRight")
    second = figure(page, other_than=before)
    page.locator(".dfs-random:visible").click()
    random = figure(page, other_than=second)
    page.keyboard.press("n")  # the button has the focus
    third = figure(page, other_than=random)
    page.locator("input[type=checkbox]:visible").check()
    page.wait_for_function(  # every sample beside its nearest test image
        """n => [...document.querySelectorAll('.dfs-figure-place')].some(place =>
          place.offsetParent && place.shadowRoot.querySelectorAll('image').length === n)""",
        arg=2 * third.count("<image"),
    )
    figure(page)
    no_faults(page)
    page.screenshot(path=shots / f"{name}-samples.png")


def enlarge(page, shots, name):
    page.locator(".dfs-figure-place:visible image").first.click()
    dialog = page.locator(".dfs-dialog[open]")
    assert dialog.locator(".dfs-large").bounding_box()["width"] > 250
    assert "teacher" in dialog.locator(".dfs-caption").inner_text()
    first = dialog.locator(".dfs-large").get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".dfs-large").get_attribute("src") != first
    assert dialog.locator(".dfs-hint").inner_text().startswith("2 of")
    page.keyboard.press("ArrowLeft")
    assert dialog.locator(".dfs-large").get_attribute("src") == first
    page.screenshot(path=shots / f"{name}-enlarged.png")
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")


def download(page):
    for format, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        with page.expect_download() as asked:
            page.locator(f".dfs-save-{format}:visible").click()
        assert asked.value.suggested_filename.endswith(f"samples.{format}")
        assert Path(asked.value.path()).read_bytes().startswith(start)


def click_on_the_map(page, shots, name):
    show_tab(page, "Map")
    canvas = page.locator(".dfs-map:visible")
    canvas.wait_for()
    no_faults(page)
    canvas.evaluate("e => e.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(300)
    at, box = canvas.evaluate(COLOURED_PIXEL), canvas.bounding_box()
    page.mouse.click(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    figure(page)
    page.mouse.wheel(0, -900)  # six times nearer: dots are pictures now
    page.wait_for_timeout(300)
    no_faults(page)
    page.screenshot(path=shots / f"{name}-map.png")
    page.mouse.dblclick(box["x"] + 5, box["y"] + 5)


def no_errors(errors, log):
    said = log.read_text()
    assert not errors, errors
    assert "Traceback" not in said and "Error" not in said, said[-3000:]


def test_voila_serves_this_computer_alone(voila):
    port, _ = voila
    with pytest.raises(OSError):
        socket.create_connection((other_address(), port), 2).close()


def other_address():
    "An address of this machine that is not loopback; none raises OSError, as a refusal does."
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))  # documentation address; a datagram socket sends nothing
        return s.getsockname()[0]


def test_voila_page(voila, browser, shots):
    port, log = voila
    page, errors = open_page(browser)
    page.goto(f"http://127.0.0.1:{port}")
    page.locator(".dfs-progress").wait_for()  # a line, before PyTorch is there
    page.screenshot(path=shots / "voila-first.png")
    draw_and_find(page, shots, "voila")
    look_at_samples(page, shots, "voila")
    enlarge(page, shots, "voila")
    download(page)
    click_on_the_map(page, shots, "voila")
    titles = page.locator(".widget-tab .lm-TabBar-tab").all_inner_texts()
    assert len(titles) == 11
    for width in (1440, 1000, 390):
        page.set_viewport_size({"width": width, "height": 1000})
        for title in titles:
            show_tab(page, title.strip())
            if title.strip() != "Draw and find":
                figure(page)
            page.wait_for_timeout(500)  # the page's width is reported, and another figure drawn
            if title.strip() not in ("Draw and find", "Map"):
                assert not page.locator(".dfs-note.dfs-error:visible").count()
                figure(page)
            no_faults(page)
            page.screenshot(path=shots / f"voila-{width}-{title.strip().lower()}.png")
    page.close()
    no_errors(errors, log)


def test_an_error_is_shown_in_words(voila, browser):
    "A bound that no sample reaches: the figure gives way to a sentence, and comes back."
    port, log = voila
    page, errors = open_page(browser)
    page.goto(f"http://127.0.0.1:{port}/?theme=dark")
    page.locator(".dfs-run select").select_option("one")
    page.locator(".dfs-put").wait_for()
    show_tab(page, "Samples")
    figure(page)
    contrast, background = page.evaluate(CONTRAST)
    assert contrast > 7 and background < 0.1  # readable on dark
    page.locator(".noUi-handle:visible").nth(1).focus()
    page.keyboard.press("End")
    page.locator(".dfs-note.dfs-error:visible").wait_for()
    assert not page.locator(".dfs-figure-place:visible").count()
    no_faults(page)
    page.keyboard.press("Home")
    figure(page)
    assert not page.locator(".dfs-note.dfs-error:visible").count()
    page.close()
    no_errors(errors, log)


def run_all_cells(page):
    "By the menu, once the kernel is there: a lab that still connects loses what it is asked."
    page.get_by_text(re.compile(r"\| Idle$")).first.wait_for()
    page.locator(".jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).first.click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def test_jupyterlab(desk, browser, shots):
    "With the file list open, in the dark theme."
    words = ["jupyterlab", "--no-browser", "--port={port}", "--ip=127.0.0.1", "--allow-root"]
    words += ["--IdentityProvider.token=tested", "--ServerApp.root_dir=."]
    process, port, log = serve(desk, words)
    try:
        page, errors = open_page(browser)
        page.goto(f"http://127.0.0.1:{port}/doc/workspaces/test/tree/explorer.ipynb?token=tested")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        run_all_cells(page)
        draw_and_find(page, shots, "lab")
        look_at_samples(page, shots, "lab")
        contrast, background = page.evaluate(CONTRAST)
        assert contrast > 7 and background < 0.1
        click_on_the_map(page, shots, "lab")
        kinds = ("stderr", "error")
        failed = [f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in kinds]
        assert page.locator(", ".join(failed)).count() == 0
        show_tab(page, "Draw and find")
        stroke(page, [(0.2, 0.2), (0.8, 0.8)])
        status(page, "1 stroke;")
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        page.reload()  # the page forgets, the kernel does not
        page.locator(".dfs-pad").wait_for(state="attached")
        show_tab(page, "Draw and find")
        page.wait_for_function("document.querySelector('.dfs-pad').dataset.points > 0")
        assert ink(page) > 100
        page.locator(".dfs-clear").click()
        status(page, "draw something")
        stroke(page, [(0.3, 0.3), (0.7, 0.7)])
        status(page, "1 stroke;")
        no_errors(errors, log)
        page.close()
    finally:
        stop(process)
