"""The explorer in a real browser, in JupyterLab and as voila's page: draw, pull, click, look; no error in console or kernel.

Headless Chromium driven by Playwright. Screenshots go to the folder that DFSBIR_ARTIFACTS names, else to pytest's temporary one.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
MISSING = [
    name
    for name in ("playwright", "anywidget", "voila", "jupyterlab")
    if importlib.util.find_spec(name) is None
] + ([] if CHROMIUM else ["a Chromium browser"])
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
PATIENCE = (
    200  # seconds for anything; a loaded machine is slow, and a test that waits is no slower for it
)
DARK = "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) if (d[i] < 128 && d[i + 3] > 128) n++; return n; }"
DOT = """c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, w = c.width;
  for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200 && Math.min(d[i], d[i + 1], d[i + 2]) < 150) return [(i / 4) % w / w, Math.floor(i / 4 / w) / c.height]; }"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with the page and a tiny run, and the environment of a server that knows nothing else."
    top = tmp_path_factory.mktemp("desk")
    from dfsbir.explore.runs import tiny_run

    tiny_run(top / "runs" / "first", images=150, epochs=4, warmup=30, student_steps=8)
    tiny_run(top / "runs" / "second", images=50, epochs=1, warmup=10, student_steps=4)
    shutil.copy(ROOT / "nbs" / "explorer.ipynb", top)
    settings = (
        top / "home" / ".jupyter" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    )
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'
    )
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTEST_", "COV_", "JUPYTER", "DFSBIR_"))
    }
    env |= {
        "HOME": str(top / "home"),
        "JUPYTER_CONFIG_DIR": str(top / "home" / ".jupyter"),
        "JUPYTER_PLATFORM_DIRS": "0",
        "PYTHONPATH": str(ROOT),
        "DFSBIR_RUNS": "runs",
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
    process = subprocess.Popen(
        [sys.executable, "-m", *[w.format(port=port) for w in words]],
        cwd=top,
        env=env,
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
    )
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
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


def open_page(browser):
    "A new page, and the list in which its errors are collected. Style sheets and formulas that voila's own template takes from elsewhere come empty: with and without a network the page is the same."
    page, errors = browser.new_page(viewport={"width": 1240, "height": 1000}), []
    page.route(
        re.compile(r"^https?://(?!127\.0\.0\.1|localhost)"),
        lambda route: (
            route.fulfill(status=200, body="")
            if re.search(r"font-?awesome|mathjax", route.request.url, re.I)
            else route.abort()
        ),
    )
    page.set_default_timeout(PATIENCE * 1000)
    page.on(
        "console",
        lambda m: (
            errors.append(f"{m.text[:300]} {m.location.get('url', '')}")
            if m.type == "error"
            else None
        ),
    )
    page.on("pageerror", lambda e: errors.append(f"uncaught: {e}"[:300]))
    return page, errors


def stroke(page, points):
    "Draws with the mouse; points are shares of the pad's side."
    page.locator(".dfs-pad").evaluate(
        "e => e.scrollIntoView({block: 'center'})"
    )  # away from JupyterLab's toolbar, whose buttons would take the mouse
    page.wait_for_timeout(200)
    box = page.locator(".dfs-pad").bounding_box()
    x, y = (
        [box[k] + p[i] * box[side] for p in points]
        for i, (k, side) in enumerate((("x", "width"), ("y", "height")))
    )
    page.mouse.move(x[0], y[0])
    page.mouse.down()
    for to in zip(x[1:], y[1:]):
        page.mouse.move(*to, steps=6)
    page.mouse.up()


def status(page, words):
    "Waits until the line above the answers says so, and the answers are those of all that is on the pad."
    page.wait_for_function(
        """w => { const [line, pad, found] = ['.dfs-status', '.dfs-pad', '.dfs-found'].map(c => document.querySelector(c));
      return line && pad && line.innerText.includes(w) && (found ? found.dataset.points : '0') === pad.dataset.points; }""",
        arg=words,
    )
    return page.locator(".dfs-status").inner_text()


def found_photos(page):
    return page.locator(".dfs-found img").evaluate_all("all => all.map(i => i.src)")


def picture(page, kind=".dfs-panel-image", other_than=None):
    "Waits for the visible tab's picture, and gives its source."
    page.wait_for_function(
        "([kind, old]) => [...document.querySelectorAll(kind)].some(i => i.offsetParent && i.complete && i.naturalWidth > 60 && i.src !== old)",
        arg=[kind, other_than],
    )
    return page.locator(f"{kind}:visible").get_attribute("src")


def show_tab(page, title):
    page.locator(".lm-TabBar-tab:visible", has_text=re.compile(f"^{title}$")).first.click()


def nothing_is_cut(page):
    "The front tab's content fits its width; pictures and controls lie side by side or below each other, never on top."
    loose = page.evaluate(
        """() => { const bad = [], box = e => e.getBoundingClientRect();
      const parts = [...document.querySelectorAll('.dfs-pad, .dfs-map, .dfs-found, .dfs-panel-image, .dfs-map-image, .widget-button, .jupyter-button, .widget-dropdown, .widget-slider, .dfs-status')].filter(e => e.offsetParent && box(e).width > 1);
      for (const e of parts) if (box(e).right > innerWidth + 1 || box(e).left < -1) bad.push('cut: ' + e.className);
      for (const a of parts) for (const b of parts) if (a !== b && !a.contains(b) && !b.contains(a)) { const p = box(a), q = box(b);
        if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1) bad.push('overlap: ' + a.className + ' / ' + b.className); }
      return bad; }"""
    )
    assert not loose, loose


def draw_and_find(page, shots, name):
    page.locator(".dfs-pad").wait_for()
    page.locator(".dfs-pad").scroll_into_view_if_needed()
    status(page, "draw something")
    assert found_photos(page) == [] and page.locator(".dfs-pad").evaluate(DARK) == 0
    stroke(page, [(0.2, 0.25), (0.27, 0.8), (0.6, 0.8), (0.67, 0.25), (0.2, 0.25)])
    assert "best 12 of" in status(page, "1 stroke;")
    first, ink = found_photos(page), page.locator(".dfs-pad").evaluate(DARK)
    assert len(set(first)) == 12 and ink > 500
    stroke(page, [(0.66, 0.35), (0.85, 0.4), (0.82, 0.6), (0.62, 0.62)])
    status(page, "2 strokes;")
    both = found_photos(page)
    assert len(both) == 12 and page.locator(".dfs-pad").evaluate(DARK) > ink
    nothing_is_cut(page)
    page.screenshot(path=shots / f"{name}-draw.png")
    page.locator(".dfs-undo").click()
    status(page, "1 stroke;")
    assert found_photos(page) == first and page.locator(".dfs-pad").evaluate(DARK) == ink
    page.locator(".dfs-clear").click()
    status(page, "draw something")
    assert found_photos(page) == [] and page.locator(".dfs-pad").evaluate(DARK) == 0
    page.locator(".dfs-put").click()
    status(page, "strokes; best 12")
    assert len(found_photos(page)) == 12 and page.locator(".dfs-pad").evaluate(DARK) > 100
    remembered = int(page.locator(".dfs-pad").get_attribute("data-points"))
    stroke(page, [(0.1, 0.9), (0.9, 0.95)])  # a remembered drawing, changed
    page.wait_for_function(
        "n => +document.querySelector('.dfs-pad').dataset.points > n", arg=remembered
    )
    status(page, "strokes; best 12")
    page.screenshot(path=shots / f"{name}-remembered.png")


def pull_a_slider(page, shots, name):
    show_tab(page, "Samples")
    before = picture(page)
    page.locator(".noUi-handle:visible").first.focus()
    page.keyboard.press("ArrowRight")
    assert picture(page, other_than=before) != before
    nothing_is_cut(page)
    page.screenshot(path=shots / f"{name}-remembered-pairs.png")


def click_on_the_map(page, shots, name):
    show_tab(page, "Map")
    canvas = page.locator(".dfs-map:visible")
    canvas.wait_for()
    at, box = canvas.evaluate(DOT), canvas.bounding_box()
    page.mouse.click(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    before = picture(page, ".dfs-map-image")
    page.mouse.move(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    page.mouse.wheel(
        0, -900
    )  # six times nearer: dots are pictures now, the same one under the pointer
    page.wait_for_timeout(300)
    nothing_is_cut(page)
    page.screenshot(path=shots / f"{name}-map.png")
    page.mouse.dblclick(box["x"] + 5, box["y"] + 5)
    assert before


def no_errors(errors, log):
    said = log.read_text()
    assert not errors, errors
    assert "Traceback" not in said and "Error" not in said, said[-3000:]


def test_voila_page(desk, browser, shots):
    process, port, log = serve(desk, ["voila", "explorer.ipynb", "--no-browser", "--port={port}"])
    try:
        with pytest.raises(OSError):  # loopback alone: the machine's other addresses answer nothing
            socket.create_connection((other_address(), port), 2).close()
        page, errors = open_page(browser)
        page.goto(f"http://127.0.0.1:{port}")
        draw_and_find(page, shots, "voila")
        pull_a_slider(page, shots, "voila")
        click_on_the_map(page, shots, "voila")
        for title in (
            "Training",
            "Walk",
            "Guidance",
            "Disagreement",
            "Confusion",
            "Curves",
            "Compare",
        ):
            show_tab(page, title)
            picture(page)
            assert not "".join(page.locator(".dfs-panel-status").all_text_contents()).strip()
            nothing_is_cut(page)
            page.screenshot(path=shots / f"voila-{title.lower()}.png")
        page.locator(".dfs-run select").select_option("second")
        show_tab(page, "Draw and find")
        status(page, "draw something")
        stroke(page, [(0.2, 0.2), (0.8, 0.8)])
        status(page, "1 stroke;")
        assert len(found_photos(page)) == 12
        page.close()
        no_errors(errors, log)
    finally:
        stop(process)


def other_address():
    "An address of this machine that is not loopback; none raises OSError, as a refused connection does."
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))  # documentation address; a datagram socket sends nothing
        return s.getsockname()[0]


def run_all_cells(page):
    "By the menu, once the status bar says that the kernel is there: a lab that is still connecting loses what it is asked."
    page.get_by_text(re.compile(r"\| Idle$")).first.wait_for()
    page.locator(".jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).first.click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def test_jupyterlab(desk, browser, shots):
    process, port, log = serve(
        desk,
        [
            "jupyterlab",
            "--no-browser",
            "--port={port}",
            "--ip=127.0.0.1",
            "--IdentityProvider.token=tested",
            "--ServerApp.root_dir=.",
            "--allow-root",
        ],
    )
    try:
        page, errors = open_page(browser)
        page.goto(f"http://127.0.0.1:{port}/doc/workspaces/test/tree/explorer.ipynb?token=tested")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        run_all_cells(page)
        draw_and_find(page, shots, "lab")
        pull_a_slider(page, shots, "lab")
        click_on_the_map(page, shots, "lab")
        assert (
            page.locator(
                ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"
            ).count()
            == 0
        )
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        page.reload()  # the page forgets, the kernel does not
        page.locator(".dfs-pad").wait_for(state="attached")
        show_tab(page, "Draw and find")
        page.locator(".dfs-pad:visible").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('.dfs-pad').dataset.points > 0")
        assert page.locator(".dfs-pad").evaluate(DARK) > 100
        page.locator(".dfs-clear").click()
        status(page, "draw something")
        stroke(page, [(0.3, 0.3), (0.7, 0.7)])
        status(page, "1 stroke;")
        no_errors(errors, log)
        page.close()
    finally:
        stop(process)
